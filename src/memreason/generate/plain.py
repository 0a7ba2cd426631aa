"""Generation by Transformers itself: for models whose attention is no function of its table (ALiBi, remote code)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteriaList

from memreason.core.stages import EvalRecipe
from memreason.fast.matrices import laid_out
from memreason.finetune.methods import merged, network_of
from memreason.generate.choose import take
from memreason.generate.rows import Row

__all__ = ["generate_plainly"]

BATCH = 8  # rows that wait for the longest of them


def generate_plainly(
    model: Any, waiting: deque[Row], settings: EvalRecipe, eos: int, more: Callable[[], bool]
) -> Iterator[list[Row]]:
    """Answer rows batch by batch, in their order. Sampled answers depend on the batch here."""
    ways: dict[str, dict[str, Any]] = {
        "greedy": {"do_sample": False},
        "model-default": {},
        "sample": {"do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0},
    }
    with merged(model), laid_out(model), torch.inference_mode(), torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        while waiting or more():
            batch = [waiting.popleft() for _ in range(min(BATCH, len(waiting)))]
            _answer(model, batch, eos, ways[settings.decoding])
            yield batch


def _answer(model: Any, rows: list[Row], eos: int, way: dict[str, Any]) -> None:
    """Let the rows of a batch take token after token, each as soon as it is chosen."""
    device = next(model.parameters()).device
    longest = max(len(row.pending) for row in rows)
    pads = [longest - len(row.pending) for row in rows]
    logits: list[Tensor] = []  # of the last step
    done = [False] * len(rows)

    def keep(module: Any, given: Any, output: Any) -> None:
        logits[:] = [output.logits[:, -1].to(device, copy=True)]  # the whole of it would be kept with a part

    def which_ended(ids: Tensor, scores: Any, **_: Any) -> Tensor:
        for place, one in enumerate(take(logits[0], ids[:, -1].tolist(), _chosen)):
            if not done[place]:
                rows[place].take(one)
                done[place] = rows[place].ended(eos)
        return torch.tensor(done, device=ids.device)

    hook = network_of(model).register_forward_hook(keep)
    try:
        model.generate(
            input_ids=torch.tensor(
                [[eos] * pad + row.pending for pad, row in zip(pads, rows, strict=True)], device=device
            ),
            attention_mask=torch.tensor([[0] * pad + [1] * (longest - pad) for pad in pads], device=device),
            max_new_tokens=max(row.limit - len(row.ids) for row in rows),
            eos_token_id=eos,
            pad_token_id=eos,
            stopping_criteria=StoppingCriteriaList([which_ended]),
            **way,
        )
    finally:
        hook.remove()


def _chosen(logits: Tensor, tokens: Sequence[float]) -> Tensor:
    """What Transformers chose already, in the place of random numbers."""
    return torch.tensor(tokens, device=logits.device)
