"""Kinds for the steps of own traces: told by a rule or learnt as clusters, written down with what was learnt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memreason.core.files import new_folder, write_json, write_traces
from memreason.core.kinds import CLUSTERED
from memreason.core.recipe import Recipe
from memreason.core.trace import Trace
from memreason.data.lines import KINDS
from memreason.encode.step_types.hidden import BATCH
from memreason.encode.step_types.typer import features, fit_typer, save_typer, with_types
from memreason.finetune.prepare import scheme_of
from memreason.measure.clusters import clusters
from memreason.report.clusters import draw_clusters

__all__ = ["step_types"]


def step_types(traces: Sequence[Trace], recipe: Recipe, out: Path, *, batch_size: int = BATCH) -> dict[str, Any]:
    """Give the traces' steps the kinds that `data.step_types` of the recipe tells; returns what is in each.

    Writes traces.jsonl, to be trained on with --data, and clusters.json; of what is learnt also the typer and
    clusters.svg. The folder appears whole or not at all. Raises StorageError if it holds files already.
    """
    data, typer, found = recipe.data, None, None
    with new_folder(out) as partial:
        if data.step_types in CLUSTERED:
            scheme = scheme_of(recipe)
            typer = fit_typer(traces, recipe, (scheme.question_template, scheme.choice_template), batch_size)
            made, found = with_types(typer, traces, batch_size), features(typer, traces, batch_size)
        else:
            made = KINDS[data.step_types](traces, data.seed)
        about: dict[str, Any] = {"method": data.step_types, "seed": data.seed, "traces": len(traces)}
        about |= {"of": "words" if typer is None or typer.words else f"hidden states of {Path(typer.model.base).name}"}
        about |= clusters(made, traces, found)
        write_traces(partial / "traces.jsonl", made)
        write_json(partial / "clusters.json", about)
        if typer and found:
            save_typer(typer, partial / "typer")
            draw_clusters(made, found, about, partial / "clusters")
    return about
