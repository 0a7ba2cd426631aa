"""Extract and compare answers: pure functions on generated text; a Score carries its evidence.

Only the generated part is read, never the prompt. A letter that stands anywhere without the answer's
phrase is not an answer: the published rule takes it for one (evaluation code of arXiv 2411.13504).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from memreason.core.trace import LETTERS, Question, Trace

__all__ = ["Kind", "Score", "chance", "majority", "question_kind", "score", "score_trace"]

Kind = Literal["truth", "letter", "number", "text"]
Found = tuple[str, int]  # what was read, and where in the line it ends
Reader = Callable[[str, int], Found | None]

TRUTH = {"true": "True", "yes": "True", "false": "False", "no": "False"}
PHRASE = re.compile(r"\bthe\s+(?:(?:final|correct|right|best)\s+)?answer\s+is\b\s*[*_]*\s*[:：]?", re.IGNORECASE)
WRAPPING = re.compile(r"""(?:\\boxed|\\text|[\s*_$`"'“”‘’(\[{])*""")
LINE = re.compile(r"(?:(?!</?\w+>|<\|\w+\|>)[^\n])*")  # up to a line break or a token such as </s>

# "no longer", "no one" deny something else; they do not say no.
TRUTH_WORD = re.compile(
    r"(true|yes|false|no)\b(?!\s+(?:longer|one|more|less|doubt|matter|idea|comment)\b)", re.IGNORECASE
)
# An upper-case letter may stand alone or before a choice's text, but not in a word, "I'm", "A-level", "C++" or "D.C.".
# A lower-case one needs a mark or nothing behind it: "a bank" begins with an article, "e.g." is no choice.
LETTER = re.compile(
    r"""(?P<named>(?:option|choice|letter|Option|Choice|Letter)\s+)?[*_"'“‘(\[]*
    (?P<letter>[A-Z](?!\w|['’-]\w|\.\w\.|\+|\#) | [a-z](?=\W*$|[)\].:*"'’](?!\w)))""",
    re.VERBOSE,
)
# Bare "A" and "I" may be an article and a pronoun: then only these words may follow ("A because ...").
WORDS = re.compile(r"\s+(?!(?:because|since|as|is|which|and|or|for)\b)\w")
NUMBER = re.compile(
    r"(?:(?:about|approximately|exactly)\s+)?(?P<sign>[-−]?)\s*[$€£]?\s*(?P<whole>\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
    r"(?P<part>\.\d+)?(?:\s*/\s*(?P<below>0*[1-9]\d*))?(?![\d.]*\w)",
    re.IGNORECASE,
)
# What joins two answers. A comma joins only if the second one ends the line: "B, as A is too small" has one.
JOIN = re.compile(r"\W{0,3}?\s*(?:(?P<comma>,)|/|&|\bor\b|\band\b)\s*(?:not\s+)?", re.IGNORECASE)
END = re.compile(r"\W*(?:$|(?:and|or)\b)")


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
    """What a reply must give, told by the gold answer and the choices."""
    return _kind(question.answer, len(question.choices or ()) or None)


def _truth(line: str, choices: int) -> Found | None:
    found = TRUTH_WORD.match(line)
    return (TRUTH[found[1].lower()], found.end()) if found else None


def _letter(line: str, choices: int) -> Found | None:
    found = LETTER.match(line)
    if not found or (not found["named"] and found["letter"] in "AI" and WORDS.match(line, found.end())):
        return None
    letter = found["letter"].upper()
    return (letter, found.end()) if letter in LETTERS[:choices] else None


def _number(line: str, choices: int) -> Found | None:
    start = line.rfind("=") + 1  # of "3 * 5 = 15" the right side
    start += len(line[start:]) - len(line[start:].lstrip(" *_$`"))
    found = NUMBER.match(line, start)
    if not found:
        return None
    value = ("-" if found["sign"] else "") + found["whole"].replace(",", "") + (found["part"] or "")
    return (str(Fraction(value) / int(found["below"])) if found["below"] else value), found.end()


def _text(line: str, choices: int) -> Found | None:
    text = " ".join(re.sub(r"[\s.*_$`\"'“”‘’)\]}]+$", "", line).split())
    return (text, len(line)) if text else None


READERS: dict[Kind, Reader] = {"truth": _truth, "letter": _letter, "number": _number, "text": _text}


def _same(found: str, gold: str, kind: Kind) -> bool:
    """Compare without case, outer marks and, in a text, a leading article (as SQuAD does, arXiv 1606.05250)."""
    read = READERS[kind](gold.strip(), len(LETTERS))
    wanted = read[0] if read else gold.strip()
    if kind == "number" and read:
        return Fraction(found) == Fraction(wanted)
    bare = [re.sub(r"^(?:the|an?)\s+(?=\w)", "", value.casefold()) for value in (found, wanted)]
    return bare[0] == bare[1] if kind == "text" else found == wanted


def _outer(text: str) -> str:
    return text.strip(" .*_$:`\"'").casefold()


def _several(line: str, found: Found, read: Reader, choices: int) -> bool:
    """Whether another answer is joined to this one: "A or B", "True/False"."""
    join = JOIN.match(line, found[1])
    if not join:
        return False
    rest = line[join.end() :]
    other = read(rest, choices)
    return bool(other and other[0] != found[0] and (not join["comma"] or END.match(rest, other[1])))


def _after_last_phrase(text: str) -> tuple[int, int] | None:
    phrases = list(PHRASE.finditer(text))
    return phrases[-1].span() if phrases else None


def _whole(text: str) -> tuple[int, int] | None:
    return (0, 0) if text.strip() else None


Rule = tuple[str, Callable[[str], tuple[int, int] | None]]  # a name; where the evidence and the answer begin
RULES: tuple[Rule, ...] = (("last phrase", _after_last_phrase),)
ANSWER_LINE: tuple[Rule, ...] = (*RULES, ("answer line", _whole))  # what stands on a parsed answer line is the answer


def _score(text: str, gold: str, choices: int | None, kind: Kind, rules: tuple[Rule, ...]) -> Score:
    placed = next(((name, place) for name, find in rules if (place := find(text))), None)
    if placed is None:
        return Score("no_answer", None, "no phrase", text[-80:])
    rule, (begin, end) = placed
    wrapping = WRAPPING.match(text, end)
    assert wrapping is not None  # it matches the empty string
    start = wrapping.end()
    body = LINE.match(text, start)
    assert body is not None
    line = body[0].rstrip()
    evidence = text[begin : start + len(line)]
    read, limit = READERS[kind], choices or len(LETTERS)
    found = read(line, limit)
    if found is None:
        return Score("no_answer", None, f"{rule}, no {kind} behind it", evidence)
    if kind != "text" and _several(line, found, read, limit):
        return Score("no_answer", None, f"{rule}, several answers", evidence)
    # Gold in brackets, "(1,2)" or "\\text{(C)}": what was taken for wrapping belongs to the answer.
    whole = kind == "text" and _outer(text[end : start + len(line)]) == _outer(gold)
    verdict: Literal["correct", "wrong"] = "correct" if whole or _same(found[0], gold, kind) else "wrong"
    return Score(verdict, found[0], rule, text[begin : start + found[1]])


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
