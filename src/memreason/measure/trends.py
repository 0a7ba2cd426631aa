"""Do faults grow with obscurity and with hops? Slopes over questions, with intervals by group."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from memreason.measure.attribute import Attribution

__all__ = ["slope", "trends"]

LEVELS = ("obscurity", "hops")
FAULTS: dict[str, Callable[[Attribution], tuple[float, float]]] = {  # -> (faults, of how many)
    "memory": lambda one: (bool(one.memory), 1),
    "reason": lambda one: (bool(one.reason), 1),
    "per_line": lambda one: (one.missed, one.needed),
}


def trends(found: Sequence[Attribution]) -> dict[str, Any]:
    """By level and fault: how much the share of questions with a memory or reason fault, and of needed memory lines
    that are false or missing, changes a unit of the level. One unit of obscurity is from the most to the least
    populous country, one of hops is a fact more. Empty where questions have no levels."""
    groups = [one.trace.question.group for one in found]
    rows: dict[str, Any] = {}
    for level in LEVELS:
        if found and all(level in one.trace.question.meta for one in found):
            x = [float(one.trace.question.meta[level]) for one in found]
            rows[level] = {name: slope(x, [count(one) for one in found], groups) for name, count in FAULTS.items()}
    return rows


def slope(
    x: Sequence[float],
    counts: Sequence[tuple[float, float]],
    groups: Sequence[Hashable],
    *,
    samples: int = 2000,
    seed: int = 0,
) -> dict[str, Any] | None:
    """Least-squares slope of the share y / weight on x, counts being (y, weight), with a percentile interval of 95 %,
    whole groups drawn with replacement. None where x does not vary.

    Its sign is that of the Cochran-Armitage statistic (Biometrics 11:375), whose own test takes questions for
    independent.
    """
    place: dict[Hashable, int] = {}
    index = [place.setdefault(group, len(place)) for group in groups]
    y, weight = np.asarray(counts, dtype=float).reshape(-1, 2).T
    level = np.asarray(x, dtype=float)
    parts = (weight, weight * level, weight * level * level, y, y * level)
    sums = np.stack([np.bincount(index, part) for part in parts], axis=1)  # [groups, 5]
    found = float(_slope(sums.sum(axis=0)))
    if math.isnan(found):
        return None
    n = len(sums)
    drawn = np.random.default_rng(seed).multinomial(n, [1 / n] * n, size=samples)
    low, high = np.nanquantile(_slope(drawn @ sums), [0.025, 0.975])
    return {"slope": found, "by_group": [float(low), float(high)]}


def _slope(sums: Any) -> Any:
    """From sums of weight, weight x, weight x², y and x y, along the last axis; nan where x does not vary."""
    w, wx, wxx, y, xy = np.moveaxis(sums, -1, 0)
    spread = w * wxx - wx * wx
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(spread > 1e-9 * w * wxx, (w * xy - wx * y) / spread, np.nan)
