"""Generation by Transformers itself: for models whose attention is no function of its table (ALiBi, remote code)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from memreason.core.recipe import EvalRecipe
from memreason.finetune.methods import merged
from memreason.generate.choose import take
from memreason.generate.rows import Row

__all__ = ["generate_plainly"]

BATCH = 8  # the logits of every step are kept until a batch ends


def generate_plainly(
    model: Any, waiting: deque[Row], settings: EvalRecipe, eos: int, more: Callable[[], bool]
) -> Iterator[list[Row]]:
    """Answer rows batch by batch, in their order. Sampled answers depend on the batch here."""
    ways: dict[str, dict[str, Any]] = {
        "greedy": {"do_sample": False},
        "model-default": {},
        "sample": {"do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0},
    }
    with merged(model), torch.inference_mode(), torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        while waiting or more():
            batch = [waiting.popleft() for _ in range(min(BATCH, len(waiting)))]
            _answer(model, batch, eos, ways[settings.decoding])
            yield batch


def _answer(model: Any, rows: list[Row], eos: int, way: dict[str, Any]) -> None:
    """Fill in the tokens of a batch."""
    device = next(model.parameters()).device
    longest = max(len(row.pending) for row in rows)
    pads = [longest - len(row.pending) for row in rows]
    out = model.generate(
        input_ids=torch.tensor([[eos] * pad + row.pending for pad, row in zip(pads, rows, strict=True)], device=device),
        attention_mask=torch.tensor([[0] * pad + [1] * (longest - pad) for pad in pads], device=device),
        max_new_tokens=max(row.limit for row in rows),
        eos_token_id=eos,
        pad_token_id=eos,
        return_dict_in_generate=True,
        output_logits=True,
        **way,
    )
    for place, row in enumerate(rows):
        logits = torch.stack([step[place] for step in out.logits])
        for one in take(logits, (), partial(_chosen, out.sequences[place, longest:])):
            row.take(one)
            if row.ended(eos):
                break


def _chosen(made: Tensor, logits: Tensor, points: Sequence[float]) -> Tensor:
    """What Transformers chose already."""
    return made
