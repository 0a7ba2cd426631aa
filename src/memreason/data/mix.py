"""Puts training sets together and takes them apart: leaks, mixtures, a validation split, subsets.

Everything is drawn without replacement and is the same for the same seed on every machine.
"""

from __future__ import annotations

import math
import random
import unicodedata
from collections.abc import Iterable, Sequence

from memreason.core.errors import RecipeError, TaskError
from memreason.core.trace import Question, Trace

__all__ = ["carve_validation", "leak_guard", "mix", "plain", "question_key", "subset"]

QUOTES = str.maketrans("‘’“”", "''\"\"")


def leak_guard(train: Iterable[Trace], held_out: Iterable[Trace]) -> tuple[list[Trace], list[Trace]]:
    """Part `train` into (kept, dropped): dropped are questions that also stand in `held_out`.

    Case, spacing, curly quotes, closing punctuation and the order of the choices make no difference,
    nor does the task.
    """
    closed = {question_key(trace.question) for trace in held_out}
    kept: list[Trace] = []
    dropped: list[Trace] = []
    for trace in train:
        (dropped if question_key(trace.question) in closed else kept).append(trace)
    return kept, dropped


def question_key(question: Question) -> tuple[str, ...]:
    """What two questions share that are the same to the leak guard: text and choices, normalised."""
    return (plain(question.text), *sorted(plain(choice) for choice in question.choices or ()))


def plain(text: str) -> str:
    """A text without what makes no difference: case, spacing, curly quotes, closing punctuation."""
    # Only closing punctuation goes: within a question it may be the question ("3 + 5", "3 - 5").
    return " ".join(unicodedata.normalize("NFKC", text).translate(QUOTES).casefold().split()).rstrip("?.! ")


def mix(sources: Sequence[tuple[Sequence[Trace], float]], seed: int) -> list[Trace]:
    """One shuffled epoch in which each trace of a source appears `weight` times.

    Of a weight of 2.25 every trace appears twice and a quarter of them, drawn without replacement, once more.
    Raises RecipeError for a weight that is negative or not finite, and if nothing is left.
    """
    wrong = [
        f"source {number}: weight {weight} must be 0 or more"
        for number, (_, weight) in enumerate(sources, 1)
        if not (math.isfinite(weight) and weight >= 0)
    ]
    if wrong:
        raise RecipeError(wrong, "mix")
    epoch: list[Trace] = []
    for number, (traces, weight) in enumerate(sources):
        whole = int(weight)
        epoch += list(traces) * whole
        # Each source has its own generator, so that a change to one leaves what is drawn from the others.
        part = round((weight - whole) * len(traces))
        epoch += random.Random(f"{seed}:{number}").sample(list(traces), part)
    if not epoch:
        raise RecipeError("every source is empty or has weight 0; give one a greater weight", "mix")
    random.Random(seed).shuffle(epoch)
    return epoch


def carve_validation(train: Sequence[Trace], share_or_n: float, seed: int) -> tuple[list[Trace], list[Trace]]:
    """Part `train` into (train, validation), whole groups on one side, both in their old order.

    A float is a share between 0 and 1, an int a number of traces. Groups are drawn as long as they fit,
    so that validation never holds more than was asked for. The draw depends on groups, not on their order.
    """
    wanted = _wanted(share_or_n, len(train))
    sizes: dict[str, int] = {}
    for trace in train:
        sizes[trace.question.group] = sizes.get(trace.question.group, 0) + 1
    groups = sorted(sizes)
    random.Random(seed).shuffle(groups)
    chosen: set[str] = set()
    free = wanted
    for group in groups:
        if sizes[group] <= free:
            chosen.add(group)
            free -= sizes[group]
    if not chosen:
        raise TaskError(f"validation of {wanted}: the smallest group holds {min(sizes.values())}; ask for more")
    parts: tuple[list[Trace], list[Trace]] = ([], [])
    for trace in train:
        in_validation = trace.question.group in chosen
        parts[in_validation].append(trace.with_question(split="validation") if in_validation else trace)
    return parts


def _wanted(share_or_n: float, total: int) -> int:
    number = isinstance(share_or_n, int) and not isinstance(share_or_n, bool)
    wanted = int(share_or_n) if number else round(share_or_n * total) if 0 < share_or_n < 1 else 0
    if not 0 < wanted < total:
        raise TaskError(
            f"validation of {share_or_n!r} from {total} traces: give a share between 0 and 1 "
            f"or a whole number from 1 to {total - 1} that leaves both sides at least one trace"
        )
    return wanted


def subset(traces: Sequence[Trace], n: int, seed: int) -> list[Trace]:
    """`n` traces drawn without replacement, in their old order. Raises TaskError if there are fewer."""
    if not 0 < n <= len(traces):
        raise TaskError(f"{n} traces asked for: a number from 1 to {len(traces)} (all there are) is needed")
    return [traces[place] for place in sorted(random.Random(seed).sample(range(len(traces)), n))]
