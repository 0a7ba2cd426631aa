"""Pieces of traces, texts or ids, to rows of ids: whole chunks of traces go through the tokenizer in one call."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding

__all__ = ["IGNORED", "Apart", "Example", "Part", "Piece", "Rows", "put_together", "take_apart"]

IGNORED = -100
Example = dict[str, list[int]]
Part = str | tuple[int, ...]  # a text that is yet to be encoded, or ids
Piece = tuple[Part, bool]  # and whether it is supervised


class Rows(Sequence[Example]):
    """Examples in flat arrays, 5 bytes a token: a row becomes lists of ints only when it is taken.

    `ids` (int32) and `supervised` (bool) hold the rows one after another, `lengths` (int64) the tokens of each, `since`
    (int32) the first position that each may look at, where its row's ids alone do not say it (sparse.py).
    """

    def __init__(
        self,
        ids: NDArray[np.int32],
        supervised: NDArray[np.bool_],
        lengths: NDArray[np.int64],
        since: NDArray[np.int32] | None = None,
    ) -> None:
        self.ids, self.supervised, self.lengths, self.since = ids, supervised, lengths, since
        self.starts = np.cumsum(lengths) - lengths

    @classmethod
    def none(cls) -> Rows:
        return cls(np.empty(0, np.int32), np.empty(0, np.bool_), np.empty(0, np.int64))

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        span = slice(self.starts[index], self.starts[index] + self.lengths[index])
        ids = self.ids[span]
        row = {"input_ids": ids.tolist(), "labels": np.where(self.supervised[span], ids, IGNORED).tolist()}
        return row if self.since is None else {**row, "since": self.since[span].tolist()}


class Apart(NamedTuple):
    """Rows of pieces, taken apart: their different parts, each once, and which of them stand in which row."""

    parts: list[Part]
    order: NDArray[np.int64]  # of every piece of every row: the number of its part
    supervised: NDArray[np.bool_]  # of every piece
    counts: NDArray[np.int64]  # pieces of each row

    @property
    def texts(self) -> list[str]:
        return [part for part in self.parts if isinstance(part, str)]


def take_apart(rows: Iterable[Iterable[Piece]]) -> Apart:
    """Number the parts of some rows: a line that comes again is encoded once."""
    numbers: dict[Part, int] = {}
    order: list[int] = []
    supervised: list[bool] = []
    ends = [0]
    for row in rows:
        for part, taught in row:
            order.append(numbers.setdefault(part, len(numbers)))
            supervised.append(taught)
        ends.append(len(order))
    return Apart(list(numbers), np.array(order), np.array(supervised), np.diff(ends))


def put_together(apart: Apart, encodings: Iterable[Encoding]) -> Rows:
    """The rows, given what became of `apart.texts`."""
    encoded = iter(encodings)
    sources = [next(encoded) if isinstance(part, str) else part for part in apart.parts]
    sizes = np.fromiter(map(len, sources), np.int64, len(sources))
    # A list of ids lives only until it is copied: thousands of them at once cost as much as encoding does.
    lists = (source if isinstance(source, tuple) else source.ids for source in sources)
    known = np.fromiter(chain.from_iterable(lists), np.int32, sizes.sum())
    lengths = sizes[apart.order]
    ends = np.cumsum(lengths)
    # Where a piece stands among the known ids, less where it comes to stand in the rows.
    moved = (np.cumsum(sizes) - sizes)[apart.order] - (ends - lengths)
    ids = known[np.arange(ends[-1]) + np.repeat(moved, lengths)]
    firsts = np.cumsum(apart.counts) - apart.counts
    return Rows(ids, np.repeat(apart.supervised, lengths), np.add.reduceat(lengths, firsts))
