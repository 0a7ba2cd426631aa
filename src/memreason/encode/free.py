"""Free answers: what a model that nobody trained for it writes, read line by line.

Its answer stands behind the last phrase that announces one ("The answer is", "Answer:"), or, without any, in a line of
its own that holds nothing else; a reply may also begin with it ("No, ..."). What stands in the middle of a sentence is
no answer (as in measure/reading.py).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from memreason.core.trace import LETTERS, Question, Trace
from memreason.encode.lines import Line, read_lines

if TYPE_CHECKING:
    from memreason.encode.codec import Codec

__all__ = ["PHRASE", "answers_of", "is_over", "parse_free", "reply_end", "says_answer"]

PHRASE = re.compile(  # the first half is measure/reading.py's
    r"\bthe\s+(?:(?:final|correct|right|best)\s+)?answer\s+is\b\s*[*_]*\s*[:：]?|^\W*(?:final\s+)?answer\W*[:：]",
    re.IGNORECASE,
)
BARE = re.compile(r"\W*(true|false|yes|no|[-−]?[$€£]?\d[\d,]*(?:\.\d+)?%?)\W*", re.IGNORECASE)
FIRST_WORD = re.compile(r"\W*(true|false|yes|no)\s*[,.;:]", re.IGNORECASE)
TAIL = 32  # tokens in which a new question's first words are looked for


def is_over(codec: Codec, ids: Sequence[int]) -> bool:
    """Whether an answer has ended without EOS: its turn has, or it goes on with a question of its own."""
    if ids[-1] in codec.turn_ends:
        return True
    lead = codec.scheme.question_lead
    return bool(lead) and f"\n{lead}" in codec.decode(ids[-TAIL:])


def _own_lines(codec: Codec, ids: Sequence[int], faults: list[str]) -> tuple[list[Line], int]:
    """The lines of a reply up to its end or to a question of its own, and where that is."""
    stops = {codec.eos_id, *codec.turn_ends}
    end = next((place for place, token in enumerate(ids) if token in stops), len(ids))
    lines = read_lines(codec, ids[:end], faults)
    lead = codec.scheme.question_lead
    for number, line in enumerate(lines):
        if lead and line.text.startswith(lead):
            return lines[:number], line.span[0]
    return lines, end


def reply_end(codec: Codec, ids: Sequence[int]) -> int:
    """Where a reply has ended: before EOS, before its turn's end, or before a question of its own."""
    return _own_lines(codec, ids, [])[1]


def answers_of(question: Question) -> Sequence[str]:
    """The answers that a question has, if they are a list: its choices' letters, or True and False."""
    if question.choices:
        return LETTERS[: len(question.choices)]
    return ("True", "False") if question.answer in ("True", "False") else ()


def says_answer(question: Question, prediction: str | None) -> bool:
    """Whether a prediction names one of the question's answers (any text does where there is no list)."""
    if not prediction or not answers_of(question):
        return bool(prediction)
    said = FIRST_WORD.match(prediction) if not question.choices else None
    return bool(said or _alone(question, prediction))


def parse_free(codec: Codec, question: Question, ids: Sequence[int]) -> Trace:
    """Lines before the answer are steps without kinds (unless the scheme's words name some)."""
    faults: list[str] = []
    lines, end = _own_lines(codec, ids, faults)
    if end == len(ids):
        faults.append("no end of sequence")
    steps, prediction = _announced(lines) or _bare(question, lines)
    prediction = _alone(question, prediction) or prediction  # "Kenya (B)" is B
    if not prediction:
        faults.append("no answer line")
    meta = {"spans": [line.span for line in steps], "bodies": [line.body for line in steps]}
    return Trace(question, tuple(line.step() for line in steps), prediction, tuple(faults), meta)


def _announced(lines: Sequence[Line]) -> tuple[list[Line], str] | None:
    """The lines up to the last phrase, and what stands behind it, if need be in the next line."""
    place = max((n for n, line in enumerate(lines) if PHRASE.search(line.text)), default=None)
    if place is None:
        return None
    line = lines[place]
    *_, phrase = PHRASE.finditer(line.text)
    before = line.text[: phrase.start()].strip()
    steps = [*lines[:place], *([line._replace(text=before)] if re.search(r"\w\W+\w", before) else [])]
    following = lines[place + 1].text if place + 1 < len(lines) else ""
    return steps, _clean(line.text[phrase.end() :]) or _clean(following)


def _clean(text: str) -> str:
    return text.lstrip(" *_`:").rstrip(" *_`.")


def _bare(question: Question, lines: Sequence[Line]) -> tuple[list[Line], str]:
    """An answer in a first or last line of its own; "" where lines of this sort differ."""
    found = [(n, answer) for n, line in enumerate(lines) if (answer := _alone(question, line.text))]
    if not found and not question.choices and lines and (said := FIRST_WORD.match(lines[0].text)):
        return list(lines), said[1]  # "No, Lima is the capital of Peru."
    if len({answer.casefold() for _, answer in found}) == 1 and found[-1][0] in (0, len(lines) - 1):
        return list(lines[: found[0][0]]), found[0][1]
    return list(lines), ""


def _alone(question: Question, text: str) -> str:
    """The answer that a line is, and nothing else: yes or no, a number, or a choice by letter, by text or by both."""
    if not question.choices:
        matched = BARE.fullmatch(text)
        return matched[1] if matched else ""
    words = re.findall(r"\w+", text.casefold())
    for letter, choice in zip(LETTERS, question.choices, strict=False):
        named, spelled = [letter.casefold()], re.findall(r"\w+", choice.casefold())
        if words in (named, spelled, named + spelled, spelled + named):
            return letter
    return ""
