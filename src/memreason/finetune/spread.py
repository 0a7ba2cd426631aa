"""A model over the devices that there are: GPUs in turn, then the machine's memory, then the disk."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

from accelerate import PartialState, dispatch_model
from accelerate.utils import get_max_memory
from torch import nn

from memreason.core.errors import ModelError
from memreason.core.files import cache_dir
from memreason.encode.base import memory_of
from memreason.finetune.methods import network_of

__all__ = ["is_spread", "places_of", "spread"]

Device = int | str


def spread(model: Any, offload: bool | dict[str, str] = True) -> None:
    """Put the layers of a model where they fit, in place; Accelerate's hooks bring in those that wait elsewhere.

    A mapping says how much of each device may be used, as {"0": "20GiB", "cpu": "60GiB"} (True: what is free).
    Raises ModelError where the embeddings do not fit the first device, and under several processes, each of which
    would take every device.
    """
    if PartialState().num_processes > 1:
        raise ModelError("model.offload: spreads one model over all devices; start one process, not several")
    places = places_of(model, get_max_memory(memory_of(offload)))
    cache_dir().mkdir(parents=True, exist_ok=True)
    model.offloaded_to = tempfile.TemporaryDirectory(prefix="offloaded-", dir=cache_dir())  # goes with the model
    dispatch_model(model, places, offload_dir=model.offloaded_to.name)


def places_of(model: nn.Module, room: Mapping[Device, int]) -> dict[str, Device]:
    """Part of the model -> device, given the bytes of each. Embeddings, head and what else is no layer stand on the
    first device, where rows are added and merged; layers follow, in their order, and what fits nowhere goes to disk.
    """
    kinds = set(network_of(model)._no_split_modules or ())
    layers = {name: _bytes(module) for name, module in model.named_modules() if type(module).__name__ in kinds}
    first, *others = room
    rest = _bytes(model) - sum(layers.values())
    left = room[first] - rest
    if left < sum(layers.values()):
        left -= max(layers.values())  # a layer that waits elsewhere is brought in here
    if left < 0:
        raise ModelError(
            f"model.offload: {room[first]:,} bytes of {first} do not hold the embeddings ({rest:,}) and a layer"
        )
    places: dict[str, Device] = dict.fromkeys(_beside(model, layers), first)
    devices: Iterator[tuple[Device, float]] = iter([*((one, room[one]) for one in others), ("disk", float("inf"))])
    device, free = first, float(left)
    for name, size in layers.items():
        while size > free:
            device, free = next(devices)
        places[name], free = device, free - size
    return places


def _bytes(module: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in (*module.parameters(), *module.buffers()))


def _beside(model: nn.Module, layers: Mapping[str, int], prefix: str = "") -> Iterator[str]:
    """Names of the largest parts that hold no layer."""
    for name, module in model.named_children():
        if any(layer.startswith(f"{prefix}{name}.") for layer in layers):
            yield from _beside(module, layers, f"{prefix}{name}.")
        elif f"{prefix}{name}" not in layers:
            yield f"{prefix}{name}"


def is_spread(model: Any) -> bool:
    return bool(getattr(model, "hf_device_map", None))
