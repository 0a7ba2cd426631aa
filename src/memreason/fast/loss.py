"""Cross-entropy from hidden states, without ever holding tokens x vocabulary.

The logits of CHUNK supervised positions are made, turned into their own gradient and used up before the next ones:
with p = softmax(h W^T), the loss of a position is -log p[y], its gradient for h is (p - onehot(y)) W. As the loss is a
sum, that gradient is known in the forward pass up to the factor that comes from above. Logits are those of the
model's dtype; softmax and loss are computed in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from memreason.fast.compiling import compiled

__all__ = ["Head", "chunked_loss", "head_of", "headless", "takes_hidden_states"]

CHUNK = 256


@dataclass(frozen=True)
class Head:
    """An output layer: matrix (vocabulary, width), bias or None, and trained rows that stand in for those of `ids`."""

    weight: Tensor
    bias: Tensor | None = None
    ids: Tensor | None = None
    rows: Tensor | None = None


def head_of(layer: Any) -> Head:
    """The parts of an output layer, whether plain or with PEFT's trained rows. Raises TypeError for another kind."""
    adapter = getattr(layer, "token_adapter", layer)
    base = adapter.get_base_layer() if hasattr(adapter, "get_base_layer") else adapter
    if type(base) is not nn.Linear:  # a quantised or LoRA head computes otherwise
        raise TypeError(f"the output layer is a {type(base).__name__}")
    names = getattr(adapter, "active_adapters", [])
    if adapter is base or not names:
        return Head(base.weight, base.bias)
    (name,) = names
    ids = torch.tensor(adapter.token_indices[name], device=base.weight.device)
    return Head(base.weight, base.bias, ids, adapter.trainable_tokens_delta[name])


@contextmanager
def headless(layer: Any) -> Iterator[None]:
    """Meanwhile an output layer passes on the hidden states that it gets."""
    layer.forward = lambda hidden: hidden
    try:
        yield
    finally:
        del layer.forward


def takes_hidden_states(model: Any) -> bool:
    """Whether a model's logits are those of its output layer and nothing more, tried on four tokens.

    Some models cap or scale logits, some heads are of another kind: they need their own forward pass.
    """
    layer = model.get_output_embeddings()
    try:
        head = head_of(layer)
    except TypeError:
        return False
    ids, training = torch.arange(4, device=head.weight.device)[None], model.training
    with torch.no_grad():
        model.eval()
        logits = model(input_ids=ids, use_cache=False).logits
        with headless(layer):
            hidden = model(input_ids=ids, use_cache=False).logits
        model.train(training)
        return torch.equal(layer(hidden), logits)


def chunked_loss(hidden: Tensor, labels: Tensor, head: Head) -> Tensor:
    """Summed cross-entropy in fp32. hidden: (positions, width); labels: (positions,), none of them masked."""
    with torch.autocast(hidden.device.type, enabled=False):  # over a quantised base the head is fp32: no mixture then
        loss: Tensor = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
            hidden, labels, head.weight, head.bias, head.ids, head.rows
        )
    return loss


def _spread(logits: Tensor) -> tuple[Tensor, Tensor]:
    """log-sum-exp in fp32, (positions, 1), and softmax in the logits' dtype. Uses fp32 logits up."""
    scores = logits.float()
    total = scores.logsumexp(dim=1, keepdim=True)
    return total, scores.sub_(total).exp_().to(logits.dtype)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        context: Any,
        hidden: Tensor,
        labels: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor | None,
        rows: Tensor | None,
    ) -> Tensor:
        dtype = weight.dtype
        hidden = hidden.to(dtype)
        loss = hidden.new_zeros((), dtype=torch.float32)
        wanted = context.needs_input_grad
        to_hidden = torch.empty_like(hidden)
        to_weight = torch.zeros_like(weight, dtype=torch.float32) if wanted[2] else None
        to_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and wanted[3] else None
        to_rows = torch.zeros_like(rows, dtype=torch.float32) if rows is not None and wanted[5] else None
        own = None if rows is None or ids is None else (ids, rows.to(dtype))
        spread = compiled(_spread)
        for start in range(0, len(hidden), CHUNK):
            part, gold = hidden[start : start + CHUNK], labels[start : start + CHUNK]
            at = torch.arange(len(part), device=part.device), gold
            logits = part @ weight.T if bias is None else torch.addmm(bias, part, weight.T)
            if own is not None:
                logits[:, own[0]] = part @ own[1].T if bias is None else torch.addmm(bias[own[0]], part, own[1].T)
            score = logits[at][:, None].float()
            total, error = spread(logits)
            loss += (total - score).sum()
            if not any(wanted):
                continue
            error[at] = (score - total).expm1().squeeze(1).to(dtype)  # scatter_ would copy the whole
            if to_bias is not None:
                to_bias += error.float().sum(dim=0)
            reached = to_hidden[start : start + CHUNK]
            if own is not None:
                errors = error[:, own[0]]
                error[:, own[0]] = 0
                if to_rows is not None:
                    to_rows += (errors.T @ part).float()
            torch.mm(error, weight, out=reached)
            if own is not None:
                reached += errors @ own[1]
            if to_weight is not None:
                to_weight += (error.T @ part).float()
        context.save_for_backward(to_hidden, to_weight, to_bias, to_rows)
        context.dtypes = [t.dtype if t is not None else None for t in (weight, bias, rows)]
        return loss

    @staticmethod
    def backward(context: Any, factor: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        to_hidden, *others = context.saved_tensors
        scaled = [None if t is None else (t * factor).to(d) for t, d in zip(others, context.dtypes, strict=True)]
        return to_hidden * factor.to(to_hidden.dtype), None, scaled[0], scaled[1], None, scaled[2]
