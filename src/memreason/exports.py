"""The ways out of a run: merged weights, adapter, GGUF, the hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memreason.core.errors import DataError, ExportError, TaskError
from memreason.core.recipe import Recipe
from memreason.core.trace import Question
from memreason.data.tasks import load_eval, load_splits
from memreason.finetune.checkpoint import Checkpoint, open_checkpoint
from memreason.publish.adapter import export_adapter
from memreason.publish.chat import refuse_demonstrations
from memreason.publish.export import Step, export_model, unheard
from memreason.publish.gguf import GGUF, export_gguf
from memreason.publish.merge import refuse_sparse
from memreason.publish.push import check_pushable, push

__all__ = ["check_pushable", "export", "next_steps", "push"]

ASKED = 20  # questions whose traces are compared


def export(
    path: Path | str,
    out: Path | str | None = None,
    *,
    to: str = "hf",
    base: str | None = None,
    dtype: str = "bf16",
    gguf_type: str = "f16",
    converter: Path | None = None,
    name: str | None = None,
    tell: Step = unheard,
) -> Path:
    """Export a run (its best checkpoint) or a checkpoint to `out` (None: a folder of its own beside the weights), which
    is returned once everything about it was checked; `tell` hears of each check. Its card calls it `name`, as the hub
    will (None: as its folder).

    `to`: "hf" (merged weights, stored as `dtype`), "adapter" (for plain PEFT) or "gguf" (of `gguf_type`). Raises
    ExportError, and leaves nothing, if a check fails.
    """
    folder = Path(out) if out else Path(path) / f"export-{to}"
    opened = open_checkpoint(path)
    _refuse_untrained(opened)
    refuse_sparse(opened)  # before its weights are read
    refuse_demonstrations(opened.codec)
    questions = _questions(opened.recipe)
    if to == "adapter":
        export_adapter(path, folder, questions, base=base, name=name, tell=tell)
    elif to == "gguf":
        export_gguf(path, folder, questions, base=base, kind=gguf_type, script=converter, name=name, tell=tell)
    else:
        export_model(path, folder, questions, base=base, dtype=dtype, name=name, tell=tell)
    return folder


def _refuse_untrained(opened: Checkpoint) -> None:
    if opened.recipe.method.name == "prompting":
        raise ExportError(
            f"{opened.folder}: nothing was trained (method prompting), so its base {opened.recipe.model.base} is all "
            "that there is. Serve that, and ask it with --eval.engine chat"
        )


def _questions(recipe: Recipe) -> Sequence[Question]:
    """Of the run's task, or where its test questions are not at hand, of its training data."""
    try:
        asked = load_eval(recipe.data.task, recipe.eval.split, recipe.data, None, seed=0)
    except (TaskError, DataError):
        asked = load_splits(recipe.data).train
    return [trace.question for trace in asked[:ASKED]]


def next_steps(folder: Path, to: str) -> list[tuple[str, Any]]:
    """What to do with it, as rows to print."""
    steps = {
        "hf": [("serve it", f"vllm serve {folder}"), ("evaluate it", f"memreason eval {folder}")],
        "adapter": [("load it", f"see {folder / 'README.md'}")],
        "gguf": [("serve it", f"llama-server -m {folder / GGUF}")],
    }
    return list(steps[to])
