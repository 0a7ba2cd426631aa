"""The engine: questions in cohorts, exact to the token, with nothing computed that is not needed.

A *cohort* is a group of questions that started together. Each keeps the keys and values of its rows in memory of its
own; a row that ends leaves, the last row takes its place, and when enough places are free the next cohort joins. One
forward pass feeds what every row of every cohort has pending, end to end and without padding: a prompt, the token
chosen last, or that token and a *draft*. Only attention looks at a cohort alone, so that its rows, which are about
equally long, wait for none of another.

Drafts are the tokens that a planning block leaves no doubt about: after the first token of a block the rest of it,
after the answer block its phrase, after a line break the next prefix. Where few rows leave room in a pass they are also
what a row read behind its last two tokens when it read those before (`Row.echo`). They go in with the token that they
follow and are kept as far as the model itself would have chosen them, position by position (arXiv 2211.17192, section
2.3): the answer is that of plain decoding, in fewer passes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from transformers import AttentionInterface

from memreason.core.stages import EvalRecipe
from memreason.encode.codec import Codec
from memreason.finetune.methods import is_adapted
from memreason.generate.calculator import calculator
from memreason.generate.choose import chooser, drafts_of, take
from memreason.generate.rows import Row

__all__ = ["COHORTS", "Cohort", "Network", "generate_in_cohorts"]

COHORTS = "memreason_cohorts"  # the name of our attention in Transformers' table
GROWTH = 32  # positions by which a cohort's memory grows
FEW = 64  # queries that are attended sooner than a second product is begun
ECHOED, LONGEST = 32, 8  # tokens that a pass, and a row, drafts of what was read: hardly more work than for one


def generate_in_cohorts(
    model: Any, codec: Codec, waiting: deque[Row], settings: EvalRecipe, more: Callable[[], bool]
) -> Iterator[list[Row]]:
    """Take rows from the queue until it is empty and all have ended; yield those that ended, after each pass."""
    drafts, choose = drafts_of(codec), chooser(model, settings)
    calculate = calculator(codec) if settings.calculator else None
    network = Network(model, codec.parting)
    cohorts: list[Cohort] = []
    while waiting or cohorts or more():
        free = settings.batch_size - sum(len(cohort.rows) for cohort in cohorts)
        if waiting and free * 4 >= settings.batch_size:  # the next cohort joins when a quarter of the places is free
            cohorts.append(network.cohort([waiting.popleft() for _ in range(min(free, len(waiting)))]))
        echoed = min(LONGEST, ECHOED // sum(len(cohort.rows) for cohort in cohorts))
        ended: list[Row] = []
        for cohort, logits in zip(cohorts, network.scores(cohorts), strict=True):
            points = [row.draw(len(row.ids) + k) for row in cohort.rows for k in range(row.drafted + 1)]
            found = take(logits, points, choose)
            gone = [n for n, row in enumerate(cohort.rows) if row.accept(found, calculate, codec.eos_id)]
            ended += [cohort.rows[n] for n in gone]
            cohort.leave(gone)
            for row in cohort.rows:
                row.draft(drafts, echoed)
            if cohort.rows:
                cohort.plan()
        cohorts = [cohort for cohort in cohorts if cohort.rows]
        yield ended


class Network:
    """The model as the engine calls it. PEFT would put a learnt prompt in front of every call; here it goes in once."""

    def __init__(self, model: Any, parting: frozenset[int] = frozenset()) -> None:
        self.model, self.device, self.parting = model, next(model.parameters()).device, parting
        learnt = is_adapted(model) and model.active_peft_config.is_prompt_learning
        self.network = model.get_base_model() if learnt else model
        self.virtual: int = model.active_peft_config.num_virtual_tokens if learnt else 0
        self.prefix = learnt and model.active_peft_config.peft_type == "PREFIX_TUNING"

    def cohort(self, rows: list[Row]) -> Cohort:
        if self.prefix:
            cache = self.model.get_prompt(batch_size=len(rows))
            for row in rows:
                row.fed = self.virtual
        elif self.virtual:
            for row in rows:  # ids below zero stand for virtual tokens
                row.pending = [*range(-self.virtual, 0), *row.pending]
        cohort = Cohort(rows, self.device, self.parting)
        if self.prefix:
            cohort.memory = {n: (layer.keys, layer.values) for n, layer in enumerate(cache.layers)}
        return cohort

    def scores(self, cohorts: list[Cohort]) -> tuple[Tensor, ...]:
        """Logits of each cohort: for each row those after its last sure token and after each drafted one."""
        rows = [row for cohort in cohorts for row in cohort.rows]
        ids = torch.tensor([[token for row in rows for token in row.pending]], device=self.device)
        wanted = [n <= row.drafted for row in rows for n in range(len(row.pending) - 1, -1, -1)]
        output = self.network(
            **self._inputs(ids),
            position_ids=torch.cat([cohort.on(self.device).position for cohort in cohorts])[None],
            use_cache=False,
            logits_to_keep=torch.tensor(wanted, device=self.device).nonzero().squeeze(1),
            cohorts=cohorts,
        )
        counts = [sum(row.drafted + 1 for row in cohort.rows) for cohort in cohorts]
        return torch.split(output.logits[0], counts)

    def _inputs(self, ids: Tensor) -> dict[str, Tensor]:
        if self.prefix or not self.virtual:
            return {"input_ids": ids}
        embedded = self.network.get_input_embeddings()(ids.clamp(min=0))
        prompt = self.model.get_prompt(batch_size=1)[0].to(embedded)
        return {"inputs_embeds": torch.where((ids < 0)[..., None], prompt[ids.clamp(max=-1)], embedded)}


class Batch(NamedTuple):
    """Pending tokens that are attended in one product of `most` queries a row: their places among all of the cohort's
    (tokens,), `slots` for them among rows x most (None: all are taken, in order), and the rows (None: all)."""

    tokens: Tensor
    slots: Tensor | None
    rows: Tensor | None
    most: int


class Places(NamedTuple):
    """Where the pending tokens of a pass stand, each (tokens,): row, position, the first position that it sees, and its
    place among what the batches find one after another."""

    row: Tensor
    position: Tensor
    since: Tensor
    found: Tensor
    batches: tuple[Batch, ...]


class Cohort:
    """Rows that started together, and their keys and values: for each layer (rows, groups, positions, width).

    `parting`: planning tokens that part what may be seen, if attention is sparse.
    """

    def __init__(self, rows: list[Row], device: torch.device, parting: frozenset[int] = frozenset()) -> None:
        self.rows, self.device, self.room, self.parting = rows, device, 0, parting
        self.memory: dict[int, tuple[Tensor, Tensor]] = {}
        self.plan()

    def plan(self) -> None:
        """Where the pending tokens of the next pass stand."""
        counts = [len(row.pending) for row in self.rows]
        fed = torch.tensor([row.fed for row in self.rows])
        self.count = sum(counts)
        length = max(row.fed + count for row, count in zip(self.rows, counts, strict=True))
        self.room = max(self.room, -(-length // GROWTH) * GROWTH)
        row = torch.repeat_interleave(torch.tensor(counts))
        place = torch.tensor([n for count in counts for n in range(count)])
        since = [first for row in self.rows for first in row.since(self.parting)] if self.parting else [0] * self.count
        batches = _batches(torch.tensor(counts), row, place)
        found = torch.cat([batch.tokens for batch in batches]).argsort()
        places = Places(row, fed[row] + place, torch.tensor(since), found, batches)
        self.there = {torch.device("cpu"): places}
        self.masks: dict[tuple[int | None, torch.device], list[Tensor]] = {}

    def on(self, device: torch.device) -> Places:
        """The places on the device of a layer, of which a model may have several."""
        if device not in self.there:
            self.there[device] = send_to_device(self.there[torch.device("cpu")], device)
        return self.there[device]

    def seen(self, window: int | None, like: Tensor) -> list[Tensor]:
        """For each batch (rows, 1, most, room): 0 for keys up to the query's own, inside the window if there is one."""
        name = window, like.device
        if name not in self.masks:
            self.masks[name] = [self._mask(batch, window, like) for batch in self.on(like.device).batches]
        return self.masks[name]

    def _mask(self, batch: Batch, window: int | None, like: Tensor) -> Tensor:
        at, count = self.on(like.device), len(self.rows) if batch.rows is None else len(batch.rows)
        own, since = (
            _padded(of[batch.tokens], batch, count).view(count, 1, batch.most, 1) for of in (at.position, at.since)
        )
        keys = torch.arange(self.room, device=like.device)
        hidden = (keys > own) | (keys < since)
        if window is not None:
            hidden |= keys <= own - window
        return torch.zeros_like(hidden, dtype=like.dtype).masked_fill_(hidden, -torch.inf)

    def remember(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Put pending keys and values (tokens, groups, width) in place; return all: (rows, groups, room, width).

        All of the room, that is: a product with a part of it would copy that part first.
        """
        rows, pending, at = len(self.rows), (key, value), self.on(key.device)
        kept = self.memory.get(layer)
        room = kept[0].shape[2] if kept else 0
        if kept is None or room < self.room:
            grown = [new.new_zeros(rows, new.shape[1], self.room, new.shape[2]) for new in pending]
            for new, old in zip(grown, kept or (), strict=False):
                new[:, :, :room] = old[:rows]
            kept = self.memory[layer] = (grown[0], grown[1])
        for tensor, new in zip(kept, pending, strict=True):
            tensor[at.row, :, at.position] = new
        return kept[0][:rows], kept[1][:rows]

    def leave(self, places: list[int]) -> None:
        """The rows at these places, in order, leave; the last ones take their places."""
        for hole in reversed(places):
            last = self.rows.pop()
            if hole == len(self.rows):
                continue
            self.rows[hole] = last
            for tensor in (t for pair in self.memory.values() for t in pair):
                tensor[hole, :, : last.fed] = tensor[len(self.rows), :, : last.fed]


def _batches(counts: Tensor, row: Tensor, place: Tensor) -> tuple[Batch, ...]:
    """All in one, or the first token of each row apart from the others.

    Nearly every row has one token: a product over as many as the few longer ones have would be mostly padding.
    """
    most, rows = int(counts.max()), len(counts)
    if most == 1 or rows * most <= max(FEW, 2 * len(row)):
        return (Batch(torch.arange(len(row)), None if rows * most == len(row) else row * most + place, None, most),)
    longer, others = (counts > 1).nonzero().squeeze(1), place.nonzero().squeeze(1)
    slots = torch.searchsorted(longer, row[others]) * (most - 1) + place[others] - 1
    return Batch((place == 0).nonzero().squeeze(1), None, None, 1), Batch(others, slots, longer, most - 1)


def _padded(own: Tensor, batch: Batch, count: int) -> Tensor:
    """(tokens, ...) -> (rows x most, ...). Padding is zero; as a position that is the first, which sees itself."""
    if batch.slots is None:
        return own
    return own.new_zeros(count * batch.most, *own.shape[1:]).index_copy_(0, batch.slots, own)


def _attend(module: Any, query: Tensor, key: Tensor, value: Tensor, _mask: Any, **settings: Any) -> tuple[Tensor, None]:
    """Transformers' door: query (1, heads, tokens, width), the tokens of each cohort one after another."""
    dtype = torch.promote_types(query.dtype, value.dtype)  # over a quantised base they differ
    query, key, value = (tensor[0].transpose(0, 1).to(dtype) for tensor in (query, key, value))
    query, cap = query * (settings.get("scaling") or query.shape[-1] ** -0.5), settings.get("softcap")
    found, start = [], 0
    for cohort in settings["cohorts"]:
        own = slice(start, start := start + cohort.count)
        at, masks = cohort.on(query.device), cohort.seen(settings.get("sliding_window"), query)
        memory = cohort.remember(module.layer_idx, key[own], value[own])
        parts = [_of(batch, query[own], memory, mask, cap) for batch, mask in zip(at.batches, masks, strict=True)]
        found.append(parts[0] if len(parts) == 1 else torch.cat(parts).index_select(0, at.found))
    return torch.cat(found)[None], None


def _of(batch: Batch, query: Tensor, memory: tuple[Tensor, Tensor], mask: Tensor, cap: float | None) -> Tensor:
    """What a batch's tokens of a cohort's queries (tokens, heads, width) find."""
    if batch.rows is not None:  # index_select copies a row as a whole, [] number by number
        memory = memory[0].index_select(0, batch.rows), memory[1].index_select(0, batch.rows)
    if len(batch.tokens) < len(query):
        query = query.index_select(0, batch.tokens)
    rows = len(memory[0])
    padded = _padded(query, batch, rows).view(rows, batch.most, *query.shape[1:])
    found = _weigh(padded, *memory, mask, cap).flatten(0, 1)
    return found if batch.slots is None else found.index_select(0, batch.slots)


def _weigh(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, cap: float | None) -> Tensor:
    """Attention of (rows, queries, heads, width) over (rows, groups, room, width) -> like the query.

    Heads that share a key head are rows of one product.
    """
    rows, count, heads, width = query.shape
    groups, room = keys.shape[1:3]
    query = query.view(rows, count, groups, heads // groups, width).permute(0, 2, 3, 1, 4)
    scores = query.reshape(rows, groups, -1, width) @ keys.transpose(2, 3)
    if cap:
        scores = (scores / cap).tanh() * cap
    scores = scores.view(*query.shape[:4], room).add_(mask[:, :, None])
    found = scores.softmax(dim=-1).view(rows, groups, -1, room) @ values
    found = found.view(*query.shape[:4], -1).permute(0, 3, 1, 2, 4).reshape(rows, count, heads, -1)
    return found.to(query.dtype)  # autocast may have made it another


AttentionInterface.register(COHORTS, _attend)
