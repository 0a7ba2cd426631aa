"""What is in the clusters of steps: how many, the most typical ones, and how they agree with kinds known before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from memreason.core.trace import Step, Trace
from memreason.encode.step_types.typer import Features

__all__ = ["clusters", "purity"]

EXAMPLES = 4  # shown of each cluster


def purity(made: Sequence[Trace], labelled: Sequence[Trace]) -> float | None:
    """Share of the steps whose type is mostly of their labelled kinds: 1.0 if no type mixes two. None without labels.

    Only steps count that have both; traces are the same ones in the same order.
    """
    pairs = [pair for pair in _pairs(made, labelled) if all(step.kinds for step in pair)]
    if not pairs:
        return None
    return sum(max(counts.values()) for counts in _counts(pairs).values()) / len(pairs)


def clusters(made: Sequence[Trace], labelled: Sequence[Trace], found: Features | None) -> dict[str, Any]:
    """Of each type: steps, which labelled kinds they had, and typical texts (nearest to its mean); and the purity.

    `found` are the features that the types were told by; without them the first texts are shown.
    """
    pairs = _pairs(made, labelled)
    counts = _counts(pairs)
    table = {
        "+".join(kinds) or "none": {
            "steps": sum(counts[kinds].values()),
            "labelled": {"+".join(known) or "none": n for known, n in counts[kinds].most_common()},
            "examples": _typical([step.text for step, _ in pairs], [step.kinds == kinds for step, _ in pairs], found),
        }
        for kinds in sorted(counts, key=lambda kinds: -sum(counts[kinds].values()))
    }
    return {"steps": len(pairs), "purity": purity(made, labelled), "types": table}


def _pairs(made: Sequence[Trace], labelled: Sequence[Trace]) -> list[tuple[Step, Step]]:
    return [
        pair for one, other in zip(made, labelled, strict=True) for pair in zip(one.steps, other.steps, strict=True)
    ]


def _counts(pairs: Sequence[tuple[Step, Step]]) -> dict[tuple[str, ...], Counter[tuple[str, ...]]]:
    counts: dict[tuple[str, ...], Counter[tuple[str, ...]]] = {}
    for step, known in pairs:
        counts.setdefault(step.kinds, Counter())[known.kinds] += 1
    return counts


def _typical(texts: Sequence[str], own: Sequence[bool], found: Features | None) -> list[str]:
    """A few different texts of a cluster, the nearest to its mean first."""
    from sklearn.metrics.pairwise import euclidean_distances

    places = np.flatnonzero(own)
    if found is not None and found.known[places].all():
        vectors = found.vectors[np.cumsum(found.known)[places] - 1]
        away = euclidean_distances(vectors, np.asarray(vectors.mean(0)).reshape(1, -1))[:, 0]  # sparse ones stay so
        places = places[np.argsort(away.round(6), kind="stable")]
    return list(dict.fromkeys(texts[place] for place in places.tolist() if texts[place]))[:EXAMPLES]
