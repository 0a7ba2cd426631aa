"""Extract and compare answers: pure functions on generated text; a Score carries its evidence.

Only the generated part is read, never the prompt. A letter that stands anywhere without the answer's
phrase is not an answer: the published rule takes it for one (arXiv 2411.13504, its evaluation code).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from memreason.core.trace import LETTERS, Question, Trace

__all__ = ["Score", "answer_kind", "chance", "majority", "score", "score_trace"]

Kind = Literal["truth", "letter", "text"]
PHRASE = re.compile(r"the\s+(?:final\s+|correct\s+)?answer\s+is\b\s*:?", re.IGNORECASE)
WRAPPING = " \t\n*_`\"'“”‘’([{"
TRUTH = {"true": "True", "yes": "True", "false": "False", "no": "False"}


@dataclass(frozen=True)
class Score:
    """A verdict, the answer that was found, the rule that found it, and the text that it read."""

    verdict: Literal["correct", "wrong", "no_answer"]
    extracted: str | None
    rule: str
    evidence: str


def answer_kind(question: Question) -> Kind:
    """What a reply must give, told by the gold answer and the choices."""
    if question.answer.lower() in TRUTH and not question.choices:
        return "truth"
    if len(question.answer) == 1 and question.answer in LETTERS:
        return "letter"
    return "text"


def _truth(text: str, choices: int) -> str | None:
    found = re.match(r"(true|yes|false|no)\b", text, re.IGNORECASE)
    return TRUTH[found[1].lower()] if found else None


def _letter(text: str, choices: int) -> str | None:
    found = re.match(r"(?:option|choice)?\s*\(?([A-Za-z])(?![A-Za-z'’])", text)
    if not found or (found[1].islower() and not re.fullmatch(r"[a-z][).\s]*", text.strip())):
        return None  # "a bank" begins with an article, not with a letter of a choice
    letter = found[1].upper()
    return letter if letter in LETTERS[:choices] else None


def _text(text: str, choices: int) -> str | None:
    return text.strip().rstrip(".").strip() or None


EXTRACT = {"truth": _truth, "letter": _letter, "text": _text}


def score(text: str, gold: str, *, kind: Kind, choices: int = 26, bare: bool = False) -> Score:
    """Score generated text against gold. `bare`: the text is the answer itself, without the phrase.

    The last "The answer is" counts; without it, or without a usable answer behind it: no_answer.
    """
    phrases = list(PHRASE.finditer(text))
    if phrases:
        tail, rule = text[phrases[-1].end() :], "last phrase"
    elif bare and text.strip():
        tail, rule = text, "answer line"
    else:
        return Score("no_answer", None, "no phrase", text[-80:])
    evidence = tail.lstrip(WRAPPING).split("\n")[0].strip()
    found = EXTRACT[kind](evidence, choices)
    if found is None:
        return Score("no_answer", None, f"{rule}, no {kind} behind it", evidence)
    same = found.casefold() == gold.strip().rstrip(".").casefold()
    return Score("correct" if same else "wrong", found, rule, evidence)


def score_trace(trace: Trace) -> Score:
    """Score a generated trace by its answer line."""
    question = trace.question
    return score(
        trace.prediction or "",
        question.answer,
        kind=answer_kind(question),
        choices=len(question.choices) if question.choices else 26,
        bare=True,
    )


def chance(questions: Sequence[Question]) -> float:
    """Expected accuracy of a blind guess: the mean of one over the number of options."""
    options = {"truth": lambda q: 2, "letter": lambda q: len(q.choices or LETTERS), "text": lambda q: 0}
    counts = [options[answer_kind(question)](question) for question in questions]
    return sum(1 / count for count in counts if count) / max(1, len(counts))


def majority(questions: Sequence[Question]) -> float:
    """Accuracy of always giving the commonest gold answer."""
    answers = Counter(question.answer for question in questions)
    return max(answers.values()) / len(questions) if questions else 0.0
