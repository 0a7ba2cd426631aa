"""The verbs that look inside a trained run: whose fault a wrong answer is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from tqdm import tqdm

from memreason.core.files import read_traces, write_json, write_jsonl, write_traces
from memreason.core.recipe import EvalRecipe
from memreason.core.trace import Trace
from memreason.data.tasks import load_eval
from memreason.finetune.checkpoint import Checkpoint, load_checkpoint
from memreason.generate.onward import continue_traces
from memreason.measure.attribute import attribute, fault_table
from memreason.measure.counterfactual import INTERVENTIONS, begin, compare_ways
from memreason.pipeline import evaluate

__all__ = ["faults"]


def faults(
    path: Path | str,
    *,
    settings: EvalRecipe | None = None,
    base: str | None = None,
    checkpoint: Checkpoint | None = None,
    counterfactual: bool = False,
) -> dict[str, Any]:
    """Whose fault each wrong answer of an evaluation is: exactly, so on atlas. Evaluates first what is not yet.

    Writes faults.jsonl (a line for each question: verdict and evidence) and faults.json beside the samples. With
    `counterfactual` each question is answered anew with other memory lines given, and both ways are compared.
    Raises TaskError for a task whose facts are not known.
    """
    loaded = checkpoint or load_checkpoint(path, base=base)
    results = evaluate(path, settings=settings, base=base, checkpoint=loaded)
    folder = Path(results["folder"])
    made = read_traces(folder / "samples.jsonl")
    found = [attribute(trace) for trace in made]
    table = {**fault_table(found), "task": results["task"], "split": results["split"], "folder": str(folder)}
    if counterfactual:
        tried = _interventions(loaded, made, EvalRecipe(**results["settings"]), results["task"], folder)
        table["counterfactual"] = compare_ways(found, tried)
    if PartialState().is_main_process:
        write_jsonl(folder / "faults.jsonl", (one.to_json() for one in found))
        write_json(folder / "faults.json", table)
    return table


def _interventions(
    loaded: Checkpoint, made: Sequence[Trace], settings: EvalRecipe, task: str, folder: Path
) -> dict[str, list[Trace]]:
    """What the traces become with other memory lines; each intervention is kept once it is whole."""
    gold = {
        trace.question.id: trace
        for trace in load_eval(task, settings.split, loaded.recipe.data, settings.n, seed=settings.seed)
    }
    tried = {}
    for name in INTERVENTIONS:
        path = folder / f"given-{name}.jsonl"
        if not path.is_file():
            begun = begin(name, made, gold)
            write_traces(path, tqdm(continue_traces(loaded.model, loaded.codec, begun, settings), name, len(begun)))
        tried[name] = read_traces(path)
    return tried
