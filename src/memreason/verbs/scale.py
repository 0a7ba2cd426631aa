"""The commands for more than this machine: their functions and the table of their arguments."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

__all__ = ["SCALE"]


def _estimate(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    from memreason.core.recipe import load_recipe
    from memreason.published import pairs

    recipe = load_recipe(arguments.recipe, list(pairs(rest)))
    from memreason.report.estimate import print_estimate
    from memreason.timing.estimate import estimate

    found = estimate(
        recipe,
        gpus=arguments.gpus,
        dollars=arguments.dollars_per_hour,
        traces=arguments.traces,
        tokens=arguments.tokens,
    )
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        print_estimate(found)


SCALE: dict[str, tuple[Any, ...]] = {
    "estimate": (
        _estimate,
        "what a recipe would take: tokens, memory, time and cost on given hardware",
        {
            "recipe": {"nargs": "?", "help": "recipe file, or a shipped recipe's name"},
            "--gpus": {"metavar": "NxNAME", "help": "8xA100-80, h100, l4, cpu … (default: what this machine has)"},
            "--dollars-per-hour": {"metavar": "PRICE", "help": "of one device, 2 or 1.5-3 (default: public lists)"},
            "--traces": {"type": int, "metavar": "N", "help": "training traces, where the data is not at hand"},
            "--tokens": {"type": int, "metavar": "N", "help": "tokens of one of them, its question included"},
            "--json": {"action": "store_true", "help": "print it as one JSON object"},
        },
        "--train.fsdp true --model.quantize 4bit",
    )
}
