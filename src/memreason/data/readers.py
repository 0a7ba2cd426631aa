"""Reads questions of public data sets through `datasets`, from the hub or a local copy.

Where a set holds no solutions, questions come as traces without steps: those are what a teacher or a model adds.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from memreason.core.errors import DataError, TaskError
from memreason.core.trace import LETTERS, Question, Trace
from memreason.data.solved import aqua_rows, facts_as_steps, gsm8k_rows, math_rows, svamp_rows

__all__ = [
    "HUB_TASKS",
    "HubTask",
    "commonsenseqa_rows",
    "mmlu_pro_rows",
    "read_hub",
    "strategyqa_rows",
    "truthfulqa_rows",
]

OPTION_SEED = 0
TRAIN_SHARE = 0.8
FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}
TRUTHS = {"true": "True", "false": "False", "yes": "True", "no": "False"}

Rows = Iterable[Mapping[str, Any]]


def strategyqa_rows(rows: Rows, split: str = "") -> list[Trace]:
    """Yes/no questions; gold facts, where a row has them, become the question's facts.

    Questions about one term form a group. A decomposition is kept in meta: it asks, and states no fact.
    """
    return [_strategyqa(row, split, number) for number, row in enumerate(rows, 1)]


def _strategyqa(row: Mapping[str, Any], split: str, number: int) -> Trace:
    text = _text(row, "question", number)
    answer = TRUTHS.get(str(row.get("answer")).strip().lower())
    if answer is None:
        raise DataError(f"strategyqa, row {number}: 'answer' must be true or false, got {row.get('answer')!r}")
    meta: dict[str, Any] = {"source": HUB_TASKS["strategyqa"].hub_id}
    if row.get("term"):
        meta["group"] = str(row["term"])
    if row.get("decomposition"):
        meta["decomposition"] = list(_texts(row["decomposition"]))
    facts = _texts(row.get("facts")) or None
    return Trace(Question(text, answer, "strategyqa", split, facts=facts, meta=meta), ())


def commonsenseqa_rows(rows: Rows, split: str = "") -> list[Trace]:
    """Multiple choice. The letter is the place of the right choice, whatever its label was."""
    return [_commonsenseqa(row, split, number) for number, row in enumerate(rows, 1)]


def _commonsenseqa(row: Mapping[str, Any], split: str, number: int) -> Trace:
    text = _text(row, "question", number)
    given = row.get("choices") or []
    # A parquet copy holds two lists, a plain JSON copy may hold a list of pairs.
    pairs = list(zip(given["label"], given["text"], strict=True)) if isinstance(given, Mapping) else given
    labels = [pair["label"] if isinstance(pair, Mapping) else pair[0] for pair in pairs]
    choices = tuple(str(pair["text"] if isinstance(pair, Mapping) else pair[1]).strip() for pair in pairs)
    key = row.get("answerKey")
    if labels.count(key) != 1:
        raise DataError(
            f"commonsenseqa, row {number}: 'answerKey' must be one of {labels}, got {key!r}. "
            "The hub's own test split has no answers: its validation split is the test split here."
        )
    meta = {"source": HUB_TASKS["commonsenseqa"].hub_id}
    answer = LETTERS[labels.index(key)]
    return Trace(Question(text, answer, "commonsenseqa", split, choices=choices, meta=meta), ())


def truthfulqa_rows(rows: Rows, split: str = "", *, seed: int = OPTION_SEED) -> list[Trace]:
    """Multiple choice with one right answer (mc1), which the hub lists first: the choices are shuffled.

    The order depends on the question and the seed, which is kept in meta as `option_seed`.
    """
    return [_truthfulqa(row, split, number, seed) for number, row in enumerate(rows, 1)]


def _truthfulqa(row: Mapping[str, Any], split: str, number: int, seed: int) -> Trace:
    text = _text(row, "question", number)
    targets = row.get("mc1_targets") or {}
    labels, texts = list(targets.get("labels") or ()), list(targets.get("choices") or ())
    if labels.count(1) != 1 or len(labels) != len(texts):
        raise DataError(
            f"truthfulqa, row {number}: 'mc1_targets' needs as many labels as choices and a single label of 1, "
            f"got {len(texts)} choices and labels {labels}. Use the configuration multiple_choice."
        )
    order = list(range(len(texts)))
    random.Random(f"{seed}:{text}").shuffle(order)
    choices = tuple(str(texts[place]).strip() for place in order)
    answer = LETTERS[order.index(labels.index(1))]
    meta = {"source": HUB_TASKS["truthfulqa"].hub_id, "option_seed": seed}
    return Trace(Question(text, answer, "truthfulqa", split, choices=choices, meta=meta), ())


def mmlu_pro_rows(rows: Rows, split: str = "") -> list[Trace]:
    """Up to ten choices. Subject and source are kept in meta; questions of one source are no group."""
    return [_mmlu_pro(row, split, number) for number, row in enumerate(rows, 1)]


def _mmlu_pro(row: Mapping[str, Any], split: str, number: int) -> Trace:
    text = _text(row, "question", number)
    choices = tuple(str(choice).strip() for choice in row.get("options") or ())
    while choices and choices[-1] in ("", "N/A"):  # the set fills up short lists
        choices = choices[:-1]
    answer = str(row.get("answer")).strip()
    if len(answer) != 1 or answer not in LETTERS[: len(choices)]:
        raise DataError(f"mmlu-pro, row {number}: 'answer' must be one of {LETTERS[: len(choices)]}, got {answer!r}")
    meta = {"source": HUB_TASKS["mmlu-pro"].hub_id, "category": row.get("category"), "src": row.get("src")}
    return Trace(Question(text, answer, "mmlu-pro", split, choices=choices, meta=meta), ())


def _text(row: Mapping[str, Any], key: str, number: int) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"row {number}: {key!r} must be a non-empty text, got {value!r} (fields: {', '.join(row)})")
    return value.strip()


def _texts(value: Any) -> tuple[str, ...]:
    """A text, a list of texts or nothing, as a tuple of non-empty texts."""
    items = [value] if isinstance(value, str) else list(value or ())
    return tuple(str(item).strip() for item in items if str(item).strip())


@dataclass(frozen=True)
class HubTask:
    """Where a task lies on the hub. `splits` maps our split to the hub's; `cut` parts a single one: its first rows are
    for training, or as many that are drawn, where rows stand in an order of their own."""

    hub_id: str
    rows: Callable[[Rows, str], list[Trace]]
    splits: Mapping[str, str]
    config: str | None = None
    cut: Literal["", "first", "drawn"] = ""


def _qa_rows(rows: Rows, split: str = "") -> list[Trace]:
    return facts_as_steps(strategyqa_rows(rows, split), "qa")


BOTH = {"train": "train", "test": "test"}
HUB_TASKS = {
    "qa": HubTask("ChilleD/StrategyQA", _qa_rows, BOTH),
    "gsm8k": HubTask("openai/gsm8k", gsm8k_rows, BOTH, config="main"),
    "math": HubTask("DigitalLearningGmbH/MATH-lighteval", math_rows, BOTH, config="default"),
    "aqua": HubTask("deepmind/aqua_rat", aqua_rows, BOTH, config="raw"),
    "svamp": HubTask("ChilleD/SVAMP", svamp_rows, BOTH),
    "strategyqa": HubTask("ChilleD/StrategyQA", strategyqa_rows, BOTH),
    "commonsenseqa": HubTask("tau/commonsense_qa", commonsenseqa_rows, {"train": "train", "test": "validation"}),
    "truthfulqa": HubTask(
        "truthfulqa/truthful_qa",
        truthfulqa_rows,
        {"train": "validation", "test": "validation"},
        config="multiple_choice",
        cut="first",
    ),
    "mmlu-pro": HubTask("TIGER-Lab/MMLU-Pro", mmlu_pro_rows, {"train": "test", "test": "test"}, cut="drawn"),
}


def read_hub(task: str, split: str, *, path: Path | str | None = None, revision: str | None = None) -> list[Trace]:
    """The questions of one split, from the hub or from a local copy (a folder, or a file of that split).

    Raises TaskError for an unknown task or split and where the hub cannot be reached, DataError for a
    local copy that cannot be read.
    """
    if task not in HUB_TASKS:
        raise TaskError(f"{task}: unknown task of the hub. Known: {', '.join(HUB_TASKS)}")
    source = HUB_TASKS[task]
    if split not in source.splits:
        raise TaskError(f"{task}: has no split {split!r}. It has: {', '.join(source.splits)}")
    rows = _load_hub(task, source, split, revision) if path is None else _load_local(Path(path), source, split)
    traces = source.rows(rows, split)
    if source.cut:
        traces = _cut(traces, source.cut, split)
    if not traces:
        raise DataError(f"{path or source.hub_id}: the {split} split of {task} holds no questions")
    return traces


def _cut(traces: list[Trace], way: str, split: str) -> list[Trace]:
    border = int(TRAIN_SHARE * len(traces))
    places = list(range(len(traces)))
    if way == "drawn":
        random.Random(OPTION_SEED).shuffle(places)
    return [traces[place] for place in sorted(places[:border] if split == "train" else places[border:])]


def _load_hub(task: str, source: HubTask, split: str, revision: str | None) -> Rows:
    import datasets

    try:
        rows: Rows = datasets.load_dataset(source.hub_id, source.config, split=source.splits[split], revision=revision)
    except Exception as error:  # the hub's clients raise a dozen unrelated classes for "not reached"
        raise TaskError(
            f"{task}: {source.hub_id} could not be read from the hub ({_first_line(error)}). Connect to the network, "
            f"log in with `hf auth login` if it asks for that, or give a local copy as path."
        ) from error
    return rows


def _load_local(path: Path, source: HubTask, split: str) -> Rows:
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; give a local copy of {source.hub_id}")
    if path.is_file() and path.suffix.lower() not in FORMATS:
        raise DataError(f"{path}: {path.suffix or 'no ending'} is not read; known are {', '.join(FORMATS)}")
    try:
        loaded = _open_local(path, source)
    except Exception as error:  # each file format raises its own classes
        raise DataError(
            f"{path}: cannot be read as a local copy of {source.hub_id} ({_first_line(error)}). "
            "Give a folder of JSON or parquet files named by split, one saved by save_to_disk, or one such file."
        ) from error
    if not isinstance(loaded, Mapping):
        return loaded  # type: ignore[no-any-return]
    alone = [next(iter(loaded))] if len(loaded) == 1 and (path.is_file() or source.cut) else []
    name = next((name for name in (source.splits[split], split, *alone) if name in loaded), None)
    if name is None:
        raise DataError(f"{path}: has no split {source.splits[split]!r}, only {', '.join(loaded)}")
    rows: Rows = loaded[name]
    return rows


def _open_local(path: Path, source: HubTask) -> Any:
    """What `datasets` makes of a local copy: one data set, or one for each split."""
    import datasets

    if path.is_file():
        return datasets.load_dataset(FORMATS[path.suffix.lower()], data_files=str(path))
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return datasets.load_from_disk(str(path))
    named = source.config in datasets.get_dataset_config_names(str(path))
    return datasets.load_dataset(str(path), source.config if named else None)


def _first_line(error: BaseException) -> str:
    first = (str(error).strip().splitlines() or [""])[0].rstrip(".")
    return f"{type(error).__name__}: {first[:160]}"
