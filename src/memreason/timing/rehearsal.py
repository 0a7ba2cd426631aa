"""A pass rehearsed: the real model, loss and backward pass run on tensors that have shapes and no numbers.

Every operation is seen as it would be run: what it computes, what it reads and writes, and which memory lives
meanwhile. So memory and time follow from the code that will run, for any architecture, method and precision, not from
rules of thumb. Layers that are alike are rehearsed as four and as eight of them: what is counted grows by the same for
each further one.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from memreason.timing.heap import Lives, heap_peak

__all__ = ["Operation", "Pass", "heap_of", "rehearse"]

FEW = (4, 8)  # layers that tell of more
# Matrix products of a packed attention, and how often each of its weights is written or read, forth and back.
PRODUCTS, TOUCHES = {"fwd": 2, "bwd": 5}, {"fwd": 6, "bwd": 14}


class Operation(NamedTuple):
    """FLOPs, bytes read and written, whether in fp32, and how many times it counts."""

    flops: float
    moved: float
    fp32: bool
    times: float = 1.0


@dataclass(frozen=True)
class Pass:
    """What a pass takes: floating-point operations, bytes that live at its peak beside weights, gradients and states,
    its operations, and how its tensors live and die (of few and of more layers, each with how many times it counts)."""

    flops: float
    peak: float
    operations: tuple[Operation, ...]
    lives: tuple[tuple[float, Lives], ...]

    def seconds(self, half: float, fp32: float, bandwidth: float, launch: float) -> float:
        """At so many FLOP/s in half and in full precision, bytes a second and seconds to start an operation: each
        takes as long as its arithmetic, its memory or its start, whichever is longest."""
        return sum(
            one.times * max(one.flops / (fp32 if one.fp32 else half), one.moved / bandwidth, launch)
            for one in self.operations
        )


def rehearse(
    make: Callable[[int], Any],
    layers: int,
    run: Callable[[Any], Any],
    pairs: float,
    *,
    few: bool = True,
    kept: bool = True,
) -> Pass:
    """A pass of a model of `layers` layers, `make` giving one of any number of them; with `few`, more than eight are
    told from four and eight. `pairs` are those of `Shape`; `kept` says whether gradients of an earlier pass of the step
    are held meanwhile: else those that are made count as what lives."""
    if layers <= FEW[1] or not few:
        return _watch(make(layers), run, pairs, kept)
    less, more = (_watch(make(count), run, pairs, kept) for count in FEW)
    times = (layers - FEW[0]) / (FEW[1] - FEW[0])  # that the layers between the two are added
    operations = [one._replace(times=1 - times) for one in less.operations]
    operations += [one._replace(times=times) for one in more.operations]
    flops, peak = (low + times * (high - low) for low, high in ((less.flops, more.flops), (less.peak, more.peak)))
    lives = tuple((weight, lives) for weight, one in ((1 - times, less), (times, more)) for _, lives in one.lives)
    return Pass(flops, peak, tuple(operations), lives)


def heap_of(usual: Pass, largest: Pass) -> float:
    """Bytes of a processor's heap at the peak of a training, beside weights, gradients and states. A usual and the
    largest pass take turns, twice: what a pass of one size leaves free does not fit one of another, and a measured
    training grew little after its second pass."""
    return sum(
        weight * heap_peak([few, many] * 2) for (weight, few), (_, many) in zip(usual.lives, largest.lives, strict=True)
    )


def _watch(model: Any, run: Callable[[Any], Any], pairs: float, kept: bool) -> Pass:
    with _without_numbers(model) as mode:
        parameters = [p for p in model.parameters() if p.requires_grad]
        for parameter in parameters if kept else ():
            parameter.grad = torch.empty_like(parameter)
        held = [t for p in model.parameters() for t in (p, p.grad) if t is not None]
        watch = _Watch([*held, *model.buffers()], pairs)
        with mode, watch:
            run(model)
    return Pass(watch.flops, float(watch.peak), tuple(watch.operations), ((1.0, tuple(watch.lives)),))


class _Watch(TorchDispatchMode):
    """Sees each operation: its work, its bytes, and the memory that lives after it."""

    def __init__(self, held: Sequence[torch.Tensor], pairs: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.pairs, self.flops, self.now, self.peak, self.made = pairs, 0.0, 0, 0, 0
        self.operations: list[Operation] = []
        self.lives: list[tuple[int, int]] = []
        self.living = {tensor.untyped_storage()._cdata for tensor in held}

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        found = function(*arguments, **(keywords or {}))
        given = [t for t in tree_leaves((arguments, keywords)) if isinstance(t, torch.Tensor)]
        made = [t for t in tree_leaves(found) if isinstance(t, torch.Tensor)]
        before = {t.untyped_storage()._cdata for t in given}
        fresh = [t for t in made if t.untyped_storage()._cdata not in before]
        for tensor in fresh:
            self._born(tensor.untyped_storage())
        if not fresh and not function._schema.is_mutable:
            return found  # a view
        moved = float(sum(t.numel() * t.element_size() for t in (*given, *made)))
        work, touched = self._work(function, arguments, keywords or {}, found)
        self.flops += work
        self.operations.append(Operation(work, touched or moved, any(t.dtype == torch.float32 for t in given)))
        return found

    def _born(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.living:
            return
        self.living.add(key)
        self.made += 1
        self.lives.append((self.made, size))
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size, self.made).atexit = False

    def _gone(self, key: int, size: int, number: int) -> None:
        self.living.discard(key)
        self.lives.append((number, -1))
        self.now -= size

    def _work(self, function: Any, arguments: Any, keywords: Any, found: Any) -> tuple[float, float]:
        """FLOPs, and bytes where they are not those of what goes in and comes out."""
        name = str(function)
        if name.startswith("memreason.packed_attention"):
            way = "bwd" if "backward" in name else "fwd"
            query = arguments[0] if way == "fwd" else arguments[1]
            weights = query.shape[0] * self.pairs
            return PRODUCTS[way] * 2.0 * weights * query.shape[2], TOUCHES[way] * weights * query.element_size()
        count = flop_registry.get(function._overloadpacket)
        return (float(count(*arguments, **keywords, out_val=found)) if count else 0.0), 0.0


@contextmanager
def _without_numbers(model: Any) -> Iterator[FakeTensorMode]:
    """The tensors of a model on the meta device pretend to be on a CPU, for autocast acts on real devices alone."""
    mode = FakeTensorMode()

    @cache  # tied matrices stay one; it also keeps the originals, whose ids could be given anew
    def pretend(tensor: Any) -> Any:
        fake = FakeTensor(mode, tensor.detach().to("meta"), torch.device("cpu"))
        return nn.Parameter(fake, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = pretend(tensor)
    yield mode
