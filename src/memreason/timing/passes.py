"""The passes that are rehearsed: one of training, as the trainer runs it, and one that gives every row a token."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from memreason.fast.attention import BLOCK, PACKED, attending
from memreason.fast.loss import chunked_loss, head_of, headless
from memreason.finetune.methods import network_of

__all__ = ["Shape", "decode_pass", "train_pass"]

FUSED = "memreason_rehearsed"  # stands for a GPU's fused attention: keeps queries, keys, values and its output


@dataclass(frozen=True)
class Shape:
    """A pass: rows of `lengths` tokens packed into one, or padded to the longest; `supervised` is the share of
    positions that the head scores."""

    lengths: tuple[int, ...]
    supervised: float
    packed: bool
    headless: bool = True
    half: torch.dtype | None = None  # autocast

    @property
    def tokens(self) -> int:
        return sum(self.lengths) if self.packed else len(self.lengths) * max(self.lengths)

    @property
    def pairs(self) -> float:
        """Products of a query with a key that are computed: blocks of queries below the diagonal, or half a square."""
        if self.packed:
            ends = [range(0, n, BLOCK) for n in self.lengths]
            return sum(
                (min(first + BLOCK, n) - first) * min(first + BLOCK, n)
                for n, firsts in zip(self.lengths, ends, strict=True)
                for first in firsts
            )
        return len(self.lengths) * max(self.lengths) ** 2 / 2


def train_pass(shape: Shape) -> Callable[[Any], Any]:
    """One pass forth and back, as the trainer runs it."""

    def run(model: Any) -> None:
        model.train()
        network = network_of(model)
        head = network.get_output_embeddings()
        half = nullcontext() if shape.half is None else torch.autocast("cpu", dtype=shape.half)
        columns = max(1, round((shape.tokens if shape.packed else max(shape.lengths)) * shape.supervised))
        with attending(network, PACKED if shape.packed else FUSED):
            with half, headless(head) if shape.headless else nullcontext():
                outputs = model(**_inputs(shape), use_cache=False, logits_to_keep=torch.arange(columns))
            found = outputs.logits.flatten(0, 1)
            gold = torch.ones(len(found), dtype=torch.long)
            with half:
                if shape.headless:
                    loss = chunked_loss(found, gold, head_of(head))
                else:
                    loss = nn.functional.cross_entropy(found.float(), gold, reduction="sum")
            loss.backward()

    return run


def _inputs(shape: Shape) -> dict[str, torch.Tensor]:
    rows = 1 if shape.packed else len(shape.lengths)
    ids = torch.ones(rows, shape.tokens // rows, dtype=torch.long)
    if not shape.packed:
        return {"input_ids": ids}
    ends = torch.tensor([0, *shape.lengths]).cumsum(0).to(torch.int32)
    return {"input_ids": ids, "position_ids": torch.arange(shape.tokens)[None], "cu_seq_lens_q": ends}


def decode_pass(rows: int) -> Callable[[Any], Any]:
    """One token for each of `rows` rows, without the reads of their memory, which are added."""

    def run(model: Any) -> None:
        model.eval()
        network = network_of(model)
        with attending(network, FUSED), torch.no_grad():
            network(input_ids=torch.ones(rows, 1, dtype=torch.long), use_cache=False)

    return run


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, query: Any, key: Any, value: Any) -> Any:
        out = torch.empty_like(query)
        context.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    def backward(context: Any, gradient: Any) -> Any:  # type: ignore[override]
        return tuple(torch.empty_like(tensor) for tensor in context.saved_tensors[:3])


def _attend(module: Any, query: Any, key: Any, value: Any, _mask: Any, **_settings: Any) -> tuple[Any, None]:
    query, key = query.to(value.dtype), key.to(value.dtype)
    return _Fused.apply(query, key, value).transpose(1, 2), None  # type: ignore[no-untyped-call]


AttentionInterface.register(FUSED, _attend)
