"""What a client may send: shapes and limits of the bodies, and their mistakes in words that name the field."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from memreason.core.trace import LETTERS, Question, Step
from memreason.serve.live import UNKNOWN

__all__ = ["Ask", "Continue", "Correct", "Facts", "problems_of", "question_of", "steps_of"]


def _text(most: int) -> StringConstraints:
    return StringConstraints(strip_whitespace=True, min_length=1, max_length=most)


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Ask(Body):
    """A question, with choices if there are some."""

    question: Annotated[str, _text(4000)]
    choices: list[Annotated[str, _text(500)]] = Field([], max_length=len(LETTERS))


class Line(Body):
    """One line of a trace. `source` is the id of the passage that it was taken from."""

    kinds: list[Annotated[str, _text(64)]] = Field([], max_length=8)
    text: Annotated[str, _text(1000)]
    source: Annotated[str, StringConstraints(max_length=200)] = ""


class Continue(Ask):
    """A question and the lines that stand above what is to be generated."""

    steps: list[Line] = Field(max_length=64)


class Correct(Ask):
    """A labelled trace to be kept."""

    steps: list[Line] = Field(min_length=1, max_length=64)
    answer: Annotated[str, _text(500)]


class Facts(Ask):
    """A question whose known memory lines are wanted, and the line that a search shall look for (else the question)."""

    line: Annotated[str, StringConstraints(max_length=1000)] = ""


def question_of(body: Ask, task: str) -> Question:
    """A user's own question, its gold answer unknown."""
    return Question(text=body.question, answer=UNKNOWN, task=task, choices=tuple(body.choices) or None)


def steps_of(lines: list[Line]) -> tuple[Step, ...]:
    return tuple(Step(tuple(line.kinds), line.text, line.source) for line in lines)


def problems_of(error: ValidationError) -> tuple[int, str]:
    """Status and sentence: 400 for what is not JSON, else 422 with each field named."""
    found = error.errors(include_url=False, include_input=False)
    status = 400 if found[0]["type"] == "json_invalid" else 422
    named = [(".".join(str(part) for part in one["loc"]), one["msg"]) for one in found[:5]]
    return status, "; ".join(f"{where}: {message}" if where else message for where, message in named)
