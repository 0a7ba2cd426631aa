"""The calculator of GSM8K (arXiv 2110.14168, appendix C): behind `<<48/2=` the result is put, and `>>`.

A row that opens such an annotation gets the rest of it given; all other rows of the batch go on meanwhile. Sums are
read by a parser of our own: numbers, + - * /, brackets, signs. What is none, or divides by zero, the model completes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import cache
from typing import Any

from memreason.encode.codec import Codec

__all__ = ["calculate", "calculator"]

OPEN = re.compile(r"<<([^<>=\n]*)=$")
TOKEN = re.compile(r"\s*(?:(\d[\d,]*\.?\d*|\.\d+)(%?)|([-+*/()]))")
SIGNS = str.maketrans("×÷−", "*/-")
LONGEST = 100  # characters of a sum: a nesting of brackets is at most as deep
TAIL = 48  # tokens behind which an annotation cannot begin


def calculate(text: str) -> str | None:
    """The value of a sum: a whole number, or a decimal one of at most ten digits; None where the text is no sum."""
    try:
        tokens = _tokens(text)
        value, rest = _sum(tokens)
    except (ValueError, ZeroDivisionError, IndexError):
        return None
    if rest:
        return None
    try:
        return str(value.numerator) if value.denominator == 1 else f"{float(value):.10g}"
    except OverflowError:
        return None


def _tokens(text: str) -> list[Any]:
    """Numbers as fractions, operators and brackets as signs."""
    if len(text) > LONGEST:
        raise ValueError("too long")
    return list(_scan(text.translate(SIGNS).replace("$", "").rstrip()))


def _scan(text: str) -> Iterator[Any]:
    place = 0
    while place < len(text):
        found = TOKEN.match(text, place)
        if not found:
            raise ValueError(f"no sum at {text[place:]!r}")
        number, percent, sign = found.groups()
        yield sign or Fraction(number.replace(",", "").rstrip(".")) / (100 if percent else 1)
        place = found.end()


def _sum(tokens: list[Any]) -> tuple[Fraction, list[Any]]:
    value, tokens = _product(tokens)
    while tokens and tokens[0] in ("+", "-"):
        other, rest = _product(tokens[1:])
        value, tokens = value + other if tokens[0] == "+" else value - other, rest
    return value, tokens


def _product(tokens: list[Any]) -> tuple[Fraction, list[Any]]:
    value, tokens = _signed(tokens)
    while tokens and tokens[0] in ("*", "/"):
        other, rest = _signed(tokens[1:])
        value, tokens = value * other if tokens[0] == "*" else value / other, rest
    return value, tokens


def _signed(tokens: list[Any]) -> tuple[Fraction, list[Any]]:
    first, rest = tokens[0], tokens[1:]
    if first in ("-", "+"):
        value, rest = _signed(rest)
        return (-value if first == "-" else value), rest
    if first == "(":
        value, rest = _sum(rest)
        if rest[0] != ")":
            raise ValueError("a bracket is open")
        return value, rest[1:]
    if not isinstance(first, Fraction):
        raise ValueError(f"a number is needed, not {first}")
    return first, rest


def calculator(codec: Codec) -> Callable[[Sequence[int]], list[int]]:
    """Reads generated ids; returns those that complete the annotation which the last one opens, or none."""
    equals = cache(lambda token: codec.decode([token]).rstrip().endswith("="))

    def complete(ids: Sequence[int]) -> list[int]:
        opened = OPEN.search(codec.decode(ids[-TAIL:]).rstrip()) if equals(ids[-1]) else None
        value = calculate(opened[1]) if opened else None
        return codec.encode(f"{value}>>") if value is not None else []

    return complete
