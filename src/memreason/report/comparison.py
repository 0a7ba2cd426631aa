"""A comparison of arms: one table in the terminal, one self-contained page. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml
from rich.table import Table
from rich.text import Text

from memreason.core.comparison import Comparison
from memreason.report import charts
from memreason.report.console import console, figures
from memreason.report.templates import render

__all__ = ["comparison_page", "print_comparison"]

FAULTS = ("memory", "reason", "both", "format", "lucky", "right")


def comparison_page(found: Mapping[str, Any], comparison: Comparison, command: str) -> str:
    """`found` is what `compare` returns of a comparison, `command` what repeats it."""
    points = [{**row, "tokens": row["cost"]["tokens_per_trace"]} for row in found["arms"]]
    ends = [end for row in found["arms"] if "difference" in row for end in row["difference"]["interval"]]
    marks = {name: found[name] for name in ("chance", "majority")}
    values = {
        "found": found,
        "changes": {name: _flow(fields) for name, fields in comparison.arms.items()},
        "settings": _flow(comparison.settings),
        "points": points,
        "marks": marks,
        "reach": max([0.05, *map(abs, ends)]),
        "charts": charts,
        "command": command,
        "faulty": any(row["faults"] for row in found["arms"]),
        "verdicts": FAULTS,
    }
    return render("comparison.html.j2", values)


def _flow(fields: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(fields), sort_keys=False, default_flow_style=True, width=10_000).strip()


def print_comparison(found: Mapping[str, Any]) -> None:
    """A row for each arm, in 80 columns: accuracy, difference with its interval and p, memory faults, tokens."""
    seeds = "1 seed" if len(found["seeds"]) == 1 else f"{len(found['seeds'])} seeds"
    about = f"{found['task']} / {found['split']}: {found['n']} questions, {seeds}"
    floors = f"{found['chance']:.3f}, {found['majority']:.3f}"
    figures(about, [("chance, commonest answer", floors), ("compared with", found["against"])])
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("arm", overflow="fold", max_width=22)
    for title in ("accuracy", "95 %", "difference", "95 %", "p", "tokens"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in found["arms"]:
        low, high = row["interval"]
        cells: list[str | Text] = [f"{row['accuracy']:.3f}", f"{low:.2f} {high:.2f}"]
        if "difference" in row:
            own = row["difference"]
            style = "" if own["interval"][0] <= 0 <= own["interval"][1] else "bold"
            cells += [Text(f"{own['value']:+.3f}", style=style), "{:+.2f} {:+.2f}".format(*own["interval"])]
            cells += [f"{own['p_holm']:.2g}"]
        else:
            cells += ["", "", ""]
        table.add_row(row["arm"], *cells, f"{row['cost']['tokens_per_trace']:.0f}")
    console.print(table)
    console.print(Text("p: McNemar's exact test, adjusted for the number of arms (Holm)", style="dim"))
