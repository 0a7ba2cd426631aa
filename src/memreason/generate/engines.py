"""Questions to generations, by whichever engine.

An engine takes rows that wait, with the ids of their prompts, and yields those that ended, with ids and figures filled
in. It knows nothing of traces: whoever gives it other prompts (onward.py) or wraps it (recall.py) needs no other.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any

from memreason.core.errors import EngineError
from memreason.core.stages import EvalRecipe
from memreason.core.trace import Question
from memreason.encode.codec import Codec
from memreason.generate.likeliest import decode_and_name
from memreason.generate.on_ray import on_ray
from memreason.generate.rows import Engine, Generation, Row, start

__all__ = ["ENGINES", "generate"]

log = logging.getLogger("memreason")


def _elsewhere(room: str) -> Engine:
    """An engine whose library is imported only when it is used."""

    def answer(model: Any, codec: Codec, waiting: deque[Row], settings: EvalRecipe) -> Iterator[list[Row]]:
        if codec.parting:
            raise EngineError(
                f"eval.engine: {settings.engine} lets every token see all, and this model was trained with "
                "tokens.sparse_attention. Use --eval.engine local"
            )
        found: Iterator[list[Row]] = import_module(f"memreason.generate.{room}").complete(
            model, codec, waiting, settings
        )
        return found

    return answer


ENGINES: dict[str, Engine] = {
    "local": decode_and_name,
    "openai": _elsewhere("server"),
    "chat": _elsewhere("server"),
    "vllm": _elsewhere("vllm"),
}


def generate(
    model: Any,
    codec: Codec,
    questions: Sequence[Question],
    settings: EvalRecipe,
    *,
    skip: frozenset[tuple[str, int]] = frozenset(),
    engine: Engine | None = None,
) -> Iterator[list[Generation]]:
    """Answer each question `n_samples` times; yield what is finished, a few at a time, longest prompts first.

    A question that leaves no room for an answer (settings.max_length, or the model's positions) gets no tokens.
    Greedy answers do not depend on the number in flight in fp32; sampled ones draw from a generator of
    their own, seeded by question, sample and seed. `skip` holds (question id, sample) already done. `engine`
    takes the place of the one that the settings name.
    """
    room = getattr(model.config, "max_position_embeddings", None)
    rows = [
        start(codec, question, sample, settings, room)
        for question in questions
        for sample in range(settings.n_samples)
        if (question.id, sample) not in skip
    ]
    opening = codec.opening()
    if too_long := [row for row in rows if row.limit < 1]:
        log.warning("%d questions are longer than the limit of prompt and answer: they get none", len(too_long))
        yield [row.generation(opening) for row in too_long]
    waiting = deque(sorted((row for row in rows if row.limit >= 1), key=lambda row: -len(row.pending)))
    finished: list[Row] = []
    used = engine or ENGINES[settings.engine]
    for ended in (on_ray(used) if settings.ray else used)(model, codec, waiting, settings):
        finished += ended
        if len(finished) * 4 >= settings.batch_size:
            yield [row.generation(opening) for row in finished]
            finished = []
    if finished:
        yield [row.generation(opening) for row in finished]
