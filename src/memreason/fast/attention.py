"""Causal attention inside each trace of a packed row, as plain matrix products.

Packing puts traces end to end, so that nothing is padded; a trace must then see itself alone. On a CPU the backward
pass of the fused kernel behind `scaled_dot_product_attention` runs at a twentieth of the machine's speed, and a mask
over the whole row costs the square of its length. Batched products of each trace's own size do neither.

For the queries Q, keys K and values V of a trace (arXiv 2205.14135, appendix B.2):
    P = softmax(Q K^T scale + causal mask),  O = P V
    dV = P^T dO,  dP = dO V^T,  dS = P (dP - rowsum(P dP)),  dQ = dS K scale,  dK = dS^T Q scale
P is computed again in the backward pass instead of kept. Queries go in blocks of BLOCK positions, which skips most
of what lies above the diagonal. Query heads that share a key head are further rows of the same product.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

__all__ = ["PACKED", "attending", "drops_attention", "may_pack", "packed_attention", "packs"]

PACKED = "memreason_packed"
BLOCK = 192


def _blocks(bounds: Tensor) -> Iterator[tuple[int, int, int]]:
    """(first key, first query, last query + 1) of each block of queries of each trace."""
    for start, end in pairwise(bounds.tolist()):
        for first in range(start, end, BLOCK):
            yield start, first, min(first + BLOCK, end)


def _grouped(heads: Tensor, groups: int) -> Tensor:
    """(heads, n, width) -> (groups, heads / groups * n, width)."""
    return heads.reshape(groups, -1, heads.shape[-1])


def _weights(query: Tensor, key: Tensor, size: int, scale: float, since: Tensor | None) -> Tensor:
    """P of one block. query: (groups, copies * size, width); key: (groups, m, width), its last `size` the block's.

    `since`, of (size,): the first of the keys that each query sees.
    """
    scores = torch.bmm(query * scale, key.transpose(1, 2))
    own = scores.view(len(scores), -1, size, scores.shape[-1])[..., -size:]
    own += torch.full((size, size), float("-inf"), dtype=own.dtype, device=own.device).triu_(1)
    if since is not None:
        hidden = torch.arange(scores.shape[-1], device=own.device) < since[:, None]
        scores.view(len(scores), -1, *hidden.shape).masked_fill_(hidden, float("-inf"))
    return scores.softmax(dim=-1)


@torch.library.custom_op("memreason::packed_attention", mutates_args=())
def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, scale: float, since: Tensor | None = None
) -> Tensor:
    """Attention of packed traces. query: (heads, tokens, width); key, value: (groups, tokens, width).

    `bounds`: 0 and the end of each trace, on the CPU. `since`, of (tokens,): where in its trace that begins which a
    query sees (None: with its first position). Returns (heads, tokens, width).
    """
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    for start, first, end in _blocks(bounds):
        keys = key[:, start:end]
        visible = None if since is None else since[first:end]
        weights = _weights(_grouped(query[:, first:end], len(key)), keys, end - first, scale, visible)
        out[:, first:end] = torch.bmm(weights, value[:, start:end]).view(len(query), end - first, -1)
    return out


@packed_attention.register_fake
def _(query: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


@torch.library.custom_op("memreason::packed_attention_backward", mutates_args=())
def _backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    since: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    to_query = torch.empty_like(query, memory_format=torch.contiguous_format)
    to_key = torch.zeros_like(key, memory_format=torch.contiguous_format)
    to_value = torch.zeros_like(value, memory_format=torch.contiguous_format)
    for start, first, end in _blocks(bounds):
        keys, values = key[:, start:end], value[:, start:end]
        queries, outer = _grouped(query[:, first:end], len(key)), _grouped(gradient[:, first:end], len(key))
        weights = _weights(queries, keys, end - first, scale, None if since is None else since[first:end])
        inner = torch._softmax_backward_data(torch.bmm(outer, values.transpose(1, 2)), weights, -1, weights.dtype)
        to_query[:, first:end] = torch.bmm(inner, keys).view(len(query), end - first, -1)
        to_key[:, start:end] += torch.bmm(inner.transpose(1, 2), queries)
        to_value[:, start:end] += torch.bmm(weights.transpose(1, 2), outer)
    return to_query.mul_(scale), to_key.mul_(scale), to_value


@_backward.register_fake
def _(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (query, key, value))  # type: ignore[return-value]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scale, since = inputs
    ctx.save_for_backward(*tensors, since)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return (*_backward(gradient, *ctx.saved_tensors, ctx.scale), None, None, None)


packed_attention.register_autograd(_differentiate, setup_context=_keep)


def _interface(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **settings: Any
) -> tuple[Tensor, None]:
    """Transformers' door: tensors of (1, heads, tokens, width) in, (1, tokens, heads, width) out."""
    scale, since = settings.get("scaling") or query.shape[-1] ** -0.5, settings.get("since")
    query, key = query.to(value.dtype), key.to(value.dtype)  # autocast leaves those that were rotated in fp32
    visible = None if since is None else since[0]
    out = packed_attention(query[0], key[0], value[0], settings["cu_seq_lens_q"].cpu(), scale, visible)
    return out.transpose(0, 1)[None], None


AttentionInterface.register(PACKED, _interface)


def may_pack(model: Any) -> bool:
    """Whether nothing in a model's configuration speaks against packing."""
    config = model.config
    windows = [value for name in ("sliding_window", "attention_chunk_size") if (value := getattr(config, name, None))]
    return bool(getattr(model, "_supports_attention_backend", False)) and not windows and not drops_attention(model)


def drops_attention(model: Any) -> bool:
    """Whether dropout of attention is part of a model's training."""
    return any(getattr(model.config, name, 0.0) for name in ("attention_dropout", "attn_pdrop"))


def packs(model: Any) -> bool:
    """Whether two short traces packed give this model's logits of each alone, tried on it.

    Not so where attention is no function of Transformers' table, or more than scores, mask and softmax.
    """
    if not may_pack(model):
        return False
    size = model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(size // 4, size // 2, max(1, size // 24), device=model.device)[:6]
    bounds = torch.tensor([0, 2, 6], dtype=torch.int32)
    training = model.training
    with torch.no_grad():
        model.eval()
        with attending(model, "eager"):  # rounds as this function does, so that in bf16 too little noise is left
            alone = [model(input_ids=part[None], use_cache=False).logits[0] for part in ids.split([2, 4])]
        with attending(model, PACKED):
            positions = torch.tensor([[0, 1, 0, 1, 2, 3]], device=model.device)
            packed = model(input_ids=ids[None], position_ids=positions, cu_seq_lens_q=bounds, use_cache=False).logits[0]
        model.train(training)
    expected = torch.cat(alone)
    return bool((packed - expected).float().norm() < 0.05 * expected.float().norm())


@contextmanager
def attending(model: Any, implementation: str) -> Iterator[None]:
    """A model (adapted or not) whose attention is computed by another function of Transformers' table meanwhile."""
    config = model.config
    before = config._attn_implementation
    config._attn_implementation = implementation
    try:
        yield
    finally:
        config._attn_implementation = before
