"""Checks of a labelled trace: a table of named pure functions, each of which says what is wrong, or nothing.

A trace that fails one is not kept. The reason is told to the teacher, so it says what to do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from memreason.core.labelling import ChecksRecipe
from memreason.core.trace import LETTERS, MEMORY, REASON, Question, Step, Trace

__all__ = ["CHECKS", "Draft", "problems", "problems_of"]

Problem = tuple[str, str]  # the check's name, the reason


@dataclass(frozen=True)
class Draft:
    """A trace as the teacher wrote it: (kind, text) of each line, unchanged, and an answer."""

    question: Question
    lines: tuple[tuple[str, str], ...]
    answer: str
    left_out: int = 0  # lines whose kind is unknown

    def trace(self, **meta: Any) -> Trace:
        return Trace(self.question, tuple(Step((kind,), text) for kind, text in self.lines), meta=meta)


BREAK = re.compile(r"[\n\r\v\f\x85\u2028\u2029]")
CERTAIN = 0.99  # probability of a language
PARTICLE = re.compile(r"\b[^\W\dA-Z_]{2,3}\b")
WORD = re.compile(r"[^\W_]")
# Written without spaces: there every sign counts as a word.
TERM = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\u0e00-\u0e7f]|[^\W_\u3040-\u30ff\u3400-\u9fff\u0e00-\u0e7f]+")
COMMON = frozenset(
    re.findall(
        r"\w+",
        """about above after also because been being both cannot could does each from given have here hence into
        more most much must only other over same should since some such than that their them then there
        therefore these they this those through thus under upon very were what when where which while whom whose
        will with within without would your answer question statement correct true false""",
    )
)
GIVEN_AWAY = (
    r"\banswer\b[^.?!]{0,40}?\b(?:is|are|would be|must be|should be)\b|\banswer\s*:",
    r"\b(?:correct|incorrect|right|wrong|best)\s+(?:answer|choice|option)\b",
    r"\b(?:statement|claim|option|choice)\b[^.?!]{0,40}?\b(?:is|are)\s+(?:true|false|correct|incorrect|wrong|right)\b",
    r"^\W*(?:true|false|yes|no)\b\s*[,.:;!]",
)
LETTERED = r"\b(?:[Oo]ption|[Cc]hoice|[Aa]nswer|[Ll]etter)\s*\(?[{0}]\b|\([{0}]\)|^\W*[{0}][).:]\s"


def _kinds(draft: Draft, limits: ChecksRecipe) -> Iterator[str]:
    for kind in (MEMORY, REASON):
        if all(kind != one for one, _ in draft.lines):
            yield f"there is no {kind} step; write at least one of each kind"


def _empty(draft: Draft, limits: ChecksRecipe) -> Iterator[str]:
    for number, (_, text) in enumerate(draft.lines, 1):
        if not WORD.search(text):
            yield f"step {number} is empty"


def _duplicate(draft: Draft, limits: ChecksRecipe) -> Iterator[str]:
    seen: dict[str, int] = {}
    for number, (_, text) in enumerate(draft.lines, 1):
        plain = " ".join(re.findall(r"\w+", text.casefold()))
        if plain and (first := seen.setdefault(plain, number)) != number:
            yield f"steps {first} and {number} say the same; say each thing once"


def _one_line(draft: Draft, limits: ChecksRecipe) -> Iterator[str]:
    for number, (_, text) in enumerate(draft.lines, 1):
        if BREAK.search(text.strip()):
            yield f"step {number} holds a line break; each step is one line"


def _gives_away(draft: Draft, limits: ChecksRecipe) -> Iterator[str]:
    letters = LETTERS[: len(draft.question.choices or ())]
    lettered = re.compile(LETTERED.format(letters)) if letters else None
    for number, (kind, text) in enumerate(draft.lines, 1):
        found = kind == MEMORY and (_give_away().search(text) or (lettered and lettered.search(text)))
        if found:
            yield f"memory step {number} gives the answer away ({found[0].strip()!r}); a memory step only states a fact"


@cache
def _give_away() -> re.Pattern[str]:
    return re.compile("|".join(GIVEN_AWAY), re.IGNORECASE)


def _uses_above(draft: Draft, limits: ChecksRecipe) -> Iterator[str]:
    above = _terms(" ".join([draft.question.text, *(draft.question.choices or ())]))
    for number, (kind, text) in enumerate(draft.lines, 1):
        terms = _terms(text)
        if kind == REASON and terms and not terms & above:
            yield f"reason step {number} uses nothing that stands above it; draw it from earlier steps"
        above |= terms


def _terms(text: str) -> set[str]:
    """Words that carry content, cut to five letters so that "capital" and "capitals" meet; numbers whole."""
    words = (word for word in TERM.findall(text.casefold()) if word not in COMMON)
    return {word[:5] for word in words if len(word) > 3 or not word.isascii() or word.isdigit() or len(word) == 1}


def _length(draft: Draft, limits: ChecksRecipe) -> Iterator[str]:
    count = len(draft.lines)
    if not limits.min_steps <= count <= limits.max_steps:
        yield f"there are {count} steps; write {limits.min_steps} to {limits.max_steps}"
    for number, (_, text) in enumerate(draft.lines, 1):
        if len(text) > limits.max_characters:
            yield f"step {number} has {len(text)} characters; at most {limits.max_characters} are allowed"


def _language(draft: Draft, limits: ChecksRecipe) -> Iterator[str]:
    """Only where both are told for certain: names and formulas have no language."""
    said = " ".join(text for _, text in draft.lines)
    if len(_particles(draft.question.text) & _particles(said)) > 1:
        return  # "of", "the", "is": nearly always so, and a hundred times faster
    asked, sure = _language_of(draft.question.text)
    told, sure_too = _language_of(said) if sure > CERTAIN else (asked, 0.0)
    if asked != told and sure_too > CERTAIN:
        yield f"the steps are in {told!r}, the question is in {asked!r}; use the language of the question"


def _particles(text: str) -> set[str]:
    """Words of two or three small letters: names begin with a capital."""
    return set(PARTICLE.findall(text))


def _language_of(text: str) -> tuple[str, float]:
    language, probability = _identifier().classify(text[:200])  # enough to tell; a whole trace takes 2 ms
    return str(language), float(probability)


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


CHECKS: dict[str, Callable[[Draft, ChecksRecipe], Iterator[str]]] = {
    "kinds": _kinds,
    "empty": _empty,
    "duplicate": _duplicate,
    "one_line": _one_line,
    "gives_away": _gives_away,
    "uses_above": _uses_above,
    "length": _length,
    "language": _language,
}


def problems_of(draft: Draft, limits: ChecksRecipe) -> list[Problem]:
    """Everything that is wrong with a draft, less the checks that the recipe leaves out."""
    names = [name for name in CHECKS if name not in limits.skip]
    return [(name, reason) for name in names for reason in CHECKS[name](draft, limits)]


def problems(trace: Trace, limits: ChecksRecipe | None = None) -> list[Problem]:
    """The same of a trace that is there already. Of a line of several kinds the first counts."""
    lines = tuple((step.kinds[0] if step.kinds else "", step.text) for step in trace.steps)
    return problems_of(Draft(trace.question, lines, trace.answer), limits or ChecksRecipe())
