"""The command `label`: its function and the row of its arguments."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["LABEL", "TEACHER", "teacher_fields"]

ENDPOINT = {
    "key_env": "key_env",
    "in_flight": "in_flight",
    "rpm": "requests_per_minute",
    "tpm": "tokens_per_minute",
}


def _label(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    from memreason.core.labelling import load_label_recipe
    from memreason.published import pairs

    recipe = load_label_recipe(arguments.recipe, [*pairs(rest), *teacher_fields(arguments)])
    if arguments.print_recipe:
        print(recipe.to_yaml(), end="")
        return
    from memreason import labels
    from memreason.report.labelling import print_batch, print_estimate, print_labels

    if arguments.estimate:
        print_estimate(labels.estimate_run(recipe))
    elif arguments.batch:
        report, summary = labels.batch(recipe, arguments.batch)
        print_batch(report)
        print_labels(summary)
    elif arguments.merge:
        print_labels(labels.merge(recipe, arguments.merge))
    elif arguments.export:
        print(f"{arguments.export}: {labels.export(recipe, arguments.export)} replies")
    else:
        print_labels(labels.label_questions(recipe))


def teacher_fields(arguments: argparse.Namespace) -> list[tuple[str, Any]]:
    """The teacher's fields from its flags: an endpoint for each address, all with the same limits."""
    model = [("teacher.model", arguments.teacher)] if arguments.teacher else []
    limits = {field: getattr(arguments, flag) for flag, field in ENDPOINT.items()}
    given = {field: value for field, value in limits.items() if value is not None}
    addresses = [{"base_url": url} for url in arguments.base_url]
    if not addresses and not given:
        return model
    return [*model, ("teacher.endpoints", [{**address, **given} for address in addresses or [{}]])]


TEACHER: dict[str, dict[str, Any]] = {
    "--teacher": {"metavar": "MODEL", "help": "model, as its server knows it; for `self`, a run or base model"},
    "--base-url": {"action": "append", "default": [], "metavar": "URL", "help": "server; may be repeated"},
    "--key-env": {"metavar": "NAME", "help": "variable that holds the key (default: OPENAI_API_KEY)"},
    "--in-flight": {"type": int, "metavar": "N", "help": "requests at a time, each server (default: 16)"},
    "--rpm": {"type": int, "metavar": "N", "help": "requests a minute, each server"},
    "--tpm": {"type": int, "metavar": "N", "help": "tokens a minute, each server"},
}
LABEL: dict[str, tuple[Any, ...]] = {
    "label": (
        _label,
        "a teacher turns questions into traces",
        {
            "recipe": {"nargs": "?", "help": "recipe file, or a shipped recipe's name"},
            **TEACHER,
            "--estimate": {"action": "store_true", "help": "label ten questions and say what all would take"},
            "--batch": {"type": Path, "metavar": "FOLDER", "help": "exchange OpenAI Batch files with this folder"},
            "--merge": {"type": Path, "nargs": "+", "metavar": "JOURNAL", "help": "take over other journals"},
            "--export": {"type": Path, "metavar": "FILE", "help": "write every reply to a JSONL file"},
            "--print-recipe": {"action": "store_true", "help": "print the resolved recipe and stop"},
        },
        "--protocol single --n 500 --teacher.temperature 0.7 --checks.max_steps 8",
    )
}
