"""Generated ids to lines: where each begins and ends, its kinds and its text. What fits no trace is named.

Every placement has a reader of its own (planning tokens, arXiv 2310.05707, section 3; the placements are those of its
code): blocks before each line, before all of them as a plan, as a plan alone, or none that tell kinds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from memreason.core.trace import ASSIGNMENT, Step
from memreason.encode.scheme import ANSWER, PREFIX

if TYPE_CHECKING:
    from memreason.encode.codec import Codec

__all__ = ["Line", "read_lines"]

Run = list[tuple[str, int, int]]  # of planning tokens: block, place in it, place in the ids
Reader = Callable[["Codec", Sequence[int], list[str]], list["Line"]]


class Line(NamedTuple):
    """One parsed line: its kinds, its text, [first, last + 1] of its ids, and where those of the text begin."""

    kinds: tuple[str, ...]
    text: str
    span: list[int]
    body: int

    def step(self) -> Step:
        return Step(tuple(kind for kind in self.kinds if kind != ASSIGNMENT), self.text)


def read_lines(codec: Codec, ids: Sequence[int], faults: list[str]) -> list[Line]:
    """Lines of a trace's ids (EOS and what follows it gone), the answer's among them; `faults` grows."""
    placement = codec.scheme.placement if codec.blocks else "only_at_front"
    return READERS[placement](codec, ids, faults)


def _tagged(codec: Codec, ids: Sequence[int], faults: list[str]) -> list[Line]:
    """Cut at each run of planning tokens; every run must be a whole prefix and whole kind blocks."""
    lines: list[Line] = []
    position = 0
    while position < len(ids):
        start = position
        run, body = _run(codec, ids, position)
        position = _text_end(codec, ids, body)
        kinds, whole = _kinds(codec, run)
        if not whole:
            faults.append("text outside a block" if not run else "broken block")
        text = codec.decode(ids[body:position]).strip()
        if "\n" in text:
            faults.append("several lines in one block")
        if text or start != body:
            lines.append(Line(kinds, text, [start, position], body))
    return lines


def _run(codec: Codec, ids: Sequence[int], position: int) -> tuple[Run, int]:
    """The run of planning tokens that begins here, and where it ends: separators stand only within it."""
    run: Run = []
    end = position
    while position < len(ids) and (ids[position] in codec.places or (run and ids[position] in codec.separator)):
        if ids[position] in codec.places:
            run.append((*codec.places[ids[position]], position))
            end = position + 1
        position += 1
    return run, end


def _text_end(codec: Codec, ids: Sequence[int], position: int) -> int:
    while position < len(ids) and ids[position] not in codec.places:
        position += 1
    return position


def _kinds(codec: Codec, run: Run) -> tuple[tuple[str, ...], bool]:
    """Kinds of a run of planning tokens, and whether each of its blocks is whole and in order."""
    scheme = codec.scheme
    kinds = tuple(dict.fromkeys(name for name, _, _ in run if name != PREFIX))
    prefix = [(PREFIX, i) for i in range(scheme.n_prefix)]
    expected = prefix + [(kind, i) for kind in kinds for i in range(scheme.n_special)]
    named = [(name, place) for name, place, _ in run]
    return kinds, bool(run) and named == expected and bool(kinds or not scheme.n_special)


def _plain(codec: Codec, ids: Sequence[int], faults: list[str], first: int = 0) -> list[Line]:
    """Without blocks to cut at, a line ends with the token that holds its line break. Words tell its kinds, if any."""
    lines: list[Line] = []
    start = first
    for end, token in enumerate(ids[first:], first + 1):
        if "\n" in codec.decode([token]) or end == len(ids):
            text = codec.decode([i for i in ids[start:end] if i not in codec.places])
            for part in filter(None, map(str.strip, text.split("\n"))):
                kinds, said = codec.scheme.without_words(part)
                lines.append(Line(kinds, said, [start, end], start))
            start = end
    return lines


def _plan(codec: Codec, ids: Sequence[int], faults: list[str]) -> tuple[list[tuple[tuple[str, ...], list[int]]], int]:
    """The plan in front: kinds and [first, last + 1] of each of its lines' blocks, and where it ends.

    A line of the plan begins with each prefix block, which therefore must not be empty.
    """
    run, body = _run(codec, ids, 0)
    starts = [n for n, (name, place, _) in enumerate(run) if (name, place) == (PREFIX, 0)]
    plan = []
    for begin, end in zip(starts, [*starts[1:], len(run)], strict=False):
        kinds, whole = _kinds(codec, run[begin:end])
        if not whole:
            faults.append("broken block")
        plan.append((kinds, [run[begin][2], run[end][2] if end < len(run) else body]))
    if starts[:1] != [0] or not plan or ANSWER not in plan[-1][0]:
        faults.append("plan without an end")
    return plan, body


def _plan_first(codec: Codec, ids: Sequence[int], faults: list[str]) -> list[Line]:
    """All blocks, then the lines that they announce, in order. The answer's is told by its phrase."""
    plan, body = _plan(codec, ids, faults)
    if _text_end(codec, ids, body) != len(ids):
        faults.append("block behind the plan")
    lines = _plain(codec, ids, faults, body)
    if len(plan) != len(lines):
        faults.append("plan of another length")
    announced: list[tuple[str, ...]] = [kinds for kinds, _ in plan if ANSWER not in kinds]
    announced += [()] * (len(lines) - len(announced))
    return [
        line._replace(kinds=(ANSWER,) if line.text.startswith(codec.scheme.answer_lead) else kinds)
        for line, kinds in zip(lines, announced, strict=False)
    ]


def _plan_only(codec: Codec, ids: Sequence[int], faults: list[str]) -> list[Line]:
    """All blocks and the answer: the lines themselves are never written."""
    plan, body = _plan(codec, ids, faults)
    end = _text_end(codec, ids, body)
    if end != len(ids):
        faults.append("block behind the plan")
    steps = [Line(kinds, "", span, span[1]) for kinds, span in plan if ANSWER not in kinds]
    text = codec.decode(ids[body:end]).strip()
    return [*steps, Line((ANSWER,), text, [body, end], body)] if text else steps


READERS: dict[str, Reader] = {
    "each_step": _tagged,
    "only_at_front": _plain,
    "plan_first": _plan_first,
    "plan_only": _plan_only,
}
