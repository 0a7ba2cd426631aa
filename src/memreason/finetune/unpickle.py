"""Pickled tensors and layers of foreign checkpoints, read without running what a pickle may ask for."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from memreason.core.errors import CheckpointError

__all__ = ["read_layer", "read_tensors"]


class _Layer:
    """Stands in for a layer's class: keeps the state that the pickle has for it, and does nothing with it."""

    state: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state if isinstance(state, dict) else {}


# torch knows the pickle's name for a class, and what it is to make of it: not even the real constructors run.
Embedding = type("Embedding", (_Layer,), {})
Linear = type("Linear", (_Layer,), {})
LAYERS: list[Any] = [(Embedding, "torch.nn.modules.sparse.Embedding"), (Linear, "torch.nn.modules.linear.Linear")]


def read_layer(path: Path, kind: str) -> dict[str, Tensor]:
    """The parameters of a pickled torch.nn.Embedding or Linear (`kind`), or of a bare matrix, in fp32: {"weight": …}.

    Nothing but these two classes, parameters and tensors is unpickled. Raises CheckpointError that names the file.
    """
    found = _read(path)
    parameters = {"weight": found} if isinstance(found, Tensor) else _parameters(path, found, kind)
    for name, value in parameters.items():
        if value.dim() != (2 if name == "weight" else 1):
            raise CheckpointError(f"{path}: its {name} has the shape {tuple(value.shape)}")
        if not value.is_floating_point() or not value.isfinite().all():
            raise CheckpointError(f"{path}: its {name} holds what is no number")
    return {name: value.detach().float().contiguous() for name, value in parameters.items()}


def _parameters(path: Path, found: Any, kind: str) -> dict[str, Tensor]:
    if type(found).__name__ != kind or not isinstance(found, _Layer):
        raise CheckpointError(f"{path}: a pickled torch.nn.{kind} is needed, got {type(found).__name__}")
    own = found.state.get("_parameters")
    parameters = {name: value for name, value in dict(own or {}).items() if value is not None}
    if "weight" not in parameters or not all(isinstance(value, Tensor) for value in parameters.values()):
        raise CheckpointError(f"{path}: its {kind} has no weight")
    return parameters


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickled state dict, such as adapter_model.bin. Raises CheckpointError that names the file."""
    found = _read(path)
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise CheckpointError(f"{path}: a pickled dict of tensors is needed")
    return {str(name): value for name, value in found.items()}


def _read(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(LAYERS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a crafted or torn file can make the unpickler fail in any way; all are refused
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        if wanted:
            raise CheckpointError(
                f"{path}: its pickle asks for {wanted[1]}, which no rows or weights need and which may run code. "
                "Nothing of it was run. Only tensors, torch.nn.Embedding and torch.nn.Linear are read."
            ) from error
        raise CheckpointError(
            f"{path}: cannot be read as a PyTorch file (1.6 or later); it is torn, or something else"
        ) from error
