"""Arithmetic word problems made by a rule: 2 to 4 steps or as asked, each of one of + - * /, annotated as GSM8K's are.

The rule knows the kind of each step, so that what learns step types can be checked. Nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from memreason.core.errors import TaskError
from memreason.core.trace import Question, Step, Trace

__all__ = ["make_sums"]

NAMES = ("Ada", "Ben", "Chloe", "Dan", "Elif", "Femi", "Grace", "Hugo", "Ines", "Jonas", "Kavya", "Liam")
THINGS = (
    "apples", "books", "coins", "cards", "eggs", "marbles", "pencils", "shells", "stamps", "stickers", "tickets",
    "tiles",
)  # fmt: skip
SPLITS = {"train": 80, "validation": 10, "test": 10}  # per cent of all chains
HOPS = (2, 3, 4)  # calculations of a question
MOST = 999  # no number is greater
PATIENCE = 400  # draws without a new question before a split counts as used up


@dataclass(frozen=True)
class Kind:
    """An operation in words: what a question says of it, and a solution's line; {b} is its second number, {sum} the
    calculation with its result."""

    asked: tuple[str, ...]
    solved: tuple[str, ...]


KINDS = {
    "+": Kind(
        ("{name} finds {b} more.", "Then {b} more {things} are bought.", "A friend adds {b} {things}."),
        ("Together with those there are {sum} {things}.", "Adding {b} makes {sum} {things} in total."),
    ),
    "-": Kind(
        ("{name} gives {b} of them away.", "Then {b} {things} are lost.", "{name} sells {b} of them."),
        ("After that only {sum} {things} are left.", "Taking {b} away leaves {sum} {things}."),
    ),
    "*": Kind(
        ("With luck their number grows to {b} times as many.", "{name} trades them for {b} times as many {things}."),
        ("{b} times as many are {sum} {things}.", "Their number is multiplied, so it is {sum} {things}."),
    ),
    "/": Kind(
        (
            "{name} shares them equally among {b} children and keeps one share.",
            "They are sorted into {b} equal boxes, and {name} takes one of these.",
        ),
        ("Each equal share holds {sum} {things}.", "Divided into {b} equal parts, each has {sum} {things}."),
    ),
}


def make_sums(split: str, n: int, *, seed: int = 0, hops: Sequence[int] | None = None) -> list[Trace]:
    """`n` different labelled traces of a split: kinds of steps are + - * /, answers are numbers. `hops`: of so many
    calculations each.

    No chain of calculations (its numbers and operators) of one split stands in another, under no name and no seed.
    Raises TaskError for an unknown split, for no calculations, or for more than there are.
    """
    if split not in SPLITS:
        raise TaskError(f"task sums has no split {split!r}. It has: {', '.join(SPLITS)}.")
    if min(lengths := tuple(hops or HOPS)) < 1:
        raise TaskError(f"task sums: a question has at least one calculation, got hops {hops}")
    generator, made, misses = random.Random(f"{split}:{seed}"), dict[str, Trace](), 0
    while len(made) < n:
        chain = _chain(generator, lengths)
        found = _trace(chain, split, generator)
        misses = misses + 1 if split_of(chain) != split or found.question.id in made else 0
        if misses > PATIENCE:
            raise TaskError(f"task sums: {n} questions are more than split {split} has; ask for {len(made)}")
        if not misses:
            made[found.question.id] = found
    return list(made.values())


def split_of(chain: list[Any]) -> str:
    """Which split a chain of calculations belongs to, on every machine."""
    place = int(hashlib.sha256(repr(chain).encode()).hexdigest(), 16) % 100
    for split, share in SPLITS.items():
        place -= share
        if place < 0:
            return split
    raise AssertionError(place)


def _chain(generator: random.Random, lengths: Sequence[int]) -> list[Any]:
    """[start, (operator, operand, result), ...] with whole, positive numbers."""
    start = value = generator.randint(4, 60)
    chain: list[Any] = [start]
    for _ in range(generator.choice(lengths)):
        operator, operand, value = generator.choice(list(_possible(value, generator)))
        chain.append((operator, operand, value))
    return chain


def _possible(value: int, generator: random.Random) -> Any:
    """One calculation of each kind that can go on from here."""
    more, times = generator.randint(2, 60), generator.randint(2, 9)
    divisors = [d for d in range(2, 10) if value % d == 0 and value > d]
    if value + more <= MOST:
        yield "+", more, value + more
    if value > 2:
        less = generator.randint(1, value - 1)
        yield "-", less, value - less
    if value * times <= MOST:
        yield "*", times, value * times
    if divisors:
        divisor = generator.choice(divisors)
        yield "/", divisor, value // divisor


def _trace(chain: list[Any], split: str, generator: random.Random) -> Trace:
    start, *calculations = chain
    words: dict[str, Any] = {"name": generator.choice(NAMES), "things": generator.choice(THINGS)}
    told = [f"{words['name']} has {start} {words['things']}."]
    steps, value = [], start
    for operator, operand, result in calculations:
        formula = f"{value}{operator}{operand}"
        written = f"{value} {operator} {operand} = <<{formula}={result}>>{result}"
        told.append(generator.choice(KINDS[operator].asked).format(**words, b=operand))
        line = generator.choice(KINDS[operator].solved).format(**words, b=operand, sum=written)
        steps.append(Step((operator,), line))
        value = result
    text = " ".join([*told, "How many {things} does {name} have now?".format(**words)])
    meta = {"steps": len(steps), "operators": "".join(operator for operator, _, _ in calculations)}
    return Trace(Question(text, str(value), "sums", split, meta=meta), tuple(steps))
