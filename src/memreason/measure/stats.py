"""Intervals and paired tests."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from statistics import NormalDist, fmean
from typing import Any

import numpy as np

from memreason.core.trace import Trace
from memreason.measure.score import Score, chance, majority

__all__ = ["mcnemar_exact", "paired_bootstrap", "summarise", "wilson"]


def wilson(correct: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson 1927). (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = correct / n
    middle = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def mcnemar_exact(a: Sequence[bool], b: Sequence[bool]) -> float:
    """Two-sided exact p of McNemar's test on the same questions, from the pairs that differ."""
    if len(a) != len(b):
        raise ValueError(f"the same questions are needed: {len(a)} and {len(b)}")
    only_a = sum(x and not y for x, y in zip(a, b, strict=True))
    only_b = sum(y and not x for x, y in zip(a, b, strict=True))
    n, k = only_a + only_b, min(only_a, only_b)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


def paired_bootstrap(
    a: Sequence[bool],
    b: Sequence[bool],
    groups: Sequence[Hashable] | None = None,
    *,
    samples: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> tuple[float, float, float]:
    """(accuracy of a minus accuracy of b, low, high); questions of one group are resampled together."""
    difference = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    _, index = np.unique([str(group) for group in (groups or range(len(difference)))], return_inverse=True)
    sums, sizes = np.bincount(index, difference), np.bincount(index)
    random = np.random.default_rng(seed)
    drawn = random.integers(len(sums), size=(samples, len(sums)))
    means = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    low, high = np.quantile(means, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(difference.mean()), float(low), float(high)


def summarise(scored: Sequence[tuple[Trace, Score]]) -> dict[str, Any]:
    """Accuracy with its Wilson interval, no_answer, well-formed share, lines per kind, chance and majority."""
    n = len(scored)
    correct = sum(score.verdict == "correct" for _, score in scored)
    questions = [trace.question for trace, _ in scored]
    kinds = Counter(kind for trace, _ in scored for step in trace.steps for kind in step.kinds)
    return {
        "n": n,
        "correct": correct,
        "accuracy": correct / max(1, n),
        "interval": wilson(correct, n),
        "no_answer": fmean([score.verdict == "no_answer" for _, score in scored] or [0]),
        "well_formed": fmean([not trace.faults for trace, _ in scored] or [0]),
        "blocks": {kind: count / max(1, n) for kind, count in sorted(kinds.items())},
        "chance": chance(questions),
        "majority": majority(questions),
    }
