"""Kinds of steps from their arithmetic: the operators of a line (planning tokens, arXiv 2310.05707)."""

from __future__ import annotations

import re
from dataclasses import replace

from memreason.core.kinds import OPERATIONS, OPERATORS
from memreason.core.trace import Step, Trace

__all__ = ["OPERATIONS", "OPERATORS", "arithmetic_kinds", "label_arithmetic", "label_operations", "operation_kinds"]


SIGNS = str.maketrans("×∗·⋅÷∕⁄−–", "****///--", "$€£¢&")  # one sign for each operator; currencies and $LaTeX$ go
LATEX = (
    (re.compile(r"\\(?:times|cdot)(?![A-Za-z])"), "*"),  # not \cdots
    (re.compile(r"\\div(?![A-Za-z])"), "/"),
    (re.compile(r"\\[dtc]?frac(?![A-Za-z])"), "1/1 "),  # its braces stay, with the operators in them
    (re.compile(r"\\(?:left|right)(?![A-Za-z])|\\[,!;:%\s]"), ""),
)
TIMES = re.compile(r"(?:(?<=[\d)%])\s*|(?<=\w)\s+)[xX]\s*(?=\(?\.?\d)")  # 4 x 3, 5 boxes x 3; not 4x + 3
ANNOTATION = re.compile(r"<<([^<>=]*)=[^<>]*>>")  # <<48/2=24>> of GSM8K
EQUALS = re.compile(r"=|≈|\\approx")
NO_OPERATOR = re.compile(
    r"""\b(?:19|20)\d\d([-/])[01]\d\1[0-3]\d\b | \b[0-3]?\d([-/])[0-3]?\d\2(?:19|20)\d\d\b  # dates, not 12-4-3
    | (?<=\w)-(?=[a-z]{2}) | (?<=[a-z]{2})-(?=[A-Z])  # hyphens: well-known, 8-hour, non-EU
    | (?<=[A-Za-z\d])/(?=[a-z]{2}) | (?<=[a-z])/(?=[hs]\b)  # rates: 5/day, km/h
    | (?<=[a-z.]{2})\s+-(?=[\d.(\\])  # signs: "it is -5", "\le -3"
    | _\{[^{}]*\}  # indices: a_{n-1}""",
    re.VERBOSE,
)
# What is left counts between two operands; the second one may carry a sign.
OPERATOR = re.compile(r"(?<=[\w)\]}%.!|°])\s*([+*/-])\s*(?=-?[\d.(]|[\w({\[\\|√])")

FRACTION = re.compile(r"\\[dtc]?frac(?![A-Za-z])")
SIGNED: dict[str, re.Pattern[str]] = {
    "power": re.compile(r"\^(?!\{?\\circ)|\*\*|[²³⁴]|\b(?:squared|cubed)\b"),  # not degrees
    "root": re.compile(r"\\sqrt(?![A-Za-z])|[√∛]|\b(?:square|cube) root\b"),
    "fraction": FRACTION,
    "percent": re.compile(r"%|\bper ?cent\b"),
    "ratio": re.compile(r"(?<=\d)\s*:\s*(?=\d)(?!\d\d\s*[ap]\.?m)|\bratio\b"),  # not 3:30 pm
    "log": re.compile(r"(?<![A-Za-z])(?:log|ln)(?![A-Za-z])"),
    "trig": re.compile(r"(?<![A-Za-z])(?:arc)?(?:sin|cos|tan|cot)(?![A-Za-z])|\\(?:sec|csc)(?![A-Za-z])"),
    "factorial": re.compile(r"(?:\d|\)|\b[a-z])!|\\[dt]?binom(?![A-Za-z])|\bchoose\b"),
    "modulo": re.compile(r"(?<![A-Za-z])[bp]?mod(?:ulo)?(?![A-Za-z])|\bremainder\b"),
    "compare": re.compile(r"<|(?<![-=])>|[≤≥≠]|\\(?:[lg]t|[lgn]eq?|[lg]eqslant)(?![A-Za-z])"),
}


def arithmetic_kinds(text: str) -> tuple[str, ...]:
    """Operators of a line in the order in which they first stand; () if it computes nothing.

    Annotations such as <<3*5+2=17>> decide where there are some, a plain equation otherwise.
    """
    annotated = ANNOTATION.findall(text)
    if not annotated and not EQUALS.search(text):
        return ()
    plain = _one_spelling(" ; ".join(annotated) or text)
    return tuple(dict.fromkeys(OPERATOR.findall(plain if annotated else NO_OPERATOR.sub(" ", plain))))


def _one_spelling(text: str) -> str:
    """The same formula with + - * / alone."""
    for written, operator in LATEX:
        text = written.sub(operator, text)
    return TIMES.sub("*", text.translate(SIGNS))


def operation_kinds(text: str) -> tuple[str, ...]:
    """Operators of a line as `arithmetic_kinds` tells them, then which others of 14 OPERATIONS it has, in their order.

    The table is our own, of what solutions of MATH and AQuA-RAT compute: + - * /, powers, roots, fractions written as
    such (\\frac is no / here), percentages, ratios (3:2), logarithms, trigonometric functions, factorials and
    binomials, remainders, and comparisons. () if a line has no equation, comparison or annotation.
    """
    bare = ANNOTATION.sub(" ", text)
    found = tuple(kind for kind, sign in SIGNED.items() if sign.search(bare))
    if not ("compare" in found or EQUALS.search(text)):
        return ()
    equation = FRACTION.sub(" ", text) if EQUALS.search(text) else f"{FRACTION.sub(' ', text)} ="
    return (*arithmetic_kinds(equation), *found)


def label_operations(trace: Trace) -> Trace:
    """The same trace with kinds told by its operations alone."""
    return replace(trace, steps=tuple(Step(operation_kinds(step.text), step.text) for step in trace.steps))


def label_arithmetic(trace: Trace) -> Trace:
    """The same trace with kinds told by arithmetic alone."""
    return replace(trace, steps=tuple(Step(arithmetic_kinds(step.text), step.text) for step in trace.steps))
