"""The table of tasks: where questions and traces come from, and how the published system prints them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from memreason.core.errors import DataError, TaskError
from memreason.core.files import cache_dir, read_traces, write_traces
from memreason.core.stages import DataRecipe
from memreason.core.trace import Trace
from memreason.data.atlas import make_atlas
from memreason.data.lines import prepared_lines
from memreason.data.mix import carve_validation, leak_guard, mix, subset
from memreason.data.published import ImportReport, import_published
from memreason.data.readers import read_hub
from memreason.data.sums import make_sums

__all__ = ["MADE", "TASKS", "Splits", "Task", "import_file", "load_eval", "load_splits"]

PUBLISHED_FOLDER = Path("load_data/dataset_folder")


@dataclass(frozen=True)
class Task:
    """One task. `published` names the labelled files of each split in the published folder layout."""

    splits: tuple[str, ...]
    about: str
    published: dict[str, str]
    question_template: str = "Question: {question}{choices}\n"
    choice_template: str = " {letter}. {choice}"
    solved: bool = False  # the hub's rows carry solutions, so they can be trained on as they are


SPLITS = ("train", "test")
MADE_SPLITS = ("train", "validation", "test")
TASKS = {
    "atlas": Task(
        MADE_SPLITS,
        "real facts of countries, made by a rule; nothing to download",
        {},
        choice_template=" {choice} ({letter})",
    ),
    "sums": Task(MADE_SPLITS, "arithmetic word problems, 2 to 4 steps, made by a rule; nothing to download", {}),
    "strategyqa": Task(
        SPLITS,
        "true or false, several hops (ChilleD/StrategyQA)",
        {"train": "StrategyQA_train_clean.json", "test": "StrategyQA_test_clean.json"},
    ),
    "commonsenseqa": Task(
        SPLITS,
        "five choices (tau/commonsense_qa)",
        {"train": "commonsense_qa_train_clean_CC.json", "test": "commonsense_qa_test_clean_CC.json"},
        "Question: {question}{choices}\n",
        " {letter}.{choice}",
    ),
    "truthfulqa": Task(
        SPLITS,
        "several choices (truthfulqa/truthful_qa, mc1)",
        {"train": "truthful_qa_train_clean_CC.json", "test": "truthful_qa_test_clean_CC.json"},
    ),
    "mmlu-pro": Task(SPLITS, "up to ten choices, many subjects (TIGER-Lab/MMLU-Pro)", {}),
    "gsm8k": Task(SPLITS, "school arithmetic with solutions (openai/gsm8k)", {}, solved=True),
    "math": Task(SPLITS, "competition mathematics (DigitalLearningGmbH/MATH-lighteval)", {}, solved=True),
    "aqua": Task(SPLITS, "arithmetic, five choices, with rationales (deepmind/aqua_rat)", {}, solved=True),
    "svamp": Task(SPLITS, "one-equation word problems (ChilleD/SVAMP)", {}, solved=True),
    "qa": Task(SPLITS, "StrategyQA with its own gold facts as memory lines (ChilleD/StrategyQA)", {}, solved=True),
}


def _atlas(split: str, n: int, data: DataRecipe) -> list[Trace]:
    return make_atlas(split, n, seed=data.seed, hops=data.hops, obscurity=data.obscurity)


# Tasks whose traces are made here: split, how many, recipe -> traces.
MADE: dict[str, Callable[[str, int, DataRecipe], list[Trace]]] = {
    "atlas": _atlas,
    "sums": lambda split, n, data: make_sums(split, n, seed=data.seed, hops=data.hops),
}


@dataclass(frozen=True)
class Splits:
    """What a training run reads, and what was left out of it."""

    train: list[Trace]
    validation: list[Trace]
    leaked: list[Trace]
    files: tuple[Path, ...] = ()


def task_named(name: str) -> Task:
    if name not in TASKS:
        raise TaskError(
            f"unknown task {name!r}. Known: {', '.join(TASKS)}. For traces of your own, give --data FILE.jsonl."
        )
    return TASKS[name]


def is_file(name: str) -> bool:
    """Whether a task's name is a file of one's own traces."""
    return name.endswith(".jsonl")


def imported_file(task: str, split: str) -> Path:
    """Where `memreason data import` puts a split."""
    return cache_dir() / "data" / task / f"{split}.jsonl"


def import_file(
    file: Path | str,
    task: str,
    *,
    split: str | None = None,
    out: Path | str | None = None,
    unknown: Literal["step", "trace"] = "step",
) -> tuple[Path, int, ImportReport]:
    """Read a published file into a trace file, `out` or the task's own of that split: (where, how many, report).

    Without a split, the file's own counts. `unknown` says what a label that is not understood costs.
    """
    task_named(task)
    traces, report = import_published(file, task, unknown=unknown)
    split = split or (traces[0].question.split if traces else "") or "train"
    where = Path(out) if out else imported_file(task, split)
    write_traces(where, [trace.with_question(split=split) for trace in traces])
    return where, len(traces), report


def load_eval(name: str, split: str, data: DataRecipe, n: int | None, seed: int = 0) -> list[Trace]:
    """Questions of a split, drawn without replacement; `n` None means all (made ones: 300). `name` may be a trace file.

    Raises TaskError for an unknown task or split, or for more questions than there are.
    """
    if is_file(name):
        own = read_traces(name)
        return subset(own, min(n, len(own)), seed=seed) if n else own
    task = task_named(name)
    if split not in task.splits:
        raise TaskError(f"task {name} has no split {split!r}. It has: {', '.join(task.splits)}.")
    if name in MADE:
        return MADE[name](split, n or 300, data)
    traces = _stored(name, task, split) or read_hub(name, split)
    return subset(traces, min(n, len(traces)), seed=seed) if n else traces


def _stored(name: str, task: Task, split: str, warn: Callable[[str], None] | None = None) -> list[Trace] | None:
    """Traces that the user imported, else the published folder's, else None."""
    imported = imported_file(name, split)
    if imported.is_file():
        return read_traces(imported)
    published = PUBLISHED_FOLDER / task.published.get(split, "")
    if published.is_file():
        traces, report = import_published(published, name)
        lost = len(report.unknown) + len(report.empty)
        if warn and (lost or report.read != report.kept):
            warn(
                f"{published}: {report.kept} of {report.read} traces kept, {lost} steps left out; "
                "`memreason data import` names them"
            )
        return traces
    return None


def load_splits(data: DataRecipe, warn: Callable[[str], None] = print) -> Splits:
    """Training and validation traces of a recipe, less every question that stands in the test split."""
    files: tuple[Path, ...] = ()
    held_out: list[Trace] = []
    if data.paths:
        sources = [_path_and_weight(spec) for spec in data.paths]
        files = tuple(path for path, _ in sources)
        traces = mix([(read_traces(path), weight) for path, weight in sources], seed=data.seed)
    elif data.task in MADE:
        train, held = (MADE[data.task](*part, data) for part in (("train", data.n_train or 2000), ("validation", 100)))
        return Splits(prepared_lines(train, data), prepared_lines(held, data), [])
    else:
        task = task_named(data.task)
        traces = _stored(data.task, task, "train", warn) or []
        if not traces and task.solved:  # `datasets` fetches all splits of a set together: the second one costs nothing
            traces, held_out = (read_hub(data.task, split) for split in ("train", "test"))
        if not traces:
            raise DataError(
                f"task {data.task} has questions but no labelled traces here. Import some (memreason data import FILE "
                f"--task {data.task} --split train) or give --data FILE.jsonl."
            )
    unlabelled = [trace for trace in traces if not trace.steps]
    if unlabelled:
        warn(f"left out {len(unlabelled)} traces without steps")
        traces = [trace for trace in traces if trace.steps]
    leaked: list[Trace] = []
    if data.task not in MADE:
        held_out = _stored(data.task, task_named(data.task), "test") or held_out
        traces, leaked = leak_guard(traces, held_out)
    if leaked:
        warn(f"left out {len(leaked)} training questions that stand in test, e.g. {leaked[0].question.text!r}")
    if data.n_train:
        traces = subset(traces, min(data.n_train, len(traces)), seed=data.seed)
    train, validation = carve_validation(traces, data.validation, seed=data.seed) if data.validation else (traces, [])
    if not train:
        raise DataError(f"no training traces are left of {data.paths or data.task}")
    return Splits(prepared_lines(train, data), prepared_lines(validation, data), leaked, files)


def _path_and_weight(spec: str) -> tuple[Path, float]:
    path, _, weight = spec.rpartition(":")
    try:
        return (Path(path), float(weight)) if path else (Path(spec), 1.0)
    except ValueError:
        return Path(spec), 1.0
