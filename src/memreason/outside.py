"""The verbs of memory from outside: when is a model unsure of its lines, and what does looking them up bring?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import PartialState

from memreason.core.errors import RecipeError, TaskError
from memreason.core.files import read_json, settings_hash, write_json, write_traces
from memreason.core.stages import EvalRecipe
from memreason.data.tasks import is_file, load_splits, task_named
from memreason.finetune.checkpoint import Checkpoint, checkpoint_for, load_checkpoint
from memreason.generate.answer import read_samples
from memreason.measure.unsure import CALIBRATION, QUANTILES, calibrated
from memreason.pipeline import evaluate
from memreason.report.retrieval import draw_curve

__all__ = ["calibrate", "retrieval_curve"]

REPORTED = ("accuracy", "interval", "correct", "n", "folder")


def calibrate(
    path: Path | str,
    *,
    settings: EvalRecipe | None = None,
    base: str | None = None,
    checkpoint: Checkpoint | None = None,
) -> dict[str, Any]:
    """Find the log-probability below which a memory line is worth looking up, on validation questions.

    Evaluates them first, from the model's own memory. Writes calibration.json beside the weights.
    Raises TaskError where there are no validation questions, or none of their lines is false.
    """
    loaded = checkpoint or checkpoint_for(settings, path, base=base)
    used = _recalling(_on_validation(settings or loaded.recipe.eval, loaded))
    results = evaluate(path, settings=used, base=base, checkpoint=loaded)
    found = calibrated(read_samples(Path(results["folder"])))
    table = {**found, "task": results["task"], "split": results["split"], "folder": results["folder"]}
    if PartialState().is_main_process:
        write_json(loaded.folder / CALIBRATION, table)
    return table


def _recalling(settings: EvalRecipe) -> EvalRecipe:
    return settings.model_copy(update={"memory": "recall", "unsure_below": None})


def _on_validation(settings: EvalRecipe, loaded: Checkpoint) -> EvalRecipe:
    """The task's validation split, else what training held out, as a file beside the weights."""
    task = settings.task or loaded.recipe.data.task
    if not is_file(task) and "validation" in task_named(task).splits:
        return settings.model_copy(update={"split": "validation"})
    held = load_splits(loaded.recipe.data).validation
    if not held:
        raise TaskError(
            f"{task}: no questions were held out to calibrate with (data.validation). Give --eval.unsure_below"
        )
    file = loaded.folder / "validation.jsonl"
    if PartialState().is_main_process:
        write_traces(file, held)
    PartialState().wait_for_everyone()
    return settings.model_copy(update={"task": str(file)})


def retrieval_curve(
    path: Path | str,
    *,
    settings: EvalRecipe,
    base: str | None = None,
    checkpoint: Checkpoint | None = None,
) -> dict[str, Any]:
    """Accuracy against the share of memory lines that are retrieved: none, all, and those below several thresholds,
    the calibrated one and quantiles of the sureness on validation. Calibrates first where that was not done.

    Each point is an evaluation of its own, and resumes. Writes curve.json and, with Matplotlib, curve.svg to
    retrieve/TASK-SPLIT-HASH beside the weights. Raises RecipeError without a corpus.
    """
    if not settings.corpus:
        raise RecipeError("eval.corpus: what shall be searched? e.g. --eval.corpus atlas, or FILE.jsonl", "retrieve")
    if settings.engine != "local":
        raise RecipeError(f"eval.engine: {settings.engine} does not stop at memory lines; leave it out", "retrieve")
    loaded = checkpoint or load_checkpoint(path, base=base)
    known = loaded.folder / CALIBRATION
    table = read_json(known) if known.is_file() else calibrate(path, settings=settings, base=base, checkpoint=loaded)
    points = []
    for name, changes in _points(table).items():
        used = _recalling(settings).model_copy(update=changes)
        results = evaluate(path, settings=used, base=base, checkpoint=loaded)
        row = {key: results[key] for key in REPORTED}
        threshold, share = changes.get("unsure_below"), results.get("retrieved", 0.0)
        points.append({"name": name, "unsure_below": threshold, "retrieved": share, **row})
    points.sort(key=lambda point: point["retrieved"])
    about = {"task": results["task"], "split": results["split"], "corpus": settings.corpus}
    hashed = settings_hash({"points": [point["folder"] for point in points]})
    folder = loaded.folder / "retrieve" / f"{Path(about['task']).stem}-{about['split']}-{hashed}"
    curve = {**about, "calibration": table, "points": points, "folder": str(folder)}
    if PartialState().is_main_process:
        write_json(folder / "curve.json", curve)
        draw_curve(curve, folder / "curve.svg")
    return curve


def _points(calibration: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What to evaluate: name -> settings that differ."""
    unsure = {"memory": "retrieve-when-unsure"}
    below = {f"{share} % least sure": calibration["quantiles"][str(share)] for share in QUANTILES}
    below["calibrated"] = calibration["threshold"]
    return {
        "recall": {},
        **{name: {**unsure, "unsure_below": threshold} for name, threshold in below.items()},
        "retrieve": {"memory": "retrieve"},
    }
