"""Sparse attention: which positions each token of a sequence may look at. One rule for training and generation.

The planning tokens part a sequence into segments: each starts at the first planning token of a run. A planning token
looks at all that stands before it, any other token at its own segment alone. So whatever a line knows of the question
and of earlier lines has come to it through its block (the planning-token family's rule; arXiv 2310.05707 has the
tokens). What a token may see is a window that ends with itself: one number says it, the first position in it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple

__all__ = ["BEGINNING", "Segment", "segments", "visible_since"]


class Segment(NamedTuple):
    """Where a token's segment starts, and whether the token is a planning token."""

    start: int
    planning: bool

    @property
    def since(self) -> int:
        """The first position that the token may look at."""
        return 0 if self.planning else self.start


BEGINNING = Segment(0, False)


def segments(
    ids: Iterable[int], planning: Collection[int], before: Segment = BEGINNING, place: int = 0
) -> Iterator[Segment]:
    """The segment of each token. `ids` stand from position `place` on, behind a token of the segment `before`."""
    for position, token in enumerate(ids, place):
        own = token in planning
        before = Segment(position if own and not before.planning else before.start, own)
        yield before


def visible_since(ids: Iterable[int], planning: Collection[int]) -> list[int]:
    """For each token the first position that it may look at; the last is its own. `planning`: ids that part segments,
    none of them without sparse attention."""
    return [segment.since for segment in segments(ids, planning)]
