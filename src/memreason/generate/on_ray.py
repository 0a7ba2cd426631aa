"""Questions answered by workers on Ray: on the cores or GPUs of this machine, or of a whole cluster (RAY_ADDRESS).

Rows go out as a Ray data set, in shards of which each holds short prompts and long ones alike; every worker reads the
checkpoint once and lets the settings' own engine answer shard after shard. A shard whose worker is lost is done again
by another. An answer hangs on nothing but its row, which brings its prompt and random state along: it is that of one
process.
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState

from memreason.core.errors import EngineError, MemreasonError
from memreason.core.recipe import load_recipe
from memreason.core.stages import EvalRecipe
from memreason.encode.base import DTYPES, pick_dtype
from memreason.encode.codec import Codec
from memreason.finetune.checkpoint import Checkpoint, Elsewhere, checkpoint_for
from memreason.generate.cluster import connected, reason, share_of
from memreason.generate.rows import Engine, Row

__all__ = ["on_ray"]

log = logging.getLogger("memreason")

TRIES = 4  # of a shard whose worker is lost: a question that takes the memory of any machine must not go round for ever


class _Job(NamedTuple):
    """What a worker needs to know: where it would stand here, which checkpoint it reads and how, and what answers."""

    stand: Path
    folder: Path
    changes: dict[str, Any]
    dtype: str
    settings: EvalRecipe
    engine: Engine


def on_ray(engine: Engine) -> Engine:
    """The same engine in `settings.ray` workers, which share the rows. Its model is an Elsewhere: they read it.

    Raises EngineError if Ray is not there, or a worker cannot do its part.
    """
    return partial(_share_out, engine)


def _share_out(
    engine: Engine, model: Any, codec: Codec, waiting: deque[Row], settings: EvalRecipe
) -> Iterator[list[Row]]:
    if not waiting:
        return
    if PartialState().num_processes > 1:
        raise EngineError("eval.ray shares questions out itself: start one process, without accelerate or torchrun")
    assert settings.ray
    ray = connected(settings.ray)
    shards = _shards(list(waiting), settings.ray, settings.batch_size)
    waiting.clear()
    share, room = share_of(ray.nodes(), settings.ray)
    if room < settings.ray:
        log.warning("eval.ray: %d workers wanted, there is room for %d", settings.ray, room)
    most = min(settings.ray, len(shards))
    pool = {"min_size": max(1, min(room, most)), "max_size": most, "max_tasks_in_flight_per_actor": 1}
    asked = ray.data.from_items([{"rows": pickle.dumps(rows)} for rows in shards], override_num_blocks=len(shards))
    with warnings.catch_warnings(action="ignore"):  # the limit of tries is to get another name in Ray 2.64
        answered = asked.map(
            _Worker,
            fn_constructor_args=(_job(model, settings, engine),),
            compute=ray.data.ActorPoolStrategy(**pool),
            max_task_retries=TRIES - 1,
            **share,
        )
    try:
        for shard in answered.iter_batches(batch_size=1, prefetch_batches=0):
            rows, problem = pickle.loads(shard["rows"][0])
            if problem:
                raise EngineError(problem)
            yield rows
    except ray.exceptions.RayError as error:
        raise EngineError(f"eval.ray: {reason(error)}. Run the same command again to go on") from error


def _job(model: Any, settings: EvalRecipe, engine: Engine) -> _Job:
    if not isinstance(model, Elsewhere):
        raise EngineError("eval.ray: the workers read the model from its checkpoint, and this one is in memory here")
    auto = pick_dtype("auto")  # decided once: on a CPU each worker would guess by itself what is faster
    dtype = next(name for name, kind in DTYPES.items() if kind == auto)
    alone = settings.model_copy(update={"ray": None})
    return _Job(Path.cwd(), Path(model.name_or_path).resolve(), model.changes, dtype, alone, engine)


def _shards(rows: Sequence[Row], workers: int, at_once: int) -> list[list[Row]]:
    """Rows, longest prompts first, dealt out like cards: at least two shards a worker, so that a fast one takes more,
    and none much larger than keeps an engine busy, so that little is lost with it."""
    size = max(1, min(4 * at_once, -(-len(rows) // (2 * workers))))
    count = -(-len(rows) // size)
    return [list(rows[number::count]) for number in range(count)]


class _Worker:
    """Answers shards. Every object of it is a process of its own, on some machine."""

    def __init__(self, job: _Job) -> None:
        self.job = job

    def __call__(self, shard: dict[str, Any]) -> dict[str, bytes]:
        """What a user can mend comes back as a sentence; anything else would be Ray's to tell, in a hundred lines."""
        try:
            rows, problem = self._answered(pickle.loads(shard["rows"])), ""
        except MemreasonError as error:
            rows, problem = [], f"a worker on {socket.gethostname()}: {error}"
            if not self.job.folder.is_dir():
                problem += ". Every machine must see it under this path, as on a shared file system"
        return {"rows": pickle.dumps((rows, problem))}

    def _answered(self, rows: list[Row]) -> list[Row]:
        loaded = self.loaded
        answers = self.job.engine(loaded.model, loaded.codec, deque(rows), self.job.settings)
        made = [row for ended in answers for row in ended]
        for row in made:
            row.until = None  # a function of the engine's
        return made

    @cached_property
    def loaded(self) -> Checkpoint:
        """The checkpoint, read at the first shard: a worker that fails to start is lost without a word."""
        stand, folder, changes, dtype, settings, _ = self.job
        if stand.is_dir():
            os.chdir(stand)  # paths of a recipe may be relative
        if folder.is_dir() and not torch.cuda.is_available():
            recipe = load_recipe(folder / "recipe.yaml")
            changes = ({"dtype": dtype} if recipe.model.dtype == "auto" else {}) | changes
        loaded = checkpoint_for(settings, folder, **changes)
        if torch.cuda.is_available() and not getattr(loaded.model, "is_quantized", False):
            loaded.model.to("cuda")
        return loaded
