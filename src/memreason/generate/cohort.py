"""A cohort: questions that started together, the keys and values of their rows, and attention over them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface

from memreason.generate.rows import Row

__all__ = ["COHORTS", "Cohort"]

COHORTS = "memreason_cohorts"  # the name of our attention in Transformers' table
GROWTH = 32  # positions by which a cohort's memory grows


class Places(NamedTuple):
    """Where the pending tokens of a pass stand, each (tokens,): row, place in the row's queries, position; which are
    the first of their row and which others; which rows have others, and to which of these each other belongs."""

    row: Tensor
    place: Tensor
    position: Tensor
    firsts: Tensor
    others: Tensor
    longer: Tensor
    owner: Tensor


class Cohort:
    """Rows that started together, and their keys and values: for each layer (rows, groups, positions, width).

    `parting`: planning tokens that part what may be seen, if attention is sparse.
    """

    def __init__(self, rows: list[Row], device: torch.device, parting: frozenset[int] = frozenset()) -> None:
        self.rows, self.device, self.room, self.parting = rows, device, 0, parting
        self.memory: dict[int, tuple[Tensor, Tensor]] = {}
        self.masks: dict[tuple[int | None, torch.device], Tensor] = {}
        self.there: dict[torch.device, Places] = {}
        self.plan()

    def plan(self) -> None:
        """Where the pending tokens of the next pass stand: row, place in the row's queries, position."""
        counts = [len(row.pending) for row in self.rows]
        self.count, self.most = sum(counts), max(counts)
        length = max(row.fed + count for row, count in zip(self.rows, counts, strict=True))
        self.room = max(self.room, -(-length // GROWTH) * GROWTH)
        places = [(n, k, row.fed + k) for n, row in enumerate(self.rows) for k in range(counts[n])]
        row, place, position = torch.tensor(places, device=self.device).unbind(dim=1)
        firsts, others = ((place == 0).nonzero().squeeze(1), (place > 0).nonzero().squeeze(1))
        longer = torch.tensor([n for n, count in enumerate(counts) if count > 1], device=self.device)
        owner = torch.searchsorted(longer, row[others])
        self.there = {self.device: Places(row, place, position, firsts, others, longer, owner)}
        self.position = position
        since = [first for row in self.rows for first in row.since(self.parting)] if self.parting else []
        self.since = torch.tensor(since, device=self.device)
        self.masks.clear()

    def on(self, device: torch.device) -> Places:
        """The places on the device of a layer, of which a model may have several."""
        if device not in self.there:
            self.there[device] = Places(*(tensor.to(device) for tensor in self.there[self.device]))
        return self.there[device]

    def mask(self, window: int | None, like: Tensor) -> Tensor:
        """(rows, 1, queries, room): 0 for keys up to the query's own, inside the window if there is one."""
        name = window, like.device
        if name not in self.masks:
            at = self.on(like.device)
            own = torch.zeros(len(self.rows), self.most, dtype=torch.long, device=like.device)
            own[at.row, at.place] = at.position
            keys = torch.arange(self.room, device=like.device)
            behind = own[..., None] - keys
            hidden = (behind < 0) if window is None else (behind < 0) | (behind >= window)
            if self.parting:
                since = torch.zeros_like(own)
                since[at.row, at.place] = self.since.to(like.device)
                hidden |= keys < since[..., None]
            self.masks[name] = torch.zeros_like(behind, dtype=like.dtype).masked_fill_(hidden, -torch.inf)[:, None]
        return self.masks[name]

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


def _attend(module: Any, query: Tensor, key: Tensor, value: Tensor, _mask: Any, **settings: Any) -> tuple[Tensor, None]:
    """Transformers' door: query (1, heads, tokens, width), the tokens of each cohort one after another."""
    dtype = torch.promote_types(query.dtype, value.dtype)  # over a quantised base they differ
    query, key, value = (tensor[0].transpose(0, 1).to(dtype) for tensor in (query, key, value))
    query, cap = query * (settings.get("scaling") or query.shape[-1] ** -0.5), settings.get("softcap")
    found = value.new_empty(*query.shape[:2], value.shape[-1])
    start = 0
    for cohort in settings["cohorts"]:
        own = slice(start, start := start + cohort.count)
        at = cohort.on(query.device)
        keys, values = cohort.remember(module.layer_idx, key[own], value[own])
        mask, asked = cohort.mask(settings.get("sliding_window"), query), query[own]
        # Nearly every row has one token; a product over as many as the few longer ones have would be mostly padding.
        found[own][at.firsts] = _weigh(asked[at.firsts][:, None], keys, values, mask[:, :, :1], cap)[:, 0]
        if cohort.most > 1:
            padded = query.new_zeros(len(at.longer), cohort.most - 1, *query.shape[1:])
            padded[at.owner, at.place[at.others] - 1] = asked[at.others]
            weighed = _weigh(padded, keys[at.longer], values[at.longer], mask[at.longer, :, 1:], cap)
            found[own][at.others] = weighed[at.owner, at.place[at.others] - 1]
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
