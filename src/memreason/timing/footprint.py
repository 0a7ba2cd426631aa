"""Memory of one device, by what holds it, and what would make a job fit."""

from __future__ import annotations

from typing import Any

import psutil

from memreason.timing.job import Job
from memreason.timing.rehearsal import heap_of
from memreason.timing.skeleton import Sizes, sizes

__all__ = ["cache_bytes", "footprint", "remedies", "usable"]

CONTEXT = 0.8 * 2**30  # bytes of a GPU that its driver and the libraries take
SPARE = 0.05  # share of a GPU that its allocator cannot hand out: pieces between others
ROOM = 32  # positions by which the engine's memory of keys and values grows


def usable(job: Job) -> float:
    return job.machine.memory * (1 if job.machine.cpu else 1 - SPARE)


def footprint(job: Job) -> dict[str, float]:
    """Bytes on one device at the peak of training, by what holds them; `total` is their sum."""
    size = sizes(job.model(), job.recipe)
    return _shared_out(job, size, _activations(job, size))


def _activations(job: Job, size: Sizes) -> float:
    """What lives beside weights, gradients and states: where gradients are made as activations go, the rest of both."""
    largest = job.rehearsed(job.passes.largest)
    held = heap_of(job.rehearsed(job.passes.usual), largest) if job.machine.cpu else largest.peak
    return held if job.passes.several else max(0.0, held - size.gradients)


def _shared_out(job: Job, size: Sizes, activations: float) -> dict[str, float]:
    """Sharded (FSDP2): weights, gradients and states lie in equal parts on all devices, two layers and what is outside
    of layers are whole meanwhile. Several devices without: each holds all, and its gradients again in DDP's buckets.
    """
    machine = job.machine
    parts = machine.count if job.sharded else 1
    buckets = 2 if machine.count > 1 and not job.sharded else 1
    found = {
        "weights": size.weights / parts + (2 * size.layer + size.outside if job.sharded else 0),
        "gradients": size.gradients * buckets / parts,
        "optimizer": size.optimizer / parts,
        "activations": activations,
        "libraries": float(psutil.Process().memory_info().rss) if machine.cpu else CONTEXT,
    }
    return {**found, "total": sum(found.values())}


def cache_bytes(job: Job, rows: int, length: float) -> float:
    """Keys and values of `rows` rows of `length` tokens, in the base weights' dtype."""
    config = job.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    token = int(2 * config.num_hidden_layers * heads * width * job.dtype.itemsize)
    return rows * -(-length // ROOM) * ROOM * token


def remedies(job: Job) -> list[str]:
    """Changes that would make a job fit its devices, each tried: what to add to the command, and what it then takes."""
    found = []
    for text, count, changes in _candidates(job):
        other = job.changed(count, **changes)
        if (total := footprint(other)["total"]) <= usable(other):
            found.append(f"{text} ({total / 2**30:.1f} GiB)")
    return found


def _candidates(job: Job) -> list[tuple[str, int | None, dict[str, Any]]]:
    recipe, quantize = job.recipe, job.recipe.model.quantize
    rows: list[tuple[str, int | None, dict[str, Any]]] = []
    if job.passes.largest.packed:
        longest = int(job.load.lengths.max())
        rows.append((f"--train.pass_tokens {longest}", None, {"train.pass_tokens": longest}))
    elif len(job.passes.largest.lengths) > 1:
        rows.append(("--train.per_device_train_batch_size 1", None, {"train.per_device_train_batch_size": 1}))
    if recipe.method.name != "prefix-tuning" and not job.given.get("gradient_checkpointing"):
        rows.append(("--train.gradient_checkpointing true", None, {"train.gradient_checkpointing": True}))
    if recipe.method.name == "full":
        rows.append(("--method.name lora+prompt-tuning", None, {"method.name": "lora+prompt-tuning"}))
    else:
        smaller = {None: ("8bit", "4bit"), "8bit": ("4bit",), "4bit": ()}[quantize]
        rows += [(f"--model.quantize {bits}", None, {"model.quantize": bits}) for bits in smaller]
    if quantize is None and not job.machine.cpu:
        rows += _sharded(job)
    return rows


def _sharded(job: Job) -> list[tuple[str, int | None, dict[str, Any]]]:
    """FSDP2 over the fewest devices that do; a device's activations are the same for any number of them."""
    change = {"train.fsdp": True}
    counts = [count for count in (2, 4, 8, 16, 32, 64) if count >= job.machine.count]
    if not counts:
        return []
    first = job.changed(counts[0], **change)
    size = sizes(first.model(), first.recipe)
    activations = _activations(first, size)
    for count in counts:
        other = job.changed(count, **change)
        if _shared_out(other, size, activations)["total"] <= usable(other):
            return [(f"--train.fsdp true --gpus {count}x{job.machine.name}", count, change)]
    return []
