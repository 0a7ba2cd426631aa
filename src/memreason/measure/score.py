"""Compare answers: pure functions on generated text; a Score carries its evidence.

Only the generated part is read, never the prompt; how an answer is read: reading.py.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from memreason.core.trace import LETTERS, Question, Trace
from memreason.measure.formula import same_value
from memreason.measure.reading import ANSWER_LINE, NUMBER, READERS, RULES, TRUTH, Kind, Rule, read_answer

__all__ = ["Kind", "Score", "chance", "majority", "question_kind", "score", "score_trace"]


@dataclass(frozen=True)
class Score:
    """A verdict, the answer that was found, the rule that found it, and the span that it read."""

    verdict: Literal["correct", "wrong", "no_answer"]
    extracted: str | None
    rule: str
    evidence: str


def _kind(gold: str, choices: int | None) -> Kind:
    gold = gold.strip()
    if choices and len(gold) == 1 and gold.upper() in LETTERS:
        return "letter"
    if gold.casefold() in TRUTH:
        return "truth"
    found = NUMBER.match(gold)
    return "number" if found and not gold[found.end() :].strip(" %.") else "text"


def question_kind(question: Question) -> Kind:
    """What a reply must give, told by the gold answer and the choices; on MATH always a formula."""
    if question.task == "math":
        return "formula"
    return _kind(question.answer, len(question.choices or ()) or None)


def _same(found: str, gold: str, kind: Kind) -> bool:
    """Compare without case, outer marks and, in a text, a leading article (as SQuAD does, arXiv 1606.05250)."""
    if kind == "formula":
        return same_value(found, gold)
    read = READERS[kind](gold.strip(), len(LETTERS))
    wanted = read[0] if read else gold.strip()
    if kind == "number" and read:
        return Fraction(found) == Fraction(wanted)
    bare = [re.sub(r"^(?:the|an?)\s+(?=\w)", "", value.casefold()) for value in (found, wanted)]
    return bare[0] == bare[1] if kind == "text" else found == wanted


def _outer(text: str) -> str:
    return text.strip(" .*_$:`\"'").casefold()


def _score(text: str, gold: str, choices: int | None, kind: Kind, rules: tuple[Rule, ...]) -> Score:
    found = read_answer(text, kind, choices, rules)
    if found.answer is None:
        return Score("no_answer", None, found.rule, found.evidence)
    # Gold in brackets, "(1,2)" or "\\text{(C)}": what was taken for wrapping belongs to the answer.
    whole = kind == "text" and _outer(found.line) == _outer(gold)
    verdict: Literal["correct", "wrong"] = "correct" if whole or _same(found.answer, gold, kind) else "wrong"
    return Score(verdict, found.answer, found.rule, found.evidence)


def score(text: str, gold: str, *, choices: int | None = None, answer_kind: Kind | None = None) -> Score:
    """Score generated text (never the prompt) against gold.

    `choices` is how many there are; a letter beyond them is no answer. `answer_kind` is told by gold
    if None. The last "The answer is:" counts; without it, without a usable answer behind it, or with
    several different ones: no_answer.
    """
    return _score(text, gold, choices, answer_kind or _kind(gold, choices), RULES)


def score_trace(trace: Trace) -> Score:
    """Score a generated trace by its prediction, the content of its answer line."""
    question = trace.question
    choices = len(question.choices) if question.choices else None
    return _score(trace.prediction or "", question.answer, choices, question_kind(question), ANSWER_LINE)


def _options(question: Question) -> int:
    """How many answers a blind guess chooses from; 0 where there is no list."""
    if question_kind(question) == "truth":
        return 2
    return len(question.choices or LETTERS) if question_kind(question) == "letter" else 0


def chance(questions: Sequence[Question]) -> float:
    """Expected accuracy of a blind guess: the mean of one over the number of options."""
    counts = [_options(question) for question in questions]
    return sum(1 / count for count in counts if count) / max(1, len(counts))


def majority(questions: Sequence[Question]) -> float:
    """Accuracy of always giving the commonest gold answer."""
    answers = Counter(question.answer for question in questions)
    return max(answers.values()) / len(questions) if questions else 0.0
