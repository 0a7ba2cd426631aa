"""Flows of many questions: their means, those of right and of wrong answers, and the difference with its interval."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from memreason.core.files import writing
from memreason.core.trace import MEMORY, REASON
from memreason.encode.scheme import ANSWER
from memreason.measure.attention import Flow
from memreason.measure.segments import NO_LINE, QUESTION, Part
from memreason.measure.stats import cluster_bootstrap

__all__ = ["HEADLINES", "Array", "Asked", "flow_table", "strongest", "write_arrays"]

HEADLINES = ((ANSWER, MEMORY), (ANSWER, REASON), (REASON, MEMORY), (ANSWER, QUESTION.name))
GROUPS = ("all", "correct", "wrong")
STRONGEST = 5  # heads that are named
Array = NDArray[np.float64]


class Asked(NamedTuple):
    """A question's flow between kinds of segments, whether it was answered rightly, its group (drawn together), and
    what it shares with those that it may be compared with."""

    flow: Flow
    correct: bool
    group: str
    alike: Hashable = None


def flow_table(parts: Sequence[Part], asked: Iterable[Asked]) -> tuple[dict[str, Any], dict[str, Array]]:
    """What goes into attention.json and attention.npz.

    The first holds means over layers and heads, the second every layer and head. A question without the segment of a
    row is left out of that row; one without the segment of a column gives it no mass, so that rows sum to one, and is
    left out of its mass per key. Wrong is what is not right, no answer included.
    """
    each, arrays = _averaged(asked)
    means = {key: _plain(_mean(values, (0, 1))) for key, values in arrays.items()}
    sides = {(one.alike, one.correct) for one in each}
    mixed = {alike for alike, correct in sides if (alike, not correct) in sides}
    names, right = [part.name for part in parts], sum(one.correct for one in each)
    layers, heads = next(iter(arrays.values())).shape[:2] if arrays else (0, 0)
    table = {
        "segments": names,
        "flow": {group: means.get(group) for group in GROUPS},
        "per_key": {group: means.get(f"per_key_{group}") for group in GROUPS},
        "n": {"all": len(each), "correct": right, "wrong": len(each) - right},
        "alike": sum(one.alike in mixed for one in each),  # with both right and wrong answers to such questions
        "layers": int(layers),
        "heads": int(heads),
        "pairs": _pairs(parts, each),
        "strongest": {
            f"{row} > {column}": strongest(arrays["all"], names.index(row), names.index(column))
            for row, column in HEADLINES
            if arrays and row in names and column in names
        },
    }
    return table, arrays


def _averaged(asked: Iterable[Asked]) -> tuple[list[Asked], dict[str, Array]]:
    """Each question with means over layers and heads alone, since its whole flow is not kept; and for each group the
    mean of every layer and head over those questions that have it."""
    sums: dict[str, Array] = {}
    counts: dict[str, Array] = {}
    each: list[Asked] = []
    for one in asked:
        each.append(one._replace(flow=Flow(*(_mean(values, (0, 1)) for values in one.flow))))
        for group in ("all", "correct" if one.correct else "wrong"):
            for key, values in ((group, one.flow.mass), (f"per_key_{group}", one.flow.per_key)):
                sums[key] = sums.get(key, 0.0) + np.nan_to_num(values)
                counts[key] = counts.get(key, 0) + ~np.isnan(values)
    return each, {key: values / np.where(counts[key], counts[key], np.nan) for key, values in sums.items()}


def write_arrays(path: Path, arrays: Mapping[str, Array]) -> None:
    """Whole or not at all, as float32. Raises StorageError."""
    partial = path.with_name(f".{path.name}.partial")
    small: dict[str, Any] = {name: values.astype(np.float32) for name, values in arrays.items()}
    with writing(path):
        with partial.open("wb") as handle:
            np.savez_compressed(handle, **small)
        partial.replace(path)


def strongest(mass: Array, row: int, column: int, count: int = STRONGEST) -> list[list[float]]:
    """[layer, head, mass] of the heads by which a segment most looks at another."""
    found = np.nan_to_num(mass[:, :, row, column])
    places = np.argsort(-found, axis=None, kind="stable")[:count]
    return [[int(place // found.shape[1]), int(place % found.shape[1]), float(found.flat[place])] for place in places]


def _mean(values: Array, axis: tuple[int, ...]) -> Array:
    """Over what is known; nan where nothing is."""
    known = (~np.isnan(values)).sum(axis)
    found: Array = np.nansum(values, axis) / np.where(known, known, np.nan)
    return found


def _plain(values: Array) -> list[list[float | None]]:
    return [[None if np.isnan(value) else float(value) for value in row] for row in values]


def _pairs(parts: Sequence[Part], asked: Sequence[Asked]) -> list[dict[str, Any]]:
    """Of each kind of line and what it can look at: mass and mass per key, right and wrong, with intervals."""
    found = []
    texts = [n for n, part in enumerate(parts) if not part.block and part not in NO_LINE]
    for row in sorted(texts, key=lambda n: parts[n].kind != ANSWER):
        for column, part in enumerate(parts):
            mass, per_key = (np.array([one.flow[k][row, column] for one in asked]) for k in (0, 1))
            if np.nan_to_num(mass).any():
                names = (parts[row].name, part.name)
                told = {"from": names[0], "to": names[1], "headline": names in HEADLINES}
                found.append({**told, "mass": _measured(mass, asked), "per_key": _measured(per_key, asked)})
    return found


def _measured(values: Array, asked: Sequence[Asked]) -> dict[str, Any]:
    """Mean of right and wrong answers and their difference, each as [value, low, high] (95 %), or None."""
    known = [n for n in range(len(values)) if not np.isnan(values[n])]
    values, asked = values[known], [asked[n] for n in known]
    right = np.array([one.correct for one in asked], dtype=bool)
    groups = [one.group for one in asked]
    sides = {"correct": right, "wrong": ~right}
    return {
        "n": [int(side.sum()) for side in sides.values()],
        **{name: _bootstrap(values[side], list(compress(groups, side))) for name, side in sides.items()},
        "difference": _difference(values, right, groups, [None] * len(asked)),
        "alike": _difference(values, right, groups, [one.alike for one in asked]),
    }


def _bootstrap(values: Array, groups: Sequence[str]) -> list[float] | None:
    return list(cluster_bootstrap([float(value) for value in values], groups, samples=2000)) if len(values) else None


def _difference(
    values: Array, right: NDArray[np.bool_], groups: Sequence[str], alike: Sequence[Hashable]
) -> list[float] | None:
    """[what right answers have more than wrong ones, low, high] among questions that are alike, whole groups drawn.

    Least squares with a constant for each sort of question: value = constant + difference × right. With one sort that
    is the difference of the means. The bootstrap gets each question's influence on it, whose mean is the difference.
    None where no sort has both right and wrong answers.
    """
    sorts = np.unique([str(one) for one in alike], return_inverse=True)[1] if len(values) else np.array([], dtype=int)
    apart, own = (_within(side, sorts) for side in (right.astype(float), values))
    total = (apart**2).sum()
    if not total > 1e-9:
        return None
    difference = (apart * own).sum() / total
    return _bootstrap(difference + apart * (own - difference * apart) * len(values) / total, groups)


def _within(values: Array, sorts: NDArray[np.int64]) -> Array:
    """Distance of each value from the mean of its sort."""
    found: Array = values - (np.bincount(sorts, values) / np.maximum(1, np.bincount(sorts)))[sorts]
    return found
