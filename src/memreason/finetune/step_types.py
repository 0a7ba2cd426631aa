"""The step types of a run: fitted on its training traces alone, kept in its folder, read there when it goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from accelerate import PartialState

from memreason.core.kinds import CLUSTERED
from memreason.core.recipe import Recipe
from memreason.data.tasks import Splits
from memreason.encode.scheme import TokenScheme
from memreason.encode.step_types.typer import fit_typer, load_typer, save_typer, with_types

__all__ = ["FOLDER", "with_step_types"]

FOLDER = "step_types"


def with_step_types(
    recipe: Recipe, splits: Splits, scheme: TokenScheme, run: Path | None, warn: Callable[[str], None]
) -> Splits:
    """Splits whose steps have the kinds that the recipe's clusters give them; others than clusters change nothing.

    With a `run` folder the typer is kept there, and of a run that is gone on with it is the one that lies there.
    Validation traces are told by it too, and never fitted on.
    """
    if recipe.data.step_types not in CLUSTERED:
        return splits
    # Only a run is written to: a checkpoint may lie anywhere.
    kept = run / FOLDER if run and (run / "recipe.yaml").is_file() else None
    with PartialState().main_process_first():  # the others find its typer, and the vectors in the cache
        if kept and kept.is_dir():
            typer = load_typer(kept)
        else:
            warn(f"learning step types ({recipe.data.step_types}) from {len(splits.train)} training traces")
            typer = fit_typer(splits.train, recipe, (scheme.question_template, scheme.choice_template))
            if kept:
                save_typer(typer, kept)
        train, validation = (with_types(typer, traces) for traces in (splits.train, splits.validation))
    return replace(splits, train=train, validation=validation)
