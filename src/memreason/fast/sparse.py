"""Sparse attention as 4-D masks, for padded batches of any model whose masks are Transformers' own.

One mask for each type of layer: sliding windows stay what they are. With FlexAttention the same call makes its block
masks, so that nothing is computed where a whole block is hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import create_masks_for_generate

from memreason.fast.attention import attending, drops_attention

__all__ = ["FLEX", "UNMASKED", "sparse_masks", "takes_blocks", "takes_masks"]

FLEX = "flex_attention"

UNMASKED = "does not let each token be told what it sees. Llama, Mistral, Qwen, Gemma, GPT-2 and most others do"


def sparse_masks(model: Any, since: Tensor, attention_mask: Tensor) -> Any:
    """What a Transformers model takes as attention_mask so that each token sees no position before its own of `since`.

    Both tensors are (batch, length), of padded sequences.
    """
    shape = torch.empty(*since.shape, 0, dtype=model.dtype, device=since.device)  # all that is read of embeddings

    def visible(row: Any, head: Any, query: Any, key: Any) -> Any:
        return key >= since[row, query]

    make = getattr(model, "create_masks_for_generate", create_masks_for_generate)
    return make(model.config, shape, attention_mask, None, and_mask_function=visible)


def takes_masks(model: Any) -> bool:
    """Whether such masks hide what they should and nothing else, tried on six tokens.

    Not so where something else carries on what was read before (convolutions, states), or reads the mask otherwise.
    """
    if not getattr(model, "_supports_attention_backend", False):
        return False
    size, training = model.get_input_embeddings().weight.shape[0], model.training
    ids = torch.arange(size // 4, size // 2, max(1, size // 24), device=model.device)[:6]
    batch = torch.stack([ids, torch.cat([ids[:3].flip(0) + 1, ids[3:]])])  # alike from the fourth on
    whole = torch.ones_like(batch)

    def logits(mask: Any) -> Tensor:
        found: Tensor = model(input_ids=batch, attention_mask=mask, use_cache=False).logits.float()
        return found

    with torch.no_grad():
        model.eval()
        plain, open_ = logits(whole), logits(sparse_masks(model, 0 * whole, whole))
        parted = logits(sparse_masks(model, 3 * whole * (torch.arange(6, device=ids.device) > 2), whole))[:, 3:]
        model.train(training)
    near = 0.05 * plain.norm()
    return bool((open_ - plain).norm() < near and (parted[0] - parted[1]).norm() < near / 10)


def takes_blocks(model: Any) -> bool:
    """Whether FlexAttention's block masks hide the same in a model, tried on it as `takes_masks` tries its own."""
    if not getattr(model, "_supports_flex_attn", False) or drops_attention(model):
        return False
    try:
        with attending(model, FLEX):
            return takes_masks(model)
    except AttributeError:  # GPT-2 says that it supports them, then asks for the mask's dimensions
        return False
