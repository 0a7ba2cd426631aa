"""The commands that look inside a trained run, and the table of their arguments. All that is heavy is imported late."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

__all__ = ["BASE", "INSIDE", "RUN", "settings_of"]


def settings_of(loaded: Any, fields: dict[str, Any]) -> Any:
    """How the run was to be evaluated, with what is given now."""
    from memreason.core.recipe import load_recipe

    trained = {f"eval.{key}": value for key, value in loaded.recipe.eval.model_dump().items()}
    return load_recipe(None, {**trained, **fields}).eval


def _faults(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    from memreason import inside
    from memreason.finetune.checkpoint import load_checkpoint
    from memreason.published import pairs
    from memreason.report.terminal import print_faults

    loaded = load_checkpoint(arguments.path, base=arguments.base)
    settings = settings_of(loaded, dict(pairs(rest)))
    found = inside.faults(
        arguments.path,
        settings=settings,
        base=arguments.base,
        checkpoint=loaded,
        counterfactual=arguments.counterfactual,
    )
    print_faults(found)


RUN = {"help": "run (its best checkpoint) or checkpoint"}
BASE = {"metavar": "MODEL", "help": "base model, where it is not the recipe's"}
FIELDS = "--eval.n 100 --eval.batch_size 64"
INSIDE: dict[str, tuple[Any, ...]] = {
    "faults": (
        _faults,
        "whose fault each wrong answer is: memory, reason or format (exactly, on atlas)",
        {
            "path": RUN,
            "--counterfactual": {"action": "store_true", "help": "also answer anew with gold and placebo memory lines"},
            "--base": BASE,
        },
        FIELDS,
    ),
}
