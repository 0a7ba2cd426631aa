"""The report of one or several runs: one self-contained HTML page. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from memreason.report import charts
from memreason.report.faults import GIVEN
from memreason.report.templates import render

__all__ = ["page"]

# Which fields of a recipe say what was run; all others stand in the whole recipe.
ESSENTIALS = {
    "task": "data.task",
    "base model": "model.base",
    "method": "method.name",
    "LoRA rank": "method.lora_r",
    "kinds": "tokens.kinds",
    "tokens per block": "tokens.n_special",
    "learning rate": "train.learning_rate",
    "epochs": "train.num_train_epochs",
    "examples per batch": "train.per_device_train_batch_size",
    "epoch chosen on": "train.select_on",
    "seed": "seed",
    "decoding": "eval.decoding",
}


def page(data: Mapping[str, Any]) -> str:
    """`data` is what `gather` returns. With `live` set the page is a server's: report/live.js goes along.

    Only names, verdicts and texts go into the page's JSON, for its script; all figures are drawn here.
    """
    runs = [{**run, "essentials": _essentials(run), "last": _last(run)} for run in data["runs"]]
    losses = [value for run in runs for _, value in run["curve"]["loss"]]
    embedded = {
        "live": bool(data.get("live")),
        "runs": [run["name"] for run in runs],
        "unsure": [run["unsure"]["below"] for run in runs],
        "memory": data.get("memory", ""),
        "traces": data["traces"],
    }
    values = {
        "runs": runs,
        "comparisons": data["comparisons"],
        "top_loss": max(losses, default=1.0),
        "reach": _reach(runs, data["comparisons"]),
        "sections": _sections(data),
        "given": GIVEN,
        "charts": charts,
        "embedded": embedded,
        "live": embedded["live"],
        "traces": len(data["traces"]),
    }
    return render("report.html.j2", values)


def _essentials(run: Mapping[str, Any]) -> dict[str, str]:
    """What was run, in a few words each; what a recipe does not say is left out."""
    recipe = yaml.safe_load(run["recipe"] or "") or {}
    found = {name: _at(recipe, place) for name, place in ESSENTIALS.items()}
    rows = (run["manifest"] or {}).get("rows") or {}
    if rows:
        found["examples"] = ", ".join(f"{count:,} {name}" for name, count in rows.items())
    best = (run["manifest"] or {}).get("best")
    found["checkpoint"] = f"{run['checkpoint']} (by {best['by']})" if best else run["checkpoint"]
    return {name: _said(value) for name, value in found.items() if value is not None}


def _at(recipe: Any, place: str) -> Any:
    for part in place.split("."):
        recipe = recipe.get(part) if isinstance(recipe, Mapping) else None
    return recipe


def _said(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _last(run: Mapping[str, Any]) -> float:
    """The last step of a run's curves."""
    return max((step for points in run["curve"].values() for step, _ in points), default=1) or 1


def _reach(runs: list[dict[str, Any]], comparisons: list[dict[str, Any]]) -> float:
    """How far the scale of differences reaches to both sides."""
    probes = [one["probe"] for run in runs for one in run["evaluations"] if one["probe"]]
    ends: list[float] = [end for probe in probes for row in probe["interventions"] for end in row["interval"]]
    ends += [end for one in comparisons for end in one["interval"]]
    return max([0.05, *(abs(end) for end in ends if end is not None)])


def _sections(data: Mapping[str, Any]) -> dict[str, str]:
    """Which sections the page has: anchor -> title. A finding that no run has gets none."""
    evaluations = [one for run in data["runs"] for one in run["evaluations"]]
    curves = any(points for run in data["runs"] for points in run["curve"].values())
    shown = {
        "accuracy": ("Accuracy", True),
        "between": ("Between runs", bool(data["comparisons"])),
        "faults": ("Faults", any(one["faults"] for one in evaluations)),
        "confidence": ("Confidence", any(one["confidence"] for one in evaluations)),
        "retrieval": ("Memory from outside", any(run["retrieval"] for run in data["runs"])),
        "attention": ("Attention", any(one["attention"] for one in evaluations)),
        "probe": ("Interventions", any(one["probe"] for one in evaluations)),
        "learning": ("Learning", curves),
        "setup": ("What was run", True),
        "cost": ("Cost", True),
        "explorer": ("Traces", True),
    }
    return {anchor: title for anchor, (title, there) in shown.items() if there}
