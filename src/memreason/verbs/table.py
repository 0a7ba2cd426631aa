"""The table of all commands. Nothing heavy is imported before one runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from memreason.verbs.compare import COMPARE
from memreason.verbs.data import DATA
from memreason.verbs.inside import INSIDE
from memreason.verbs.label import LABEL
from memreason.verbs.publish import PUBLISH
from memreason.verbs.runs import RUNS
from memreason.verbs.scale import SCALE
from memreason.verbs.steps import STEPS

__all__ = ["GROUPS", "VERBS", "Verb"]


class Verb(NamedTuple):
    """A command: its function, one line of help, its arguments, and examples of a recipe's fields if it takes them."""

    function: Callable[[argparse.Namespace, Sequence[str]], None]
    text: str
    arguments: dict[str, dict[str, Any]]
    fields: str = ""


VERBS = {name: Verb(*row) for name, row in (RUNS | INSIDE | COMPARE | LABEL | DATA | PUBLISH | SCALE | STEPS).items()}
GROUPS = {"data": "questions and traces", "lm-eval": "files of lm-evaluation-harness", "models": "base models"}
