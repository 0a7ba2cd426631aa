"""The command that compares arms. All that is heavy is imported late."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

__all__ = ["COMPARE"]


def _compare(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    import shlex

    from memreason.core.comparison import load_comparison
    from memreason.published import pairs

    comparison = load_comparison(arguments.recipe, pairs(rest))
    if arguments.print_recipe:
        print(comparison.to_yaml(), end="")
        return
    from memreason import comparing
    from memreason.core.files import write_text
    from memreason.report.comparison import comparison_page, print_comparison
    from memreason.report.console import figures

    if arguments.dry_run:
        comparing.print_plan(comparison)
        return
    work = comparing.on_ray(arguments.ray) if arguments.ray else None
    found = comparing.compare(comparison, work=work)
    command = shlex.join(["memreason", "compare", arguments.recipe, *rest])
    page = comparison.folder / "comparison.html"
    write_text(page, comparison_page(found, comparison, command))
    print_comparison(found)
    figures("where it lies", [("page", str(page)), ("figures", str(comparison.folder / "comparison.json"))])


COMPARE: dict[str, tuple[Any, ...]] = {
    "compare": (
        _compare,
        "arms of training and prompting on the same questions: accuracy, differences, faults and costs on one page",
        {
            "recipe": {"help": "file of a comparison, or a shipped one's name"},
            "--print-recipe": {"action": "store_true", "help": "print the resolved comparison and stop"},
            "--dry-run": {"action": "store_true", "help": "list what is done, what is to do and how long it takes"},
            "--ray": {
                "type": int,
                "metavar": "WORKERS",
                "help": "so many arms at once on Ray: here, or at RAY_ADDRESS",
            },
        },
        '--eval.n 100 --data.n_train 500 --seeds [0] --only "[chain of thought, memory and reason]"',
    ),
}
