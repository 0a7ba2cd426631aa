"""The local engine: questions in cohorts, exact to the token, with nothing computed that is not needed.

A *cohort* is a group of questions that started together. Each keeps the keys and values of its rows in memory of its
own; a row that ends leaves, the last row takes its place, and when enough places are free the next cohort joins. One
forward pass feeds what every row of every cohort has pending, end to end and without padding: a prompt, the token
chosen last, or that token and a *draft*. Only attention looks at a cohort alone, so that its rows, which are about
equally long, wait for none of another.

Drafts are the tokens that a planning block leaves no doubt about: after the first token of a block the rest of it,
after the answer block its phrase, after a line break the next prefix. They go in with the token that they follow and
are kept as far as the model itself would have chosen them, position by position (arXiv 2211.17192, section 2.3): the
answer is that of plain decoding, in fewer passes.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from memreason.core.recipe import EvalRecipe
from memreason.core.trace import Question
from memreason.encode.scheme import Codec
from memreason.fast.attention import attending
from memreason.fast.memory import keep_freed_memory
from memreason.finetune.methods import is_adapted, merged, network_of
from memreason.generate.choose import Choose, chooser, drafts_of, take
from memreason.generate.plain import generate_plainly
from memreason.generate.rows import Generation, Row, start

__all__ = ["Generation", "generate"]

log = logging.getLogger("memreason")
COHORTS = "memreason_cohorts"
GROWTH = 32  # positions by which a cohort's memory grows
CHOSEN = 64  # rows of logits looked at together: their fp32 copy stays in the cache


class _Cohort:
    """Rows that started together, and their keys and values: for each layer (rows, groups, positions, width)."""

    def __init__(self, rows: list[Row], device: torch.device) -> None:
        self.rows, self.device, self.room = rows, device, 0
        self.memory: dict[int, tuple[Tensor, Tensor]] = {}
        self.masks: dict[int | None, Tensor] = {}
        self.plan()

    def plan(self) -> None:
        """Where the pending tokens of the next pass stand: row, place in the row's queries, position."""
        counts = [len(row.pending) for row in self.rows]
        self.count, self.most = sum(counts), max(counts)
        length = max(row.fed + count for row, count in zip(self.rows, counts, strict=True))
        self.room = max(self.room, -(-length // GROWTH) * GROWTH)
        places = [(n, k, row.fed + k) for n, row in enumerate(self.rows) for k in range(counts[n])]
        self.row, self.place, self.position = torch.tensor(places, device=self.device).unbind(dim=1)
        self.firsts = (self.place == 0).nonzero().squeeze(1)
        self.others = (self.place > 0).nonzero().squeeze(1)
        self.longer = torch.tensor([n for n, count in enumerate(counts) if count > 1], device=self.device)
        # of each other token: which of the longer rows it belongs to
        self.owner = torch.searchsorted(self.longer, self.row[self.others])
        self.masks.clear()

    def mask(self, window: int | None, like: Tensor) -> Tensor:
        """(rows, 1, queries, room): 0 for keys up to the query's own, inside the window if there is one."""
        if window not in self.masks:
            own = torch.zeros(len(self.rows), self.most, dtype=torch.long, device=self.device)
            own[self.row, self.place] = self.position
            behind = own[..., None] - torch.arange(self.room, device=self.device)
            hidden = (behind < 0) if window is None else (behind < 0) | (behind >= window)
            self.masks[window] = torch.zeros_like(behind, dtype=like.dtype).masked_fill_(hidden, -torch.inf)[:, None]
        return self.masks[window]

    def remember(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Put pending keys and values (tokens, groups, width) in place; return all: (rows, groups, room, width).

        All of the room, that is: a product with a part of it would copy that part first.
        """
        rows, pending = len(self.rows), (key, value)
        kept = self.memory.get(layer)
        room = kept[0].shape[2] if kept else 0
        if kept is None or room < self.room:
            grown = [new.new_zeros(rows, new.shape[1], self.room, new.shape[2]) for new in pending]
            for new, old in zip(grown, kept or (), strict=False):
                new[:, :, :room] = old[:rows]
            kept = self.memory[layer] = (grown[0], grown[1])
        for tensor, new in zip(kept, pending, strict=True):
            tensor[self.row, :, self.position] = new
        return kept[0][:rows], kept[1][:rows]

    def leave(self, ended: set[int]) -> None:
        """Rows leave; the last ones take their places."""
        for hole in sorted(ended, reverse=True):
            last = self.rows.pop()
            if hole == len(self.rows):
                continue
            self.rows[hole] = last
            for tensor in (t for pair in self.memory.values() for t in pair):
                tensor[hole, :, : last.fed] = tensor[len(self.rows), :, : last.fed]


def _attend(module: Any, query: Tensor, key: Tensor, value: Tensor, _mask: Any, **settings: Any) -> tuple[Tensor, None]:
    """Transformers' door: query (1, heads, tokens, width), the tokens of each cohort one after another."""
    dtype = torch.promote_types(query.dtype, value.dtype)  # over a quantised base they differ
    query, key, value = (tensor[0].transpose(0, 1).to(dtype) for tensor in (query, key, value))
    query, cap = query * (settings.get("scaling") or query.shape[-1] ** -0.5), settings.get("softcap")
    found = value.new_empty(*query.shape[:2], value.shape[-1])
    start = 0
    for cohort in settings["cohorts"]:
        own = slice(start, start := start + cohort.count)
        keys, values = cohort.remember(module.layer_idx, key[own], value[own])
        mask, asked = cohort.mask(settings.get("sliding_window"), query), query[own]
        # Nearly every row has one token; a product over as many as the few longer ones have would be mostly padding.
        found[own][cohort.firsts] = _weigh(asked[cohort.firsts][:, None], keys, values, mask[:, :, :1], cap)[:, 0]
        if cohort.most > 1:
            padded = query.new_zeros(len(cohort.longer), cohort.most - 1, *query.shape[1:])
            padded[cohort.owner, cohort.place[cohort.others] - 1] = asked[cohort.others]
            weighed = _weigh(padded, keys[cohort.longer], values[cohort.longer], mask[cohort.longer, :, 1:], cap)
            found[own][cohort.others] = weighed[cohort.owner, cohort.place[cohort.others] - 1]
    return found[None], None


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


def generate(
    model: Any,
    codec: Codec,
    questions: Sequence[Question],
    settings: EvalRecipe,
    *,
    skip: frozenset[tuple[str, int]] = frozenset(),
) -> Iterator[list[Generation]]:
    """Answer each question `n_samples` times; yield what is finished, a few at a time, longest prompts first.

    A question that leaves no room for an answer (settings.max_length, or the model's positions) gets no tokens.
    Greedy answers do not depend on the number in flight in fp32; sampled ones draw from a generator of
    their own, seeded by question, sample and seed. `skip` holds (question id, sample) already done.
    """
    keep_freed_memory()
    room = getattr(model.config, "max_position_embeddings", None)
    rows = [
        start(codec, question, sample, settings, room)
        for question in questions
        for sample in range(settings.n_samples)
        if (question.id, sample) not in skip
    ]
    opening = codec.opening()
    if too_long := [row for row in rows if row.limit < 1]:
        log.warning("%d questions are longer than the limit of prompt and answer: they get none", len(too_long))
        yield [Generation(row.question, row.sample, opening, []) for row in too_long]
    waiting = deque(sorted((row for row in rows if row.limit >= 1), key=lambda row: -len(row.pending)))
    if not _feeds(network_of(model)):
        yield from generate_plainly(model, list(waiting), settings, opening, codec.eos_id)
        return
    drafts, choose = drafts_of(codec), chooser(model, settings)
    with merged(model), torch.inference_mode(), attending(model, COHORTS):
        network = _Network(model)
        cohorts: list[_Cohort] = []
        finished: list[Generation] = []
        while waiting or cohorts:
            _admit(cohorts, waiting, settings.batch_size, network)
            for cohort, scores in zip(cohorts, network.scores(cohorts), strict=True):
                ended = _advance(cohort, scores, choose, drafts, codec.eos_id)
                finished += [Generation(row.question, row.sample, opening + row.ids, row.logprobs) for row in ended]
            cohorts = [cohort for cohort in cohorts if cohort.rows]
            if finished and (len(finished) * 4 >= settings.batch_size or not (waiting or cohorts)):
                yield finished
                finished = []


def _feeds(network: Any) -> bool:
    """Whether the engine can feed this model, tried on six tokens: four, then two more, against all at once.

    Not so where more than keys and values is carried on (state-space layers), or attention has parts of its own.
    """
    if not getattr(network, "_supports_attention_backend", False):
        return False
    size = network.get_input_embeddings().weight.shape[0]
    ids = torch.arange(size // 4, size // 2, max(1, size // 24)).tolist()[:6]
    row = Row(Question("", ""), 0, 9, ids[:4], torch.Generator())
    with torch.inference_mode(), attending(network, COHORTS):
        fed = _Network(network)
        cohort = fed.cohort([row])
        fed.scores([cohort])
        row.fed, row.pending, row.drafted = 4, ids[4:], 1
        cohort.plan()
        (found,) = fed.scores([cohort])
    with (
        torch.inference_mode(),
        attending(network, "eager"),
    ):  # it rounds alike, so that in bf16 too little noise is left
        expected = network(input_ids=torch.tensor([ids], device=fed.device), use_cache=False).logits[0, -2:]
    return bool((found - expected).float().norm() < 0.05 * expected.float().norm())


def _admit(cohorts: list[_Cohort], waiting: deque[Row], size: int, network: _Network) -> None:
    """The next cohort joins as soon as a quarter of the places is free."""
    free = size - sum(len(cohort.rows) for cohort in cohorts)
    if waiting and free * 4 >= size:
        cohorts.append(network.cohort([waiting.popleft() for _ in range(min(free, len(waiting)))]))


def _advance(cohort: _Cohort, logits: Tensor, choose: Choose, drafts: dict[int, list[int]], eos: int) -> list[Row]:
    """Take each row's next tokens from its logits (those after its last sure token and its drafted ones).

    Returns the rows that ended, which have left the cohort.
    """
    points = [row.draw(len(row.ids) + k) for row in cohort.rows for k in range(row.drafted + 1)]
    found = chain.from_iterable(
        take(logits[n : n + CHOSEN], points[n : n + CHOSEN], choose) for n in range(0, len(points), CHOSEN)
    )
    ended: dict[int, Row] = {}
    for number, row in enumerate(cohort.rows):
        sure = len(row.pending) - row.drafted
        draft, row.fed = row.pending[sure:], row.fed + sure
        right = True  # everything drafted so far is what the model chose
        for k, (token, logprob) in enumerate([next(found) for _ in range(row.drafted + 1)]):
            if not right:
                break
            row.ids.append(token)
            row.logprobs.append(logprob)
            right = token != eos and draft[k : k + 1] == [token]
            row.fed += right
        if row.ids[-1] == eos or len(row.ids) == row.limit:
            ended[number] = row
        follow = drafts.get(row.ids[-1], [])[: row.limit - len(row.ids) - 1]
        row.pending, row.drafted = [row.ids[-1], *follow], len(follow)
    cohort.leave(set(ended))
    if cohort.rows:
        cohort.plan()
    return list(ended.values())


class _Network:
    """The model as the engine calls it. PEFT would put a learnt prompt in front of every call; here it goes in once."""

    def __init__(self, model: Any) -> None:
        self.model, self.device = model, next(model.parameters()).device
        learnt = is_adapted(model) and model.active_peft_config.is_prompt_learning
        self.network = model.get_base_model() if learnt else model
        self.virtual: int = model.active_peft_config.num_virtual_tokens if learnt else 0
        self.prefix = learnt and model.active_peft_config.peft_type == "PREFIX_TUNING"

    def cohort(self, rows: list[Row]) -> _Cohort:
        if self.prefix:
            cache = self.model.get_prompt(batch_size=len(rows))
            for row in rows:
                row.fed = self.virtual
        elif self.virtual:
            for row in rows:  # ids below zero stand for virtual tokens
                row.pending = [*range(-self.virtual, 0), *row.pending]
        cohort = _Cohort(rows, self.device)
        if self.prefix:
            cohort.memory = {n: (layer.keys, layer.values) for n, layer in enumerate(cache.layers)}
        return cohort

    def scores(self, cohorts: list[_Cohort]) -> tuple[Tensor, ...]:
        """Logits of each cohort: for each row those after its last sure token and after each drafted one."""
        rows = [row for cohort in cohorts for row in cohort.rows]
        ids = torch.tensor([[token for row in rows for token in row.pending]], device=self.device)
        wanted = [n <= row.drafted for row in rows for n in range(len(row.pending) - 1, -1, -1)]
        output = self.network(
            **self._inputs(ids),
            position_ids=torch.cat([cohort.position for cohort in cohorts])[None],
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
