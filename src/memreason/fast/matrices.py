"""Matrices laid out for the products of a processor, for as long as nothing trains them.

oneDNN, behind torch's products on a CPU, reads a matrix in blocks, in bf16 with pairs of numbers side by side. From a
matrix as torch keeps it these are made again in every product, which for a few rows takes longer than the product.
Made once, they serve all passes of an evaluation: a product of 4 rows takes a third to a half of the time, one of 192
rows five sixths in bf16 and three fifths in fp32 (docs/performance.md). torch.compile does the same where it freezes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["laid_out"]

ROWS = 64  # of a product for which oneDNN chooses its blocks; those for 1 are slower from 4 rows on


@contextmanager
def laid_out(model: nn.Module) -> Iterator[None]:
    """The linear layers of a model on a CPU compute with blocks; afterwards they are what they were, bit by bit.

    Meanwhile a matrix that no other layer shares is its blocks alone, and reads as nan: nothing is held twice.
    """
    shared = Counter(id(own) for module in model.modules() for own in module._parameters.values())
    layers: list[nn.Linear] = [module for module in model.modules() if _takes_blocks(module)]
    blocks: list[Tensor] = []
    try:
        with torch.inference_mode(False), torch.no_grad():
            for layer in layers:
                weight = layer.weight
                blocks.append(_blocks(weight.detach()))
                vars(layer)["forward"] = _product(blocks[-1], layer.bias)
                if shared[id(weight)] == 1:
                    weight.data = weight.new_full((), torch.nan).expand(weight.shape)
        yield
    finally:
        with torch.inference_mode(False), torch.no_grad():
            for layer in reversed(layers[: len(blocks)]):
                vars(layer).pop("forward", None)
                laid = blocks.pop()
                if shared[id(layer.weight)] == 1:
                    layer.weight.data = laid.to_dense()


def _takes_blocks(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Not so what another class computes, what is split over processes, and what someone else has hooked already."""
    return (
        type(module) is nn.Linear
        and type(module.weight.data) is Tensor
        and module.weight.device.type == "cpu"
        and module.weight.is_floating_point()
        and module.weight.shape == (module.out_features, module.in_features)
        and "forward" not in vars(module)
        and _has_blocks(module.weight.dtype)
    )


@cache
def _has_blocks(dtype: torch.dtype) -> bool:
    """Whether this machine's torch multiplies so, tried on a small matrix."""
    matrix, x = torch.eye(16, dtype=dtype), torch.arange(32.0).view(2, 16).to(dtype)
    try:
        return bool(torch.equal(_product(_blocks(matrix), None)(x), F.linear(x, matrix)))
    except (AttributeError, RuntimeError):  # built without oneDNN, or a dtype that it does not multiply here
        return False


def _blocks(matrix: Tensor) -> Tensor:
    found: Tensor = torch.ops.mkldnn._reorder_linear_weight(matrix, ROWS)
    return found


def _product(blocks: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """How a layer with these blocks computes."""
    # named with its overload: torch would look for that in every call, which takes a tenth of a small product
    product, dtype = torch.ops.mkldnn._linear_pointwise.default, blocks.dtype
    return lambda x: product(x.to(dtype), blocks, bias, "none", [], "")
