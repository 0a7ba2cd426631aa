"""Intervals, paired tests, agreement."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from statistics import NormalDist, fmean
from typing import Any

import numpy as np

from memreason.core.trace import Trace
from memreason.measure.score import Score, chance, majority

__all__ = [
    "cluster_bootstrap",
    "cohens_kappa",
    "crossed_bootstrap",
    "holm",
    "kappa_bootstrap",
    "mcnemar_exact",
    "paired_bootstrap",
    "sign_flip",
    "summarise",
    "wilson",
]

CELLS = 1 << 22  # draws held at a time: 32 MB


def wilson(correct: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval of a share (Wilson 1927, JASA 22:209). (0, 1) for n = 0."""
    if not 0 <= correct <= n:
        raise ValueError(f"{correct} of {n} is not a share")
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = correct / n
    middle = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    low = (middle - half) / scale if correct else 0.0  # exact at the ends, where rounding leaves 1e-17
    high = (middle + half) / scale if correct < n else 1.0
    return low, high


def _paired(a: Sequence[Any], b: Sequence[Any], name: str) -> None:
    if len(a) != len(b):
        raise ValueError(f"{name} pair by pair is needed: {len(a)} and {len(b)} were given")


def mcnemar_exact(a: Sequence[bool], b: Sequence[bool]) -> float:
    """Two-sided exact p of McNemar's test on the same questions: the binomial of the pairs that differ.

    McNemar 1947 (Psychometrika 12:153) in its exact form; 1.0 if no pair differs.
    """
    _paired(a, b, "the same questions")
    only_a = sum(bool(x and not y) for x, y in zip(a, b, strict=True))
    only_b = sum(bool(y and not x) for x, y in zip(a, b, strict=True))
    n, k = only_a + only_b, min(only_a, only_b)
    tail = sum(math.comb(n, i) for i in range(k + 1))
    return min(1.0, (2 * tail) / (1 << n))


def sign_flip(differences: Sequence[int]) -> float:
    """Two-sided exact p that paired differences are centred on 0: the share of all ways to give them signs whose sum is
    as far from 0 (Fisher 1935, The Design of Experiments, section 21). Of -1, 0 and 1 it is McNemar's exact test.
    """
    sizes = [abs(difference) for difference in differences if difference]
    reach, shares = sum(sizes), np.ones(1)  # of the sums -reach ... reach, two apart
    for size in sizes:
        shares = 0.5 * (np.pad(shares, (0, size)) + np.pad(shares, (size, 0)))
    far = abs(np.arange(len(shares)) * 2 - reach) >= abs(sum(differences))
    return min(1.0, float(shares[far].sum()))


def cluster_bootstrap(
    values: Sequence[float],
    groups: Sequence[Hashable] | None = None,
    *,
    samples: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> tuple[float, float, float]:
    """(mean, low, high): a percentile interval (Efron 1979), whole groups drawn with replacement.

    Without `groups` each value is its own group. One group only gives an interval of no width.
    """
    if not len(values):
        raise ValueError("at least one value is needed")
    labels: Sequence[Hashable] = range(len(values)) if groups is None else groups
    _paired(values, labels, "values and groups")
    place: dict[Hashable, int] = {}
    index = [place.setdefault(label, len(place)) for label in labels]
    data = np.asarray(values, dtype=float)
    sums, sizes = np.bincount(index, data), np.bincount(index)
    random = np.random.default_rng(seed)
    means = np.empty(samples)
    step = max(1, CELLS // len(sums))
    for start in range(0, samples, step):
        drawn = random.integers(len(sums), size=(min(step, samples - start), len(sums)))
        means[start : start + step] = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    low, high = np.quantile(means, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(data.mean()), float(low), float(high)


def paired_bootstrap(
    a: Sequence[bool],
    b: Sequence[bool],
    groups: Sequence[Hashable] | None = None,
    samples: int = 10_000,
    seed: int = 0,
    *,
    confidence: float = 0.95,
) -> tuple[float, float, float]:
    """(accuracy of a minus accuracy of b, low, high) on the same questions; groups are resampled together."""
    _paired(a, b, "the same questions")
    difference = [float(x) - float(y) for x, y in zip(a, b, strict=True)]
    return cluster_bootstrap(difference, groups, samples=samples, seed=seed, confidence=confidence)


def crossed_bootstrap(
    rows: Sequence[Sequence[float]],
    groups: Sequence[Hashable],
    minus: Sequence[Sequence[float]] | None = None,
    *,
    samples: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> tuple[float, float, float, float]:
    """(mean, low, high, standard error) of values that stand in rows (seeds) and columns (questions, in groups), or of
    their mean less that of `minus` on the same questions: whole groups and whole rows drawn with replacement, groups
    for both alike (the pigeonhole bootstrap, Owen 2007, AOAS 1:386)."""
    sides = [np.asarray(side, dtype=float) for side in (rows, minus) if side is not None]
    for side in sides:
        _paired(side[0], groups, "values and groups")
    place: dict[Hashable, int] = {}
    index = [place.setdefault(label, len(place)) for label in groups]
    sizes = np.bincount(index)
    sums = [np.stack([np.bincount(index, row) for row in side], axis=1) for side in sides]  # (groups, rows)
    random = np.random.default_rng(seed)
    drawn = np.empty(samples)
    step = max(1, CELLS // len(sizes))
    for start in range(0, samples, step):
        count = min(step, samples - start)
        picked = random.multinomial(len(sizes), [1 / len(sizes)] * len(sizes), size=count)
        means = []
        for one in sums:
            k = one.shape[1]
            weights = random.multinomial(k, [1 / k] * k, size=count) / k
            means.append((picked @ one / (picked @ sizes)[:, None] * weights).sum(axis=1))
        drawn[start : start + count] = means[0] - means[1] if minus is not None else means[0]
    low, high = np.quantile(drawn, [0.5 - confidence / 2, 0.5 + confidence / 2])
    mean = sides[0].mean() - (sides[1].mean() if minus is not None else 0.0)
    return float(mean), float(low), float(high), float(drawn.std(ddof=1))


def holm(ps: Sequence[float]) -> list[float]:
    """p values of several tests, adjusted so that all together err as one would (Holm 1979, Scand. J. Stat. 6:65)."""
    order = sorted(range(len(ps)), key=lambda place: ps[place])
    adjusted, most = [0.0] * len(ps), 0.0
    for rank, place in enumerate(order):
        most = max(most, min(1.0, (len(ps) - rank) * ps[place]))
        adjusted[place] = most
    return adjusted


def cohens_kappa(pairs: Sequence[tuple[Hashable, Hashable]]) -> float:
    """Agreement of two labellers beyond chance: (observed - expected) / (1 - expected) (Cohen 1960, EPM 20:37).

    nan where chance alone makes them agree, both having used one and the same class, or where there are no pairs:
    1.0 would praise labels that nothing was asked of.
    """
    return float(_kappa(_tables(pairs, [0] * len(pairs)).sum(axis=0)))


def kappa_bootstrap(
    pairs: Sequence[tuple[Hashable, Hashable]],
    groups: Sequence[Hashable],
    *,
    samples: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> tuple[float, float, float]:
    """(kappa, low, high): a percentile interval, whole groups drawn with replacement.

    Draws without a kappa, because they hold one class only, are left out; all three are nan where the pairs have none.
    """
    _paired(pairs, groups, "pairs and groups")
    tables = _tables(pairs, groups)
    kappa = float(_kappa(tables.sum(axis=0)))
    if math.isnan(kappa):
        return kappa, kappa, kappa
    n, random = len(tables), np.random.default_rng(seed)
    step = max(1, CELLS // n)
    drawn = [
        _kappa(np.tensordot(random.multinomial(n, [1 / n] * n, size=min(step, samples - start)), tables, 1))
        for start in range(0, samples, step)
    ]
    low, high = np.nanquantile(np.concatenate(drawn), [0.5 - confidence / 2, 0.5 + confidence / 2])
    return kappa, float(low), float(high)


def _tables(pairs: Sequence[tuple[Hashable, Hashable]], groups: Sequence[Hashable]) -> Any:
    """How often each pair of classes stands in each group: [groups, classes, classes]."""
    classes: dict[Hashable, int] = {}
    cells = [tuple(classes.setdefault(one, len(classes)) for one in pair) for pair in pairs]
    place: dict[Hashable, int] = {}
    rows = [place.setdefault(group, len(place)) for group in groups]
    tables = np.zeros((len(place), len(classes), len(classes)))
    for row, cell in zip(rows, cells, strict=True):
        tables[(row, *cell)] += 1
    return tables


def _kappa(tables: Any) -> Any:
    """Kappa of each table of counts [..., classes, classes]; nan where it is 0 / 0."""
    n = tables.sum(axis=(-2, -1))
    agreed = tables.trace(axis1=-2, axis2=-1) * n
    expected = (tables.sum(axis=-1) * tables.sum(axis=-2)).sum(axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (agreed - expected) / (n * n - expected)  # in whole counts: 1 - expected would not be exactly 0


def summarise(scored: Sequence[tuple[Trace, Score]]) -> dict[str, Any]:
    """Accuracy with its Wilson interval, shares of no_answer, of traces without faults and of those that
    did not end, mean lines per kind, chance and majority class. A line of several kinds counts for each."""
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
        "cut_off": fmean(["no end of sequence" in trace.faults for trace, _ in scored] or [0]),
        "blocks": {kind: count / max(1, n) for kind, count in sorted(kinds.items())},
        "chance": chance(questions),
        "majority": majority(questions),
    }
