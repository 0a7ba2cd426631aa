"""Kinds of steps from their arithmetic: the operators of a line (planning tokens, arXiv 2310.05707)."""

from __future__ import annotations

import re
from dataclasses import replace

from memreason.core.trace import Step, Trace

__all__ = ["OPERATORS", "arithmetic_kinds", "label_arithmetic"]

OPERATORS = ("+", "-", "*", "/")
WRITTEN = {"×": "*", "÷": "/", "−": "-", r"\times": "*", r"\cdot": "*", r"\div": "/"}
FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{[^{}]*\}|\d)\s*(?:\{[^{}]*\}|\d)")
ANNOTATION = re.compile(r"<<([^<>=]*)=[^<>]*>>")  # <<48/2=24>> of GSM8K
# An operator counts between two operands of one line that holds an equals sign: not the hyphen of a word, the
# sign of a number, nor a date.
EQUATION = re.compile(r"[^=\n]*=[^=\n]*")
OPERATOR = re.compile(r"(?<=[\w)}%.])\s*([+*/-])\s*(?=[\w({$\\.])")
HYPHEN = re.compile(r"(?<=[A-Za-z]{2})[-/](?=[A-Za-z]{2})|\b\d+[-/]\d+[-/]\d+\b")


def arithmetic_kinds(text: str) -> tuple[str, ...]:
    """Operators of a line in the order in which they first stand; () if it computes nothing.

    Annotations such as <<3*5+2=17>> decide where there are some, plain equations otherwise.
    """
    annotated = ANNOTATION.findall(text)
    plain = " ; ".join(annotated) if annotated else _plain_equations(text)
    return tuple(dict.fromkeys(OPERATOR.findall(plain)))


def _plain_equations(text: str) -> str:
    for written, operator in WRITTEN.items():
        text = text.replace(written, operator)
    text = HYPHEN.sub(" ", FRACTION.sub("1/1", text))
    return " ; ".join(EQUATION.findall(text))


def label_arithmetic(trace: Trace) -> Trace:
    """The same trace with kinds told by arithmetic alone."""
    return replace(trace, steps=tuple(Step(arithmetic_kinds(step.text), step.text) for step in trace.steps))
