"""Whose fault, by trying: put other memory lines in place of the generated ones, and see what the answer becomes.

With the gold facts right: the memory was at fault. Still wrong: a step is. Two placebos go along: the trace's own
lines put back, which should change nothing, and the gold facts of another question, which should help no one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from memreason.core.trace import MEMORY, Step, Trace
from memreason.measure.attribute import Attribution
from memreason.measure.score import score_trace
from memreason.measure.stats import cohens_kappa, wilson

__all__ = ["INTERVENTIONS", "begin", "compare_ways"]

Given = Callable[[Trace, Trace, Trace], Sequence[Step]]  # generated trace, its gold one, another's -> memory lines
INTERVENTIONS: dict[str, Given] = {
    "gold": lambda made, gold, other: gold.of_kind(MEMORY),
    "own": lambda made, gold, other: made.of_kind(MEMORY),
    "other": lambda made, gold, other: other.of_kind(MEMORY),
}


def begin(name: str, made: Sequence[Trace], gold: Mapping[str, Trace]) -> list[Trace]:
    """Traces to be generated on from: memory lines alone, as the intervention gives them. `gold` is by question id.

    The other question is the next one of the same form (where there is one), so that its lines look alike.
    """
    rows: dict[Any, list[Trace]] = {}
    for trace in made:
        rows.setdefault(trace.question.meta.get("form"), []).append(gold[trace.question.id])
    following = {one.question.id: row[(place + 1) % len(row)] for row in rows.values() for place, one in enumerate(row)}
    return [
        replace(trace, steps=tuple(INTERVENTIONS[name](trace, gold[trace.question.id], following[trace.question.id])))
        for trace in made
    ]


def compare_ways(exact: Sequence[Attribution], tried: Mapping[str, Sequence[Trace]]) -> dict[str, Any]:
    """Shares of right answers under each intervention, and the counterfactual verdicts against the exact ones.

    Of wrong answers with something to read: `memory` if the gold facts mend it, else `reason`. Agreement and kappa are
    over those whose exact verdict is one of the two: where both failed, either verdict is true.
    """
    right = {name: _right(traces) for name, traces in tried.items()}
    before = {one.trace.question.id: one.score.verdict == "correct" for one in exact}
    wrong = [one for one in exact if one.verdict in ("memory", "reason", "both")]
    pairs = [(one.verdict, "memory" if right["gold"][one.trace.question.id] else "reason") for one in wrong]
    single = [pair for pair in pairs if pair[0] != "both"]
    agreed = [one == other for one, other in single]
    kappa = cohens_kappa(single)
    return {
        "wrong": len(wrong),
        "confusion": {f"{one}, {other}": n for (one, other), n in sorted(Counter(pairs).items())},
        "agreement": _share(agreed),
        "kappa": None if math.isnan(kappa) else kappa,
        "accuracy": {name: _share(found.values()) for name, found in {"before": before, **right}.items()},
        "mended": {name: _share([found[one.trace.question.id] for one in wrong]) for name, found in right.items()},
    }


def _right(traces: Sequence[Trace]) -> dict[str, bool]:
    return {trace.question.id: score_trace(trace).verdict == "correct" for trace in traces}


def _share(values: Iterable[bool]) -> dict[str, Any]:
    some = list(values)
    return {"n": len(some), "share": sum(some) / max(1, len(some)), "wilson": list(wilson(sum(some), len(some)))}
