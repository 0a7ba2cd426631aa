"""Memory from outside: the text of a memory line that the model wrote is replaced by what a search finds for it.

A row stops when it has written a memory line that it is unsure of. The line's block stays; the text behind it
becomes the passage's, encoded as any text of a user's is (law 1), and the model goes on from there, its own line gone.
Rows that stopped wait until they are a quarter of those in flight: one search, and one pass over their prompts, for all
of them. A line that stays is never touched, so that a trace without retrieved lines is the recalled one.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import cache, partial
from typing import Any, NamedTuple

from memreason.core.errors import ModelError
from memreason.core.stages import EvalRecipe
from memreason.core.trace import MEMORY, Question
from memreason.encode.codec import Codec
from memreason.encode.scheme import PREFIX
from memreason.generate.choose import Taken
from memreason.generate.decode import decode
from memreason.generate.rows import Engine, Retrieved, Row, Until

__all__ = ["FLOOR", "Found", "Search", "is_unsure", "retrieving", "sureness"]

FLOOR = -20.0  # log-probability of a token that has none, and the least that a token counts with
LINE_TOKENS = 64  # of a retrieved line; what is longer is cut

Found = tuple[str, str]  # id and text of the passage that replaces a line
Search = Callable[[Sequence[tuple[Question, str]]], Sequence[Found | None]]  # model's own lines -> None: the line stays


class _Line(NamedTuple):
    """A memory line that a row has just completed: where its text begins in the row's ids, and the text."""

    begin: int
    text: str
    sureness: float


def sureness(logprobs: Sequence[float | None]) -> float:
    """Mean log-probability of a line's text. A missing token (None, nan) counts with FLOOR, as does a line of none."""
    known = [FLOOR if value is None or math.isnan(value) else max(FLOOR, value) for value in logprobs]
    return sum(known) / len(known) if known else FLOOR


def is_unsure(sure: float, threshold: float) -> bool:
    """Two-way softmax of a line's sureness against the threshold: exp(sure) / (exp(sure) + exp(threshold)) < 0.5."""
    over = max(-30.0, min(30.0, sure - threshold))  # infinite thresholds too
    return 1 / (1 + math.exp(-over)) < 0.5


def retrieving(search: Search, threshold: float, *, precede: bool = False) -> Engine:
    """Decoding in which `search` replaces memory lines whose sureness is below the threshold (infinite: all of them),
    or, to `precede` them, puts a line of what it found before each and lets the model write its own anew.

    Raises ModelError for a scheme without memory blocks.
    """
    return partial(_passes, search, threshold, precede)


def _passes(
    search: Search,
    threshold: float,
    precede: bool,
    model: Any,
    codec: Codec,
    waiting: deque[Row],
    settings: EvalRecipe,
    more: Callable[[], bool] | None = None,
) -> Iterator[list[Row]]:
    """As `decode`. With `more` somebody watches: what is to be looked up does not wait for others."""
    read = _reader(codec, threshold)
    behind = codec.block(PREFIX, MEMORY) if precede else ()
    enough = settings.batch_size if more is None else 1
    ready: deque[Row] = deque()
    stopped: list[tuple[Row, _Line]] = []
    finished: list[Row] = []

    def begin() -> None:
        while waiting:
            row = waiting.popleft()
            row.until = partial(_stops, read, row, row.until)
            ready.append(row)

    def resume() -> bool:
        found = search([(row.question, line.text) for row, line in stopped]) if stopped else ()
        for (row, line), one in zip(stopped, found, strict=True):
            _put(codec, row, line, one, behind)
            row.pending, row.fed, row.drafted = row.prompt + row.ids, 0, 0
            (finished.append if row.over(codec.eos_id) else ready.appendleft)(row)
        stopped.clear()
        begin()
        return bool(ready)

    def again() -> bool:
        return resume() or bool(more and more() and resume())

    begin()
    with closing(decode(model, codec, ready, settings, again)) as passes:  # it holds the model till then
        for ended in passes:
            for row in ended:
                line = read(row) if len(row.ids) < row.limit else None
                stopped += [(row, line)] if line else []
                finished += [] if line else [row]
            if len(stopped) * 4 >= enough:
                resume()
            yield [*finished]
            finished.clear()
            begin()
    yield finished


def _stops(read: Callable[[Row], _Line | None], row: Row, before: Until | None, ids: Sequence[int]) -> bool:
    return bool(before and before(ids)) or read(row) is not None


def _reader(codec: Codec, threshold: float) -> Callable[[Row], _Line | None]:
    """Reads the unsure memory line that a row's last token completes: a line break, or what can only follow one."""
    block, opening = list(codec.block(PREFIX, MEMORY)), codec.opening()
    if not codec.blocks.get(MEMORY):
        raise ModelError("eval.memory: this model's lines carry no memory blocks, so none can be retrieved")
    planning = {token for tokens in codec.blocks.values() for token in tokens}
    breaks = cache(lambda token: "\n" in codec.decode([token]))

    def read(row: Row) -> _Line | None:
        ids, last = row.ids, row.ids[-1]
        end = len(ids) if breaks(last) else len(ids) - 1
        if end < len(ids) and last not in planning and last != codec.eos_id:
            return None
        begin = next((n for n in range(end, 0, -1) if ids[n - 1] in planning), 0)
        known = any(begin in (one.place, one.end) for one in row.retrieved)  # and the model's own behind a passage
        if known or (opening + ids[:begin])[-len(block) :] != block or any(map(breaks, ids[begin : len(ids) - 1])):
            return None
        text, sure = codec.decode(ids[begin:end]).strip(), sureness([one.logprob for one in row.taken[begin:end]])
        return _Line(begin, text, sure) if text and is_unsure(sure, threshold) else None

    return read


def _put(codec: Codec, row: Row, line: _Line, found: Found | None, behind: Sequence[int]) -> None:
    """Put a passage in place of a line, if one was found, and `behind` it what opens the next line."""
    text = " ".join(found[1].split()) if found else ""
    if found and text:
        body = [*_encode(codec, text), *behind]
        row.ids[line.begin :] = body
        row.taken[line.begin :] = [Taken(token, math.nan, math.nan, math.nan) for token in body]
        del row.ids[row.limit :], row.taken[row.limit :]
        row.retrieved.append(Retrieved(line.begin, line.begin + len(body), found[0], line.text, line.sureness))


def _encode(codec: Codec, text: str) -> list[int]:
    """Ids of a line's text; a longer one than LINE_TOKENS ends with the last whole word before."""
    ids = codec.encode(codec.scheme.line_text(text))
    if len(ids) <= LINE_TOKENS:
        return ids
    kept = codec.decode(codec.encode(" " + text)[: LINE_TOKENS - 1]).strip()
    words, _, _ = kept.rpartition(" ")
    return codec.encode(codec.scheme.line_text(words or kept))
