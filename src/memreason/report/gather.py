"""What a report shows, read from the folders of runs: settings, curve, figures, every trace. No torch."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from memreason.core.errors import CheckpointError
from memreason.core.files import read_json, read_jsonl
from memreason.core.trace import MEMORY, Trace
from memreason.data.atlas import memory_line_true
from memreason.measure.confidence import line_figures
from memreason.measure.score import score_trace
from memreason.measure.stats import mcnemar_exact, paired_bootstrap, wilson
from memreason.measure.unsure import CALIBRATION

__all__ = ["UNSURE", "evaluations", "flagged_below", "gather"]

# A line is flagged whose tokens have less probability than this, in the geometric mean, where nothing was calibrated.
# In the demo run 8 of 37 memory lines below it are true, and 129 of 139 above.
UNSURE = 0.9
FINDINGS = ("faults", "confidence", "attention", "probe")  # files beside the samples, each of its own command
Row = dict[str, Any]


def gather(paths: Sequence[Path | str]) -> dict[str, Any]:
    """All that a page shows of these runs, checkpoints or evaluation folders, as plain values.

    {"runs": [each with its settings, learning curve, evaluations, curves of retrieval, and `unsure`: under which
    probability a line is flagged], "comparisons": [each later run against the first], "traces": [one object a question
    (and sample), its `of` holding what each run made of it, or None]}. Of several evaluations of a checkpoint on a task
    and split the newest counts; one with retrieved lines that a curve was drawn from only where there is no other.
    Raises CheckpointError for a folder that holds none.
    """
    rows: dict[tuple[str, int], Row] = {}
    runs = []
    for place, path in enumerate(map(Path, paths)):
        folders = evaluations(path)
        runs.append(_run(path, folders))
        for folder in folders:
            for key, question, trace in _traces(folder):
                rows.setdefault(key, {**question, "of": [None] * len(paths)})["of"][place] = trace
    _name_apart(runs)
    traces = list(rows.values())
    later = range(1, len(runs))
    found = {
        "runs": runs,
        "comparisons": [one for place in later for one in _comparisons(runs, place, traces)],
        "traces": traces,
    }
    clean: dict[str, Any] = _finite(found)
    return clean


def _finite(value: Any) -> Any:
    """The same without nan and infinity, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(one) for key, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list | tuple) else value


def _checkpoint(path: Path) -> Path:
    """The checkpoint that a run's evaluations belong to: the best, else the newest that was evaluated."""
    best = (_optional(path / "manifest.json") or {}).get("best") or {}
    if best.get("checkpoint"):
        return path / str(best["checkpoint"])
    evaluated = {found.parents[2] for found in path.glob("checkpoint-*/eval/*/results.json")}
    return max(evaluated, key=lambda one: int(re.sub(r"\D", "", one.name) or 0), default=path)


def evaluations(path: Path) -> list[Path]:
    """Folders with results, one for each task and split, in the order of their names."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such run, checkpoint or evaluation")
    if (path / "samples.jsonl").is_file() and (path / "results.json").is_file():
        return [path]
    within = path if (path / "eval").is_dir() else _checkpoint(path)
    points = {Path(one["folder"]).name for curve in _drawn(within) for one in curve["points"] if one["retrieved"]}

    def age(one: Path) -> tuple[bool, float, Path]:
        return one.parent.name not in points, one.stat().st_mtime, one

    found = sorted(within.glob("eval/*/results.json"), key=age)
    newest = {(results["task"], results["split"]): one.parent for one in found for results in [read_json(one)]}
    if not newest:
        raise CheckpointError(f"{path}: holds no evaluation. Make one first: memreason eval {path}")
    return sorted(newest.values())


def _drawn(checkpoint: Path) -> list[Row]:
    """Every curve of retrieval of a checkpoint, the oldest first."""
    found = sorted(checkpoint.glob("retrieve/*/curve.json"), key=lambda one: (one.stat().st_mtime, one))
    return [read_json(one) for one in found]


def flagged_below(checkpoint: Path) -> Row:
    """Below which probability a checkpoint's lines are flagged as unsure, and where that was calibrated, if it was."""
    found = _optional(checkpoint / CALIBRATION)
    if found is None:
        return {"below": UNSURE, "on": None}
    return {"below": _probability(found["threshold"]), "on": f"{Path(found['task']).stem} / {found['split']}"}


def _optional(path: Path) -> Any:
    return read_json(path) if path.is_file() else None


def _run(path: Path, folders: Sequence[Path]) -> dict[str, Any]:
    checkpoint = folders[0].parents[1]
    run = checkpoint.parent if (checkpoint.parent / "manifest.json").is_file() else checkpoint
    recipe = next((one for one in (run / "recipe.yaml", checkpoint / "recipe.yaml") if one.is_file()), None)
    return {
        "name": run.resolve().name,
        "path": str(path),
        "checkpoint": checkpoint.name,
        "recipe": recipe.read_text(encoding="utf-8") if recipe else None,
        "manifest": _optional(run / "manifest.json"),
        "curve": _curve(run, checkpoint),
        "unsure": flagged_below(checkpoint),
        "retrieval": list({(one["task"], one["split"], one["corpus"]): one for one in _drawn(checkpoint)}.values()),
        "evaluations": [_evaluation(folder) for folder in folders],
    }


def _curve(run: Path, checkpoint: Path) -> dict[str, list[list[float]]]:
    """Loss and accuracy on held-out questions, as [step, value], from the Trainer's log."""
    files = [_optional(folder / "trainer_state.json") for folder in (run, checkpoint)]
    history: list[Row] = next((state["log_history"] for state in files if state), [])
    return {name: [[one["step"], one[name]] for one in history if name in one] for name in ("loss", "eval_acc")}


def _evaluation(folder: Path) -> dict[str, Any]:
    results = read_json(folder / "results.json")
    findings = {name: _optional(folder / f"{name}.json") for name in FINDINGS}
    return {**results, "task": Path(results["task"]).stem, "folder": str(folder), **findings}


def _name_apart(runs: Sequence[Row]) -> None:
    """Runs of one name are called by their paths."""
    names = [run["name"] for run in runs]
    for run in runs:
        if names.count(run["name"]) > 1:
            run["name"] = run["path"]


def _traces(folder: Path) -> Iterator[tuple[tuple[str, int], Row, Row]]:
    """Each sample of an evaluation: its key, its question, and what was made of it."""
    faults: dict[str, list[Row]] = defaultdict(list)
    path = folder / "faults.jsonl"
    for _, fault in read_jsonl(path) if path.is_file() else ():
        faults[fault["id"]].append(fault)  # of several samples in their order
    for number, sample in read_jsonl(folder / "samples.jsonl"):
        trace = Trace.from_json(sample, f"{folder / 'samples.jsonl'}:{number}")
        found = faults[trace.question.id]
        key = (trace.question.id, int(sample["meta"].get("sample", 0)))
        yield key, _question(trace, key), _made(trace, sample, found.pop(0) if found else {})


def _question(trace: Trace, key: tuple[str, int]) -> Row:
    question = trace.question
    return {
        "id": f"{key[0]}.{key[1]}" if key[1] else key[0],
        "task": Path(question.task).stem,
        "split": question.split,
        "form": question.meta.get("form"),
        "group": question.group,
        "question": question.text,
        "choices": list(question.choices or ()),
        "gold": question.answer,
    }


def _made(trace: Trace, sample: Row, fault: Row) -> Row:
    """What a run made of a question: the lines with their figures, the verdict and how it was found."""
    score, checkable = score_trace(trace), trace.question.task == "atlas"
    own = {one["step"]: one["text"] for one in sample["meta"].get("recalled", ())}
    figures = line_figures(sample)
    lines = []
    for place, step in enumerate(trace.steps):
        known = figures[place] if place < len(figures) else {}
        memory = MEMORY in step.kinds
        line = {"kind": "+".join(step.kinds), "text": step.text, "p": _probability(known.get("logprob"))}
        line |= {name: _rounded(known.get(name)) for name in ("entropy", "margin")}
        if memory:
            line["fact"] = memory_line_true(step.text) if checkable else None
        lines.append({**line, **({"source": step.source, "own": own.get(place)} if step.source else {})})
    return {
        "verdict": score.verdict,
        "extracted": score.extracted,
        "rule": score.rule,
        "read": score.evidence,
        "prediction": trace.prediction or "",
        "lines": lines,
        "p": min((line["p"] for line in lines if line["p"] is not None), default=None),
        "fault": fault.get("verdict"),
        "memory": fault.get("memory", []),
        "reason": fault.get("reason", []),
        "ways": fault.get("ways", {}),
        "tried": fault.get("counterfactual", {}).get("gold") if score.verdict != "correct" else None,
        "defects": list(trace.faults),
    }


def _probability(logprob: float | None) -> float | None:
    return None if logprob is None else _rounded(math.exp(logprob))


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _comparisons(runs: Sequence[Row], place: int, traces: Sequence[Row]) -> Iterator[Row]:
    """A later run against the first, on the questions of each task that both answered."""
    for task in sorted({row["task"] for row in traces}):
        both = [row for row in traces if row["task"] == task and row["of"][0] and row["of"][place]]
        if not both:
            continue
        first, other = ([row["of"][which]["verdict"] == "correct" for row in both] for which in (0, place))
        difference, *interval = paired_bootstrap(other, first, [row["group"] for row in both], samples=2000)
        yield {
            "task": task,
            "first": runs[0]["name"],
            "other": runs[place]["name"],
            "n": len(both),
            "accuracy": [_share(first), _share(other)],
            "difference": difference,
            "interval": interval,
            "p": mcnemar_exact(first, other),
            "only_first": sum(a and not b for a, b in zip(first, other, strict=True)),
            "only_other": sum(b and not a for a, b in zip(first, other, strict=True)),
        }


def _share(correct: Sequence[bool]) -> Row:
    return {"share": sum(correct) / len(correct), "wilson": list(wilson(sum(correct), len(correct)))}
