"""What each token of a generated trace belongs to: the question, a line's block or its text, the answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from memreason.core.trace import MEMORY, REASON, Question, Trace
from memreason.encode.codec import Codec
from memreason.encode.scheme import ANSWER, PREFIX

__all__ = ["FIRST", "LEARNT", "NO_LINE", "QUESTION", "Part", "in_order", "segments"]


class Part(NamedTuple):
    """A segment: what it is (a line's kind, `question`, `answer` …), which of them (0: any), its block or its text."""

    kind: str
    line: int = 0
    block: bool = False

    @property
    def name(self) -> str:
        return f"{self.kind}{f' {self.line}' if self.line else ''}{' block' if self.block else ''}"

    def of_kind(self) -> Part:
        return self._replace(line=0)


FIRST = Part("first token")  # draws attention whatever it says (arXiv 2309.17453), and so stands apart
LEARNT = Part("learnt prompt")
QUESTION = Part("question")
OTHER = Part("other")  # what fits no line, or stands behind the answer
NO_LINE = (FIRST, LEARNT, QUESTION, OTHER)
ORDER = (FIRST, LEARNT, QUESTION, Part(PREFIX, block=True))


def segments(codec: Codec, question: Question, ids: Sequence[int], *, learnt: int = 0) -> tuple[list[int], list[Part]]:
    """Ids of question and trace, without the end of sequence, which looks at all and says nothing; and their parts.

    With `learnt` virtual tokens, which have no ids, there are so many parts more in front.
    """
    made = list(ids[: ids.index(codec.eos_id)] if codec.eos_id in ids else ids)
    asked = codec.question_ids(question)
    parts = [LEARNT] * learnt + [QUESTION] * len(asked) + _trace_parts(codec, question, made)
    return asked + made, [FIRST, *parts[1:]]


def _trace_parts(codec: Codec, question: Question, ids: list[int]) -> list[Part]:
    trace, counts = codec.parse(question, ids), Counter[str]()
    parts = [OTHER] * len(ids)
    for step, (first, end), body in zip(trace.steps, trace.meta["spans"], trace.meta["bodies"], strict=True):
        kind = "+".join(step.kinds) or "line"
        counts[kind] += 1
        parts[first:body] = [Part(kind, counts[kind], block=True)] * (body - first)
        parts[body:end] = [Part(kind, counts[kind])] * (end - body)
    first, body, end = _answer_line(codec, trace, ids)
    parts[first:body] = [Part(ANSWER, block=True)] * (body - first)
    parts[body:end] = [Part(ANSWER)] * (end - body)
    if codec.scheme.placement == "only_at_front":
        parts[: len(codec.opening())] = [Part(PREFIX, block=True)] * len(codec.opening())
    if codec.scheme.placement == "plan_first":
        planned = min((start for start, _ in trace.meta["spans"]), default=first)
        parts[:planned] = [Part(PREFIX, block=True)] * planned
    return parts


def _answer_line(codec: Codec, trace: Trace, ids: list[int]) -> tuple[int, int, int]:
    """Where the answer line begins (behind the last step), where its text does, and where it ends."""
    planning = {i for block in codec.blocks.values() for i in block}
    named = set() if codec.scheme.placement == "plan_first" else set(codec.blocks.get(ANSWER, ()))
    first, size = max((end for _, end in trace.meta["spans"]), default=0), len(ids)
    at = next((n for n in range(first, size) if ids[n] in named), size) if named else first
    if at == size or not (named or trace.prediction):
        return first, first, first
    body = next((n for n in range(at, size) if ids[n] not in planning | set(codec.separator)), size)
    end = next((n for n in range(body, size) if ids[n] in planning), size)
    if codec.blocks and codec.scheme.placement == "each_step":
        return first, body, end
    broken = (n + 1 for n in range(body, end) if "\n" in codec.decode([ids[n]]) and codec.decode(ids[body:n]).strip())
    return first, body, next(broken, end)


def in_order(parts: Iterable[Part]) -> list[Part]:
    """Each part once: what is asked, then memory, reason and other kinds, each behind its block, then the answer."""
    found = list(dict.fromkeys(parts))
    kinds = list(dict.fromkeys([MEMORY, REASON, *(part.kind for part in found)]))
    last = {ANSWER: 1, OTHER.kind: 2}

    def place(part: Part) -> tuple[int, ...]:
        if part in ORDER:
            return (-1, ORDER.index(part))
        return (last.get(part.kind, 0), kinds.index(part.kind), part.line, not part.block)

    return sorted(found, key=place)
