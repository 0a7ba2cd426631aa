"""Ways to other people's evaluators: task files for lm-eval, and our answers in its log format."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memreason.core.files import read_json
from memreason.core.recipe import load_recipe
from memreason.data.tasks import load_eval
from memreason.finetune.checkpoint import open_checkpoint
from memreason.generate.answer import read_samples
from memreason.publish.chat import refuse_demonstrations
from memreason.publish.lm_eval_log import log_samples, write_log
from memreason.publish.lm_eval_tasks import shipped, write_tasks
from memreason.report.gather import evaluations

__all__ = ["lm_eval_log", "lm_eval_tasks"]


def lm_eval_tasks(path: Path | str, out: Path, tasks: Sequence[str], fields: dict[str, Any]) -> list[str]:
    """Write the questions that `memreason eval` asks a run, checkpoint or export as tasks of lm-eval; returns their
    names there. `tasks` empty: the run's own. `fields` change how it is evaluated (eval.n, eval.split, eval.seed).
    """
    opened = open_checkpoint(path)
    refuse_demonstrations(opened.codec)
    trained = {f"eval.{name}": value for name, value in opened.recipe.eval.model_dump().items()}
    settings = load_recipe(None, {**trained, **fields}).eval
    named = tasks or [settings.task or opened.recipe.data.task]
    for task in named:  # before anything is fetched
        shipped(task)
    asked = {
        task: [
            trace.question
            for trace in load_eval(task, settings.split, opened.recipe.data, settings.n, seed=settings.seed)
        ]
        for task in named
    }
    return write_tasks(out, opened.codec, asked, settings.max_new_tokens)


def lm_eval_log(path: Path | str, out: Path) -> list[Path]:
    """Write the evaluations of a run, checkpoint or export (of a task and split the newest), or of one evaluation's
    folder, in lm-eval's log format; returns the files. Raises CheckpointError if there is none.
    """
    folders = evaluations(Path(path))
    codec = open_checkpoint(folders[0].parents[1]).codec
    logs = [log_samples(codec, read_json(folder / "results.json"), read_samples(folder)) for folder in folders]
    return write_log(out, codec, logs, max((folder / "results.json").stat().st_mtime for folder in folders))
