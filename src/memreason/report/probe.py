"""The interventions of `memreason probe` in the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from memreason.report.console import console, figures

__all__ = ["print_probe"]


def print_probe(found: dict[str, Any]) -> None:
    """Each intervention's accuracy beside that with the own lines, and the two numbers that sum up."""
    console.print(Text(f"{found['task']} / {found['split']}: {found['n']} questions", style="bold"))
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("intervention", "n", "own", "accuracy", "difference", "p", "changed"):
        table.add_column(title, justify="left" if title == "intervention" else "right", no_wrap=True)
    for one in found["interventions"]:
        low, high = one["interval"]
        table.add_row(
            Text(one["name"]),
            str(one["n"]),
            f"{one['before']['share']:.3f}",
            f"{one['accuracy']['share']:.3f}",
            f"{one['difference']:+.3f} ({low:+.3f} to {high:+.3f})",
            f"{one['p']:.3f}" if one["p"] >= 0.001 else "<.001",
            f"{one['changed']:.0%}",
        )
    console.print(table)
    figures("what was given", [(one["name"], one["meaning"]) for one in found["interventions"]])
    rows = [
        (f"{'against' if one['against'] else 'with'} its choice: {one['kind']}", _told(one)) for one in found["forced"]
    ]
    figures("a forced kind gives a line of that kind", rows)
    summary = [("tag control", _told(found["tag_control"])), ("memory reliance", _told(found["memory_reliance"]))]
    if found.get("kind_reader") is not None:
        summary.append(("lines read rightly by their words", f"{found['kind_reader']:.3f} of held-out lines"))
    figures("in two numbers", summary)
    figures("where it lies", [("figures", str(Path(found["folder"]) / "probe.json"))])


def _told(one: dict[str, Any]) -> str:
    if one["share"] is None:
        return "–"
    low, high = one["wilson"]
    return f"{one['share']:.3f}  ({low:.3f} to {high:.3f}) of {one['n']}"
