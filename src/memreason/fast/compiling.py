"""torch.compile where it brings more than it costs: element-wise work of many small operations becomes one loop.

Only the decoder layer and the softmax of the loss are compiled, each once for every size, so that a start costs
20 seconds, or 5 with the graph that an earlier run left in the cache.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

import torch

from memreason.core.files import cache_dir

__all__ = ["ENOUGH", "compile_layers", "compiled", "compiling", "pays"]

F = TypeVar("F", bound=Callable[..., Any])
ENOUGH = 300_000  # tokens to train on from which a start is paid back
_on = False


def pays(tokens: int) -> bool:
    """Whether so many tokens are enough, on a machine that has a C++ compiler."""
    return tokens >= ENOUGH and shutil.which(os.environ.get("CXX") or "g++") is not None


def compile_layers(network: Any) -> dict[Any, Any]:
    """The decoder layers of a Transformers model, each with its compiled call: for `compiling`. Nothing runs yet."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_dir() / "compiled"))
    names = set(network._no_split_modules or ())
    layers = [module for module in network.modules() if type(module).__name__ in names]
    return {layer: torch.compile(layer._call_impl, dynamic=True) for layer in layers}


@contextmanager
def compiling(layers: dict[Any, Any]) -> Iterator[None]:
    """Meanwhile these layers, and functions called through `compiled`, run compiled; with no layers nothing does."""
    global _on
    before, _on = _on, bool(layers)
    for layer, call in layers.items():
        layer._compiled_call_impl = call  # where torch's own Module.compile puts it
    try:
        yield
    finally:
        _on = before
        for layer in layers:
            layer._compiled_call_impl = None


def compiled(function: F) -> F:
    made: F = _compile(function) if _on else function
    return made


@cache
def _compile(function: Any) -> Any:
    return torch.compile(function, dynamic=True)
