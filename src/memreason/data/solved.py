"""Data sets whose rows carry a solution: its lines become the steps of a trace."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from memreason.core.errors import DataError
from memreason.core.trace import LETTERS, MEMORY, Question, Step, Trace

__all__ = ["aqua_rows", "facts_as_steps", "gsm8k_rows", "math_rows", "svamp_rows"]

Row = Mapping[str, Any]
BOX = re.compile(r"\\(?:boxed|fbox)\s*")
Solved = tuple[str, tuple[str, ...] | None, str, str]  # question, choices, solution, answer


def _gsm8k(row: Row) -> Solved:
    solution, _, answer = row["answer"].rpartition("####")
    return row["question"], None, solution, answer.replace(",", "")


def _math(row: Row) -> Solved:
    return row["problem"], None, row["solution"], boxed(row["solution"])


def _aqua(row: Row) -> Solved:
    choices = tuple(re.sub(r"^(?:\s*[A-E]\s*\))+\s*", "", option) for option in row["options"])
    if row["correct"] not in LETTERS[: len(choices)]:
        raise ValueError(f"'correct' must be one of {LETTERS[: len(choices)]}, got {row['correct']!r}")
    return row["question"], choices, row["rationale"], row["correct"]


def _svamp(row: Row) -> Solved:
    answer = f"{float(row['Answer']):.12g}"
    body = row.get("question_concat") or f"{row['Body'].strip()} {row['Question'].strip()}"
    return body, None, f"{row['Equation']} = {answer}", answer


def boxed(solution: str) -> str:
    r"""What stands in the last \boxed{...} or \fbox{...}, braces balanced; "" if there is none.

    Two training rows of MATH have a box without braces: $\boxed 2$.
    """
    *_, rest = BOX.split(solution) if BOX.search(solution) else ("",)
    if not rest.startswith("{"):
        return rest.split("$")[0].strip()
    depth = 0
    for place, sign in enumerate(rest):
        depth += {"{": 1, "}": -1}.get(sign, 0)
        if depth == 0:
            return rest[1:place]
    return ""


def _rows(task: str, read: Callable[[Row], Solved], rows: Iterable[Row], split: str = "") -> list[Trace]:
    return [_trace(task, read, row, split, number) for number, row in enumerate(rows, 1)]


def _trace(task: str, read: Callable[[Row], Solved], row: Row, split: str, number: int) -> Trace:
    try:
        text, choices, solution, answer = read(row)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{task}, row {number}: {type(error).__name__} {error} (fields: {', '.join(row)})") from error
    if not (text.strip() and answer.strip()):
        raise DataError(f"{task}, row {number}: question and answer must not be empty, got {text!r} and {answer!r}")
    lines = [line.strip() for line in solution.splitlines() if line.strip()]
    question = Question(text.strip(), answer.strip(), task, split, choices=choices)
    return Trace(question, tuple(Step((), line) for line in lines))


gsm8k_rows = partial(_rows, "gsm8k", _gsm8k)
math_rows = partial(_rows, "math", _math)
aqua_rows = partial(_rows, "aqua", _aqua)
svamp_rows = partial(_rows, "svamp", _svamp)


def facts_as_steps(traces: Iterable[Trace], task: str) -> list[Trace]:
    """Questions whose gold facts are the memory lines: plain StrategyQA, the published `qa`."""
    made = []
    for trace in traces:
        facts = trace.question.facts or ()
        steps = tuple(Step((MEMORY,), str(sentence)) for fact in facts for sentence in re.split(r"(?<=[.?!])\s+", fact))
        made.append(replace(trace, steps=steps).with_question(task=task, id=""))
    return made
