"""How much there is to compute: lengths of the examples of a recipe, its passes and steps, and its questions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from memreason.core.errors import DataError, ModelError, RecipeError, TaskError
from memreason.core.recipe import Recipe
from memreason.data.tasks import MADE, is_file, load_eval
from memreason.encode.base import BUILT_IN
from memreason.encode.examples import split_packed
from memreason.finetune.prepare import Prepared, prepare
from memreason.timing.skeleton import out_of_reach, shipped_size

__all__ = ["Workload", "batches", "workload"]

TABLE = Path(__file__).with_name("workload.yaml")
PERCENTILES = [0, 25, 50, 75, 100]
STAND_IN = next(iter(BUILT_IN))


@dataclass(frozen=True)
class Workload:
    """Tokens of each example, in the data's order, the share of them that is supervised, how many entries the
    tokenizer has, questions to evaluate on and to choose the epoch with, tokens of a question, and where all that is
    from."""

    lengths: np.ndarray
    supervised: float
    tokenizer: int
    questions: int
    chosen_on: int
    prompt: float
    source: str
    dropped: int = 0
    cut: int = 0
    validation: int = 0
    streamed: int = 0  # traces in a stream that the examples are pieces of

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())

    @property
    def answer(self) -> float:
        """Tokens of a trace, from its first block to the end."""
        if self.streamed:
            return self.tokens / self.streamed - self.prompt
        return self.tokens * self.supervised / len(self.lengths)


def workload(recipe: Recipe, *, traces: int | None = None, tokens: int | None = None) -> Workload:
    """From the recipe's own data if it is at hand, counted with its model's tokenizer or, where that is out of reach,
    the built-in model's; else from `traces` examples of `tokens` tokens or the table's figures of the task."""
    if recipe.method.name == "prompting":
        raise RecipeError("method.name: prompting trains nothing, so there is nothing to estimate", "estimate")
    if traces is None and tokens is None:
        for other in (None, STAND_IN):
            try:
                return encoded(recipe, _prepared(recipe, other), other)
            except (DataError, TaskError):
                break
            except ModelError:
                continue
    return _assumed(recipe, traces, tokens)


def _prepared(recipe: Recipe, other: str | None) -> Prepared:
    if other is None and out_of_reach(recipe):
        raise ModelError(f"{recipe.model.base}: not fetched yet")
    model = recipe.model.model_copy(update={"base": other, "revision": None}) if other else recipe.model
    # other demonstrations are about as long, and need weights to be chosen
    as_long = {"demo_selection": "uniform", "demo_model": None}
    data = recipe.data.model_copy(update=as_long)
    return prepare(recipe.model_copy(update={"model": model, "data": data}), warn=lambda _: None)


def encoded(recipe: Recipe, ready: Prepared, other: str | None = None) -> Workload:
    """From what stands before training."""
    rows, codec = ready.examples.rows, ready.codec
    stands_in = f" with {other}'s tokenizer, as the model's own is out of reach" if other else ""
    held, select = len(ready.splits.validation), recipe.train.n_select
    asked = [len(codec.question_ids(trace.question)) for trace in ready.splits.train[:200]]
    questions = _questions(recipe)
    return Workload(
        lengths=rows.lengths,
        supervised=float(rows.supervised.mean()),
        tokenizer=(other and shipped_size(recipe.model.base)) or len(codec.tokenizer) - len(codec.scheme.tokens),
        questions=questions,
        chosen_on=min(select, questions if recipe.train.select_on == "test" else held),
        prompt=float(np.mean(asked)),
        source=f"the recipe's own, encoded{stands_in}",
        dropped=ready.examples.dropped,
        cut=ready.examples.cut,
        validation=held,
        streamed=len(ready.splits.train) if recipe.train.mode == "constant_len" else 0,
    )


def _assumed(recipe: Recipe, traces: int | None, tokens: int | None) -> Workload:
    """From what the user gives, or else the table."""
    task = recipe.data.task if recipe.data.task in _table() else "strategyqa"
    row = _table()[task]
    count = traces or recipe.data.n_train or row["train"]
    question, trace = (np.interp(np.linspace(0, 100, count), PERCENTILES, row[name]) for name in ("question", "trace"))
    share = float(trace.mean() / (question.mean() + trace.mean()))
    lengths = np.full(count, tokens) if tokens else (question.mean() + trace).round().astype(int)
    lengths = np.minimum(lengths, recipe.train.model_max_length)
    held = round(count * recipe.data.validation)
    each = f"{lengths.mean():.0f} tokens each" + ("" if tokens else f" as the published ones of {task} have")
    questions = _questions(recipe)
    return Workload(
        lengths=np.random.default_rng(recipe.data.seed).permutation(lengths)[held:],
        supervised=share,
        tokenizer=shipped_size(recipe.model.base) or 0,
        questions=questions,
        chosen_on=min(recipe.train.n_select, questions if recipe.train.select_on == "test" else held),
        prompt=float(lengths.mean() * (1 - share)),
        source=f"{'given' if traces or tokens else 'not at hand, assumed'}: {count:,} traces of {each}",
        validation=held,
    )


def _questions(recipe: Recipe) -> int:
    """How many are evaluated on; those of the hub are not fetched for it."""
    settings = recipe.eval
    task = settings.task or recipe.data.task
    if is_file(task):
        return len(load_eval(task, settings.split, recipe.data, settings.n, seed=settings.seed))
    known = _table().get(task)
    if known is None or task in MADE:
        return settings.n or 300
    return min(settings.n or int(known["test"]), int(known["test"]))


@cache
def _table() -> dict[str, dict[str, Any]]:
    table: dict[str, dict[str, Any]] = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    return table


def batches(lengths: np.ndarray, size: int, order: str, seed: int) -> Iterator[np.ndarray]:
    """Lengths of the examples of each batch of one epoch."""
    if order == "random":
        lengths = np.random.default_rng(seed).permutation(lengths)
    elif order == "group_by_length":
        lengths = np.sort(lengths)
    for start in range(0, len(lengths), size):
        yield lengths[start : start + size]


def pieces(batch: np.ndarray, limit: int) -> list[tuple[int, ...]]:
    """A packed batch as the trainer splits it: the lengths of each piece."""
    ends = torch.tensor([0, *batch.tolist()]).cumsum(0)
    return [tuple(part["cu_seq_lens_q"].diff().tolist()) for part in split_packed({"cu_seq_lens_q": ends}, limit)]
