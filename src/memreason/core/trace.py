"""Question, Step and Trace: the nouns of the project, and their one-object-a-line JSON form."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from memreason.core.errors import DataError

__all__ = ["ASSIGNMENT", "LETTERS", "MEMORY", "REASON", "Question", "Step", "Trace", "question_id"]

MEMORY = "memory"
REASON = "reason"
ASSIGNMENT = "assignment"  # the kind of a line that has none (planning tokens, section 3)
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def question_id(task: str, text: str, choices: tuple[str, ...] | None = None) -> str:
    """Hash of task, normalised question and choices: 16 hex digits, the same on every machine."""
    normalised = [" ".join(part.lower().split()) for part in (text, *(choices or ()))]
    return hashlib.sha256(json.dumps([task, *normalised]).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Question:
    """One question with its gold answer.

    `answer` is what a reply must give: "True" / "False", a letter where there are choices, or a
    text. `choices` are without their letters. `facts` are known gold facts, if any; `group` is
    the entity by which questions are resampled together (on atlas, the country).
    """

    text: str
    answer: str
    task: str = ""
    split: str = ""
    choices: tuple[str, ...] | None = None
    facts: tuple[Any, ...] | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)
    id: str = ""

    def __post_init__(self) -> None:
        if not self.id:
            object.__setattr__(self, "id", question_id(self.task, self.text, self.choices))

    @property
    def group(self) -> str:
        """What this question shares with others; its own id where nothing is known."""
        return str(self.meta.get("group") or self.id)


@dataclass(frozen=True)
class Step:
    """One line of a trace: its kinds (usually one) and a text without line breaks.

    `source` is the id of the passage that a retrieved line was taken from, and empty for any other line.
    """

    kinds: tuple[str, ...]
    text: str
    source: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", re.sub(r"\s*[\r\n\v\f\x85\u2028\u2029]+\s*", " ", self.text).strip())

    def to_json(self) -> dict[str, Any]:
        return {"kinds": list(self.kinds), "text": self.text, **({"source": self.source} if self.source else {})}


@dataclass(frozen=True)
class Trace:
    """A question, its steps in order, and an answer.

    A labelled trace ends in the gold answer (`prediction` is None); a generated one keeps what
    was generated in `prediction` ("" if none was found) and the defects that parsing met in `faults`.
    """

    question: Question
    steps: tuple[Step, ...]
    prediction: str | None = None
    faults: tuple[str, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def answer(self) -> str:
        """The answer of the last line: generated where there is one, else gold."""
        return self.question.answer if self.prediction is None else self.prediction

    def of_kind(self, kind: str) -> list[Step]:
        return [step for step in self.steps if kind in step.kinds]

    def to_json(self) -> dict[str, Any]:
        """The object that stands on one line of a JSONL file."""
        question = self.question
        line: dict[str, Any] = {
            "id": question.id,
            "task": question.task,
            "split": question.split,
            "question": question.text,
            "choices": None if question.choices is None else list(question.choices),
            "answer": question.answer,
            "steps": [step.to_json() for step in self.steps],
            "facts": None if question.facts is None else list(question.facts),
            "meta": {**question.meta, **self.meta},
        }
        if self.prediction is not None:
            line |= {"prediction": self.prediction, "faults": list(self.faults)}
        return line

    @classmethod
    def from_json(cls, line: Mapping[str, Any], where: str = "trace") -> Trace:
        """Read one line. `where` is file:line for the message; unknown keys are kept in meta.

        Raises DataError naming every field that is missing or of the wrong type.
        """
        problems = list(_problems(line))
        if problems:
            raise DataError(f"{where}: {'; '.join(problems)}")
        choices = line.get("choices")
        facts = line.get("facts")
        question = Question(
            text=line["question"].strip(),
            answer=line["answer"].strip(),
            task=line.get("task") or "",
            split=line.get("split") or "",
            choices=None if choices is None else tuple(choices),
            facts=None if facts is None else tuple(facts),
            meta=dict(line.get("meta") or {}),
            id=line.get("id") or "",
        )
        steps = tuple(_step(step) for step in line.get("steps") or ())
        return cls(question, steps, line.get("prediction"), tuple(line.get("faults") or ()))

    def with_question(self, **changes: Any) -> Trace:
        """The same trace with fields of its question replaced."""
        return replace(self, question=replace(self.question, **changes))


def _step(step: Any) -> Step:
    if isinstance(step, str):
        return Step((), step)
    kinds = (step["kinds"],) if isinstance(step["kinds"], str) else tuple(step["kinds"])
    return Step(kinds, step["text"], str(step.get("source") or ""))


def _problems(line: Any) -> Any:
    """Yield one phrase per defect of a JSON line."""
    if not isinstance(line, Mapping):
        yield f"an object with question, answer and steps is needed, got {type(line).__name__}"
        return
    for key in ("question", "answer"):
        value = line.get(key)
        if not isinstance(value, str) or not value.strip():
            yield f"{key!r} must be a non-empty text, got {value!r}"
    choices = line.get("choices")
    if choices is not None and (not isinstance(choices, list) or not all(isinstance(c, str) for c in choices)):
        yield f"'choices' must be a list of texts or null, got {choices!r}"
    steps = line.get("steps") or []
    if not isinstance(steps, list):
        yield f"'steps' must be a list, got {steps!r}"
        return
    for number, step in enumerate(steps, 1):
        if isinstance(step, str) and step.strip():  # a line of a chain of thought that has no kind yet
            continue
        kinds = step.get("kinds") if isinstance(step, Mapping) else None
        named = isinstance(kinds, str) or (isinstance(kinds, list) and all(isinstance(k, str) for k in kinds))
        written = isinstance(step.get("text"), str) if named else False
        if not (written and (step["text"].strip() or "prediction" in line)):  # a generated plan has no texts
            yield f'step {number} must be {{"kinds": [...], "text": "..."}} or a text, got {step!r}'
