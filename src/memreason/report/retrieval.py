"""What calibrating found, and accuracy against the share of lines retrieved: in the terminal and as a picture."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.table import Table

from memreason.core.files import writing
from memreason.report.console import console, figures, note

__all__ = ["draw_curve", "print_calibration", "print_curve"]

TEAL, AMBER = "#1593ab", "#e0a02b"


def print_calibration(found: dict[str, Any]) -> None:
    figures(
        f"{found['task']} / {found['split']}: {found['way']}",
        [
            ("memory lines", f"{found['n']}, {found['false']} of them false"),
            ("unsure below", f"{found['threshold']:.4f}  (mean log-probability of a line)"),
            ("false lines below", f"{found['false_below']:.3f}"),
            ("true lines below", f"{found['true_below']:.3f}"),
            ("AUROC", f"{found['auroc']:.3f}"),
        ],
    )


def print_curve(found: dict[str, Any]) -> None:
    """A row for each threshold: the share retrieved, and accuracy with its interval."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("memory", "unsure below", "retrieved", "accuracy", "95 % Wilson"):
        table.add_column(title, justify="left" if title == "memory" else "right", no_wrap=True)
    for point in found["points"]:
        low, high = point["interval"]
        threshold = "" if point["unsure_below"] is None else f"{point['unsure_below']:.4f}"
        shares = [f"{point['retrieved']:.3f}", f"{point['accuracy']:.3f}", f"{low:.3f} to {high:.3f}"]
        table.add_row(point["name"], threshold, *shares)
    about = f"{found['task']} / {found['split']}: {found['points'][0]['n']} questions, corpus {found['corpus']}"
    figures(about, [("unsure below", f"{found['calibration']['threshold']:.4f}, as calibrated")])
    console.print(table)
    folder, picture = Path(found["folder"]), Path(found["folder"]) / "curve.svg"
    drawn = [("picture", str(picture))] if picture.is_file() else []
    figures("where it lies", [("figures", str(folder / "curve.json")), *drawn])


def draw_curve(found: dict[str, Any], path: Path) -> None:
    """Accuracy with its intervals against the share of lines retrieved; nothing where Matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        note("no picture of the curve: pip install 'memreason[inside]' for Matplotlib")
        return
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    points = found["points"]
    x, y = [point["retrieved"] for point in points], [point["accuracy"] for point in points]
    low, high = zip(*(point["interval"] for point in points), strict=True)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "memreason"}):
        figure = Figure(figsize=(5, 3.2), layout="constrained")
        axes = figure.add_subplot()
        axes.fill_between(x, low, high, color=TEAL, alpha=0.15, linewidth=0)
        axes.plot(x, y, marker="o", color=TEAL, clip_on=False)
        for point in (point for point in points if point["name"] == "calibrated"):
            axes.plot(point["retrieved"], point["accuracy"], marker="o", markersize=9, color=AMBER, label="calibrated")
            axes.legend(frameon=False, loc="lower right")
        axes.set(xlabel="share of memory lines retrieved", ylabel="accuracy", xlim=(0, 1))
        axes.spines[["top", "right"]].set_visible(False)
        with writing(path):
            figure.savefig(path, metadata={"Date": None})
