"""The command `step-types`, and the published step-type script's flags. All that is heavy is imported late."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memreason.core.errors import RecipeError
from memreason.core.kinds import CLUSTERED

__all__ = ["STEPS"]

METHODS = {name: name for name in (*CLUSTERED, "arithmetic", "arithmetic-14")} | {"+-*/": "arithmetic"}
FIELDS = {
    "n_types": "data.n_types",
    "epochs": "data.type_epochs",
    "min_frequency": "data.min_frequency",
    "max_frequency": "data.max_frequency",
    "seed": "data.seed",
    "model": "data.embedding_model",
}


def _step_types(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    from memreason.core.recipe import load_recipe
    from memreason.report.console import figures

    if not (arguments.traces or arguments.dataset):
        raise RecipeError("a file of traces or a task is needed: memreason step-types TRACES.jsonl", "step-types")
    if arguments.method not in METHODS:
        known = ", ".join(METHODS)
        raise RecipeError(f"--method: one of {known} is needed, got {arguments.method!r}", "step-types")
    given = {field: getattr(arguments, name) for name, field in FIELDS.items()}
    fields = {field: value for field, value in given.items() if value is not None}
    recipe = load_recipe(None, {**fields, "data.step_types": METHODS[arguments.method]})
    out = arguments.out
    if out is None:
        raise RecipeError("--out: a folder is needed for the traces and the typer", "step-types")
    traces, task = _traces(arguments)
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"task": task})})
    if METHODS[arguments.method] in CLUSTERED:
        from memreason.report.drawing import needs_matplotlib

        needs_matplotlib()  # before anything is computed
    from memreason.report.clusters import print_clusters
    from memreason.step_types import step_types

    print_clusters(step_types(traces, recipe, out, batch_size=arguments.batch_size))
    picture = [("picture", str(out / "clusters.svg"))] if (out / "clusters.svg").is_file() else []
    kinds = ", ".join(f'"{kind}"' if kind in "+-*/" else kind for kind in recipe.tokens.kinds)
    train = f"memreason train --data {out / 'traces.jsonl'} --tokens.kinds '[{kinds}]'"
    figures("where it lies", [("traces", str(out / "traces.jsonl")), *picture, ("train on them", train)])


def _traces(arguments: argparse.Namespace) -> tuple[list[Any], str]:
    """Traces of a file, or a task's training traces; and the task, whose way of printing questions is taken."""
    from memreason.core.files import read_traces
    from memreason.core.stages import DataRecipe
    from memreason.data.tasks import TASKS, is_file, load_splits
    from memreason.published import DATASETS

    source = arguments.traces or arguments.dataset
    if is_file(source):
        traces = read_traces(source)
        named = traces[0].question.task
        return traces, named if named in TASKS else DataRecipe().task
    task = DATASETS.get(source, source)
    return load_splits(DataRecipe(task=task, validation=0.0)).train, task


def _also(settings: dict[str, Any], *flags: str, dest: str) -> dict[str, dict[str, Any]]:
    """The published names of one of our flags; help does not repeat them."""
    return {flag: {**settings, "dest": dest, "help": argparse.SUPPRESS} for flag in flags}


METHOD = {"default": "k-means", "help": f"{', '.join(METHODS)} (default: k-means)"}
N_TYPES = {"help": "clusters (default: 5)"}
MODEL = {"metavar": "MODEL", "help": "whose hidden states are clustered (default: smollm2-135m)"}
EPOCHS = {"metavar": "N", "help": "epochs of a vae (default: 100)"}
OUT = {"type": Path, "metavar": "DIR", "help": "folder to write: traces.jsonl, typer, picture"}
STEPS: dict[str, tuple[Any, ...]] = {
    "step-types": (
        _step_types,
        "kinds for the steps of own traces: clusters of their words or hidden states, or operators; with a picture",
        {
            "traces": {"nargs": "?", "help": ".jsonl file of traces, or a task (its training traces)"},
            "--method": METHOD,
            "--n-types": N_TYPES,
            "--out": OUT,
            "--model": MODEL,
            "--epochs": EPOCHS,
            "--min-frequency": {"metavar": "N", "help": "tf-idf: steps that a word must stand in (below 1: a share)"},
            "--max-frequency": {"metavar": "N", "help": "tf-idf: steps that it may stand in (to 1.0: a share)"},
            "--seed": {"help": "of the clusters (default: 0)"},
            "--batch-size": {"type": int, "default": 16, "help": "traces in one pass of the model (default: 16)"},
            **_also(METHOD, "--selection_method", dest="method"),
            **_also(N_TYPES, "--num_types", dest="n_types"),
            **_also(OUT, "--output_dir", dest="out"),
            **_also(MODEL, "--model_name_or_path", "--embedding_model_name", dest="model"),
            **_also(EPOCHS, "--train_epoch", dest="epochs"),
            **_also({}, "--min_frequency", dest="min_frequency"),
            **_also({}, "--max_frequency", dest="max_frequency"),
            **_also({"type": int, "default": 16}, "--batch_size", dest="batch_size"),
            "--dataset": {"help": argparse.SUPPRESS},
        },
    ),
}
