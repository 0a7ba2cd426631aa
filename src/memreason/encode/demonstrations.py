"""k-shot demonstrations: whole traces that stand before a question, chosen once, from the training traces alone.

In-context examples: Brown et al. 2020 (arXiv 2005.14165); by nearness to the question: Liu et al. 2022
(arXiv 2101.06804), whose nearest example stands last, as here.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from memreason.core.errors import CheckpointError, RecipeError
from memreason.core.files import read_traces, settings_hash, write_jsonl
from memreason.core.stages import DataRecipe
from memreason.core.trace import Question, Trace
from memreason.encode.nearness import by_embedding, by_words

__all__ = ["DEMONSTRATIONS_FILE", "Demonstrations", "choose_demonstrations", "read_demonstrations"]

DEMONSTRATIONS_FILE = "demonstrations.jsonl"
SAMPLE = 8  # traces whose loss behind each candidate is measured: 800 passes of the base with 100 candidates
Nearness = Callable[[Sequence[Question]], NDArray[np.float64]]  # of each question to each candidate, greater is nearer
LeastLoss = Callable[[Sequence[Trace], Sequence[Trace]], list[int]]  # candidates, sample -> places, best first


class Demonstrations:
    """`k` traces before each question, the best nearest to it.

    `pool` is in the order in which they are taken, or `nearness` ranks it anew for each question. A question never
    demonstrates itself: the next one is taken.
    """

    def __init__(self, pool: Sequence[Trace], k: int, nearness: Nearness | None = None) -> None:
        self.pool, self.k, self.nearness = tuple(pool), k, nearness
        self._ranks: dict[str, list[int]] = {}

    def rank(self, questions: Iterable[Question]) -> None:
        """Rank the pool for many questions at once, which an embedding does in batches."""
        if self.nearness is None:
            return
        new = list({question.id: question for question in questions if question.id not in self._ranks}.values())
        if new:
            best = np.argsort(-self.nearness(new), axis=1, kind="stable")[:, : self.k + 1]
            self._ranks |= {question.id: row.tolist() for question, row in zip(new, best, strict=True)}

    def of(self, question: Question) -> list[Trace]:
        """The `k` demonstrations of a question in the order in which they stand before it."""
        self.rank([question])
        order = self._ranks.get(question.id, range(len(self.pool)))
        return [self.pool[i] for i in order if self.pool[i].question.id != question.id][: self.k][::-1]

    @property
    def digest(self) -> str:
        """Names them, as manifest and token scheme keep it."""
        return settings_hash({"k": self.k, "pool": [_line(trace) for trace in self.pool]})

    def save(self, folder: Path) -> None:
        write_jsonl(folder / DEMONSTRATIONS_FILE, [_line(trace) for trace in self.pool])


def _line(trace: Trace) -> dict[str, object]:
    """What of a trace is shown."""
    return {key: value for key, value in trace.to_json().items() if key not in ("facts", "meta")}


def read_demonstrations(folder: Path, data: DataRecipe, digest: str) -> Demonstrations | None:
    """Those of a run or checkpoint, if it has some (`digest` is not empty).

    Raises CheckpointError if they are missing or are not those that it was trained with.
    """
    if not digest:
        return None
    path = folder / DEMONSTRATIONS_FILE
    if not path.is_file():
        raise CheckpointError(f"{path}: missing, and its questions were trained behind {data.k_shot} demonstrations")
    found = _ready(read_traces(path), data)
    if found.digest != digest:
        raise CheckpointError(f"{path}: holds other demonstrations ({found.digest}) than were trained with ({digest})")
    return found


def choose_demonstrations(
    traces: Sequence[Trace], data: DataRecipe, seed: int, least_loss: LeastLoss
) -> Demonstrations | None:
    """`data.k_shot` demonstrations out of training traces, drawn by the seed; None where none are asked for.

    `least_loss` ranks candidates by the loss of SAMPLE other traces behind them (demo_selection: prompt).
    Raises RecipeError if there are too few different questions: one more than k, as none demonstrates itself, and for
    prompt one more to be a sample.
    """
    if not data.k_shot:
        return None
    different = list({trace.question.id: trace for trace in traces}.values())
    needed = data.k_shot + 1
    least = needed + (data.demo_selection == "prompt")
    if len(different) < least:
        raise RecipeError(
            f"data.k_shot: {data.k_shot} demonstrations ({data.demo_selection}) need {least} different training "
            f"questions, there are {len(different)}",
            "train",
        )
    drawn = random.Random(seed).sample(different, len(different))
    if data.demo_selection == "uniform":
        return _ready(drawn[:needed], data)
    size = data.candidate_size
    if data.demo_selection == "similar":
        return _ready(drawn[:size], data)
    size = min(size, max(needed, len(drawn) - SAMPLE))
    pool, sample = drawn[:size], drawn[size:][:SAMPLE]
    return _ready([pool[i] for i in least_loss(pool, sample)[:needed]], data)


def _ready(pool: Sequence[Trace], data: DataRecipe) -> Demonstrations:
    nearness = None
    if data.demo_selection == "similar":
        asked = [trace.question for trace in pool]
        nearness = by_embedding(asked, data.demo_model) if data.demo_model else by_words(asked)
    return Demonstrations(pool, data.k_shot, nearness)
