"""What a person reads of attribution: whose faults, by what, in which ways, and how far the ways agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from memreason.measure.attribute import VERDICTS
from memreason.report.console import console, figures

__all__ = ["print_faults"]

GIVEN = {"before": "as generated", "gold": "gold lines", "own": "own lines again", "other": "another's lines"}
ORDER = (*VERDICTS, "unjudged")
FAULTS = {"memory": "memory faults", "reason": "reason faults", "per_line": "needed lines at fault"}


def print_faults(found: dict[str, Any]) -> None:
    """Verdicts with intervals, faults and trends by obscurity, hops and form, every way's verdicts, agreement."""
    rows = [(name, f"{count:4}  {_told(found['shares'][name])}") for name, count in found["counts"].items()]
    task = Path(found["task"]).stem
    figures(f"{task} / {found['split']}: {found['n']} questions, {found['wrong']} wrong", rows)
    _print_levels(found["by"])
    _print_trends(found["trends"])
    if len(found["ways"]) > 1:
        _print_ways(found)
    if "counterfactual" in found:
        _print_interventions(found["counterfactual"])
    if "judge" in found:
        judge = found["judge"]
        tokens = f"{judge['prompt_tokens']:,} tokens read, {judge['completion_tokens']:,} written"
        asked = f"{judge['asked']} asked, {judge['unjudged']} unjudged, {judge['replies']} replies, {tokens}"
        figures("judge", [(judge["model"], asked)])
    folder = Path(found["folder"])
    figures("where it lies", [("figures", str(folder / "faults.json")), ("evidence", str(folder / "faults.jsonl"))])


def _told(one: dict[str, Any] | None) -> str:
    """A share with its interval: by group where there is one, else Wilson's. Empty for a share of nothing."""
    if one is None or one.get("n") == 0:
        return ""
    low, high = one.get("by_group") or one["wilson"]
    return f"{one['share']:.3f}  ({low:.3f} to {high:.3f})"


def _table(title: str, names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Rows of a name and figures, under the names of the columns."""
    console.print(Text(title, style="bold"))
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("", *names):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _print_levels(by: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    names, rows = ("memory", "reason", "wrong", "per_line"), []
    for level, groups in by.items():
        for group in groups:
            shares = [f"{group[name]['share']:.3f}" if group[name] else "" for name in names]
            rows.append([f"  {level} {group[level]}", str(group["n"]), *shares])
    if rows:
        _table("share of questions with a fault, and of needed lines", ("n", *names[:3], "needed lines"), rows)


def _print_trends(trends: Mapping[str, Mapping[str, Any]]) -> None:
    rows = []
    for level, slopes in trends.items():
        for name, one in slopes.items():
            low, high = one["by_group"] if one else (0.0, 0.0)
            told = f"{one['slope']:+.3f}  ({low:+.3f} to {high:+.3f})" if one else "undefined"
            rows.append((f"{FAULTS[name]}, a unit of {level}", told))
    if rows:
        figures("trends: change of these shares", rows)


def _print_ways(found: Mapping[str, Any]) -> None:
    """The verdicts of each way, how they fall together, and agreement."""
    names = [name for name in ORDER if any(name in counts for counts in found["ways"].values())]
    counted = [[f"  {way}", *(str(counts.get(n, "")) for n in names)] for way, counts in found["ways"].items()]
    _table("verdicts by way", names, counted)
    for one in found["agreement"]:
        first, second = one["between"]
        pairs = {tuple(pair.split(", ")): count for pair, count in one["confusion"].items()}
        across = [name for name in ORDER if any(other == name for _, other in pairs)]
        down = [name for name in ORDER if any(verdict == name for verdict, _ in pairs)]
        cells = [[f"  {verdict}", *(str(pairs.get((verdict, other), 0)) for other in across)] for verdict in down]
        if cells:
            _table(f"wrong answers: {first} (down), {second} (across)", across, cells)
        kappa = one["kappa"]
        low, high = kappa["by_group"] if kappa else (0.0, 0.0)
        beyond = f"kappa {kappa['kappa']:.3f}  ({low:.3f} to {high:.3f})" if kappa else "kappa undefined"
        figures("", [("agree", f"{_told(one['agreement'])} of {one['agreement']['n']}, {beyond}")])


def _print_interventions(found: Mapping[str, Any]) -> None:
    """What each intervention does: accuracy, wrong answers mended, answers that went from right to wrong or back."""
    names, rows = ("accuracy", "mended", "changed"), []
    for given, title in GIVEN.items():
        *told, changed = (found[name].get(given) for name in names)
        rows.append([f"  {title}", *map(_told, told), f"{changed['share']:.3f}" if changed else ""])
    without = f", {found['without']} questions have none" if found["without"] else ""
    title = f"memory lines given (gold: {found['gold']}{without}; {found['wrong']} wrong answers to mend)"
    _table(title, names, rows)
    beyond = [(f"{GIVEN['gold']} less another's: {name}", _beyond(one)) for name, one in found["beyond_chance"].items()]
    figures("what gold lines do that other lines do not", beyond)


def _beyond(one: Mapping[str, Any]) -> str:
    low, high = one["by_group"]
    return f"{one['difference']:+.3f}  ({low:+.3f} to {high:+.3f}), p {one['p']:.3g}"
