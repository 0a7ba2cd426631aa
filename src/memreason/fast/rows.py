"""New rows beside the frozen matrix: PEFT's row layer copies the whole embedding in every forward pass, twice if tied.

Same numbers, same parameters, same files: only how the forward pass is computed differs. The input embedding looks
new ids up in the small matrix; the head computes their logits from it and puts them over the base's.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["RowLayer", "row_layers", "rows_beside"]


class RowLayer(TrainableTokensLayer):
    """PEFT's layer of trained rows, computed beside the base matrix. Keeps a biased head's bias, which PEFT drops."""

    def forward_adapters(self, x: Tensor, active_adapters: list[str], *args: Any, **kwargs: Any) -> Tensor:
        base = self.get_base_layer()
        if self.disable_adapters or not active_adapters or self.merged:
            return super().forward_adapters(x, active_adapters, *args, **kwargs)
        self._check_overlapping_tokens(active_adapters)
        result: Tensor = base(x)
        add = self._embed if isinstance(base, nn.Embedding) else self._score
        for name in active_adapters:
            ids = torch.tensor(self.token_indices[name], device=x.device)
            result = add(x, result, ids, self.trainable_tokens_delta[name])
        return result

    def _embed(self, x: Tensor, result: Tensor, ids: Tensor, rows: Tensor) -> Tensor:
        """x: ids (...); result: (..., width)."""
        same = x[..., None] == ids
        new = F.embedding(same.int().argmax(dim=-1), rows).to(result.dtype)
        scale = self._get_embed_scale()  # type: ignore[no-untyped-call]  # Gemma scales inside its embedding layer
        new = new if scale is None else new * scale.to(new.dtype)
        return torch.where(same.any(dim=-1, keepdim=True), new, result)

    def _score(self, x: Tensor, result: Tensor, ids: Tensor, rows: Tensor) -> Tensor:
        """x: (..., width); result: logits (..., vocabulary)."""
        bias = getattr(self.get_base_layer(), "bias", None)
        new = F.linear(x, rows.to(x.dtype), None if bias is None else bias[ids])
        return result.index_copy(-1, ids, new.to(result.dtype))


def row_layers(model: nn.Module) -> list[TrainableTokensLayer]:
    return [module for module in model.modules() if isinstance(module, TrainableTokensLayer)]


def rows_beside(model: nn.Module) -> None:
    """Turn the row layers of an adapted model into RowLayers, in place."""
    for layer in row_layers(model):
        layer.__class__ = RowLayer  # PEFT makes these layers itself and takes no other class for them
