"""The exception tree. `raise` is for what a user can cause, `assert` for what only we can.

MemreasonError
├── RecipeError        a recipe or a flag: every mistake in it, at once
├── DataError          a file of questions or traces: file, line, value, remedy
├── TaskError          an unknown task, a split or a size that a task does not have
├── ModelError         a base model that cannot be found, read or used this way
├── CheckpointError    a checkpoint that is incomplete, foreign or does not fit
├── TeacherError       a teacher that refuses the key or the model, or does not answer
├── EngineError        an engine that is not installed, or a server that does not answer as it should
├── ProcessError       another process of the run has ended, and this one cannot go on alone
├── ExportError        a checkpoint that cannot be exported this way, or whose export failed a check
├── RetrieverError     a corpus without passages, or a retrieval server that does not answer as it should
└── StorageError       a file that cannot be written (full disk, permissions)
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "DataError",
    "EngineError",
    "ExportError",
    "MemreasonError",
    "ModelError",
    "ProcessError",
    "RecipeError",
    "RetrieverError",
    "StorageError",
    "TaskError",
    "TeacherError",
]


class MemreasonError(Exception):
    """Base of everything a user can cause; its text is the whole message, remedy included."""


class RecipeError(MemreasonError):
    """A recipe, an override or a flag is wrong. `problems` holds one sentence per mistake."""

    def __init__(self, problems: str | list[str], source: str = "recipe") -> None:
        self.problems = [problems] if isinstance(problems, str) else problems
        self.source = source
        listed = "\n".join(f"  - {problem}" for problem in self.problems)
        count = len(self.problems)
        super().__init__(f"{source}: {count} problem{'s' * (count != 1)}\n{listed}")


class DataError(MemreasonError):
    """A file of questions or traces is malformed, unreadable or empty."""


class TaskError(MemreasonError):
    """A task, a split or a number of questions that does not exist."""


class ModelError(MemreasonError):
    """A base model or tokenizer that cannot be found, read or used this way."""


class CheckpointError(MemreasonError):
    """A checkpoint that is incomplete, of another base model, or does not fit its tokenizer."""


class TeacherError(MemreasonError):
    """A labelling run cannot go on: key or model refused, credit used up, or no endpoint answers."""


class EngineError(MemreasonError):
    """An engine that is not installed, or a server that serves another model or does not answer as it should."""


class ProcessError(MemreasonError):
    """A run of several processes has lost one of them."""


class ExportError(MemreasonError):
    """A checkpoint that cannot be exported this way, or whose export failed a check: nothing of it is left."""


class RetrieverError(MemreasonError):
    """A corpus that holds nothing to search, or a retrieval server that does not answer as it should."""


class StorageError(MemreasonError):
    """A file could not be written. What was complete before is still there."""
