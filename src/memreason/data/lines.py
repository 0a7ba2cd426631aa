"""What a comparison's controls change in training traces: which lines they have, in what order, of what kinds."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from memreason.core.kinds import CLUSTERED, PAUSE
from memreason.core.stages import DataRecipe
from memreason.core.trace import MEMORY, Step, Trace
from memreason.data.arithmetic import label_arithmetic, label_operations

__all__ = ["KINDS", "prepared_lines"]


def prepared_lines(traces: Sequence[Trace], data: DataRecipe) -> list[Trace]:
    """Traces with the lines and the kinds that a recipe asks for."""
    return KINDS[data.step_types]([_with_steps(trace, LINES[data.lines](trace.steps)) for trace in traces], data.seed)


def _with_steps(trace: Trace, steps: Sequence[Step]) -> Trace:
    return replace(trace, steps=tuple(steps))


def _memory_first(steps: Sequence[Step]) -> list[Step]:
    """The published "ordered" variant: what is recalled stands before what is drawn from it (arXiv 2411.13504)."""
    return sorted(steps, key=lambda step: MEMORY not in step.kinds)


def _shuffled(traces: Sequence[Trace], seed: int) -> list[Trace]:
    """The kinds of all lines dealt out anew among them: as many blocks of each kind, which tell nothing."""
    kinds = [step.kinds for trace in traces for step in trace.steps]
    random.Random(seed).shuffle(kinds)
    dealt = iter(kinds)
    return [_with_steps(trace, [replace(step, kinds=next(dealt)) for step in trace.steps]) for trace in traces]


def _pause(traces: Sequence[Trace], seed: int) -> list[Trace]:
    """One kind for all lines: blocks that are nothing but places to compute at (pause tokens, arXiv 2310.02226)."""
    return [_with_steps(trace, [replace(step, kinds=(PAUSE,)) for step in trace.steps]) for trace in traces]


LINES: dict[str, Callable[[Sequence[Step]], Sequence[Step]]] = {
    "all": lambda steps: steps,
    "none": lambda steps: (),
    "memory-first": _memory_first,
}
KINDS: dict[str, Callable[[Sequence[Trace], int], list[Trace]]] = {
    "labelled": lambda traces, seed: list(traces),
    **dict.fromkeys(CLUSTERED, lambda traces, seed: list(traces)),  # told later: encode/step_types
    "arithmetic": lambda traces, seed: [label_arithmetic(trace) for trace in traces],
    "arithmetic-14": lambda traces, seed: [label_operations(trace) for trace in traces],
    "shuffled": _shuffled,
    "pause": _pause,
}
