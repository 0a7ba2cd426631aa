"""Generation by Transformers itself: for models whose attention is no function of its table (ALiBi, remote code)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from memreason.core.recipe import EvalRecipe
from memreason.finetune.methods import merged
from memreason.generate.rows import Generation, Row

__all__ = ["generate_plainly"]

BATCH = 8  # the logits of every step are kept until a batch ends


def generate_plainly(
    model: Any, rows: list[Row], settings: EvalRecipe, opening: list[int], eos: int
) -> Iterator[list[Generation]]:
    """Answer rows batch by batch, in their order. Sampled answers depend on the batch here."""
    ways: dict[str, dict[str, Any]] = {
        "greedy": {"do_sample": False},
        "model-default": {},
        "sample": {"do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0},
    }
    with merged(model), torch.inference_mode(), torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        for first in range(0, len(rows), BATCH):
            batch = rows[first : first + BATCH]
            _answer(model, batch, eos, ways[settings.decoding])
            yield [Generation(row.question, row.sample, opening + row.ids, row.logprobs) for row in batch]


def _answer(model: Any, rows: list[Row], eos: int, way: dict[str, Any]) -> None:
    """Fill in ids and log-probabilities of a batch."""
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
    ids = out.sequences[:, longest:]
    scores = torch.stack(out.logits, dim=1).float().log_softmax(dim=-1).gather(2, ids[..., None]).squeeze(2)
    for row, made, logprobs in zip(rows, ids.tolist(), scores.tolist(), strict=True):
        end = min(row.limit, made.index(eos) + 1 if eos in made else row.limit)
        row.ids, row.logprobs = made[:end], logprobs[:end]
