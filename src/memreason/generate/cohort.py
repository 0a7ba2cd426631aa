"""A cohort: questions that started together, the keys and values of their rows, and attention over them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from transformers import AttentionInterface

from memreason.generate.rows import Row

__all__ = ["COHORTS", "Cohort"]

COHORTS = "memreason_cohorts"  # the name of our attention in Transformers' table
GROWTH = 32  # positions by which a cohort's memory grows
FEW = 64  # queries that are attended sooner than a second product is begun


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

    def leave(self, ended: set[int]) -> None:
        """Rows leave; the last ones take their places."""
        for hole in sorted(ended, reverse=True):
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
