"""Read the answer in generated text. This file imports nothing of ours and is written beside other evaluators' tasks
as it is (publish/lm_eval.py): what they read is what we read.

A letter that stands anywhere without the answer's phrase is not an answer: the published rule takes it for one
(evaluation code of arXiv 2411.13504).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from string import ascii_uppercase as LETTERS
from typing import Literal, NamedTuple

__all__ = ["ANSWER_LINE", "NUMBER", "PHRASE", "READERS", "RULES", "TRUTH", "Kind", "Reading", "Rule", "read_answer"]

Kind = Literal["truth", "letter", "number", "formula", "text"]
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
JOIN = re.compile(r"\W{0,3}?\s*(?:,\s*(?:or|and)\b|(?P<comma>,)|/|&|\bor\b|\band\b)\s*(?:not\s+)?", re.IGNORECASE)
END = re.compile(r"\W*(?:$|(?:and|or)\b)")


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


def _formula(line: str, choices: int) -> Found | None:
    return (line.strip(), len(line)) if line.strip(" .$") else None


READERS: dict[Kind, Reader] = {
    "truth": _truth,
    "letter": _letter,
    "number": _number,
    "formula": _formula,
    "text": _text,
}


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


class Reading(NamedTuple):
    """An answer (None: there is none), the rule that found its place, the text that it read, and all that stands
    behind the phrase in its line."""

    answer: str | None
    rule: str
    evidence: str
    line: str = ""


def read_answer(text: str, kind: Kind, choices: int | None = None, rules: tuple[Rule, ...] = RULES) -> Reading:
    """Read an answer of a kind in generated text. `choices` is how many there are: a letter beyond them is none."""
    placed = next(((name, place) for name, find in rules if (place := find(text))), None)
    if placed is None:
        return Reading(None, "no phrase", text[-80:])
    rule, (begin, end) = placed
    wrapping = WRAPPING.match(text, end)
    assert wrapping is not None  # it matches the empty string
    start = end if kind == "formula" else wrapping.end()  # its brackets and \boxed belong to it
    body = LINE.match(text, start)
    assert body is not None
    line = body[0].rstrip()
    whole, evidence = text[end : start + len(line)], text[begin : start + len(line)]
    read, limit = READERS[kind], choices or len(LETTERS)
    found = read(line, limit)
    if found is None:
        return Reading(None, f"{rule}, no {kind} behind it", evidence, whole)
    if kind not in ("text", "formula") and _several(line, found, read, limit):
        return Reading(None, f"{rule}, several answers", evidence, whole)
    return Reading(found[0], rule, text[begin : start + found[1]], whole)
