"""Questions of one set that also stand in another: the same after normalisation, or nearly the same."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from memreason.core.trace import Question, Trace
from memreason.data.mix import question_key

__all__ = ["leakage", "near_pairs", "shingles", "words"]

NEAR = 0.8  # Jaccard likeness from which two questions are nearly the same
RUN = 2  # words of a shingle
ENOUGH = 3  # rare members in common before two sets are compared: with 1, all questions of one template would be
UNSPACED = "\u3040-\u30ff\u3400-\u9fff\u0e00-\u0e7f"  # written without spaces: there every sign counts as a word
WORD = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+(?:['’.,-]\w+)*")


def words(text: str) -> list[str]:
    return WORD.findall(text)


def shingles(question: Question) -> frozenset[str]:
    """Runs of two words of the question and of each choice; a text of one word is its own run."""
    runs = set()
    for part in question_key(question):
        found = words(part)
        runs |= {" ".join(found[place : place + RUN]) for place in range(max(1, len(found) - RUN + 1))}
    return frozenset(runs)


def near_pairs(
    first: Sequence[Collection[str]], second: Sequence[Collection[str]], least: float = NEAR
) -> list[tuple[int, int, float]]:
    """(place in first, place in second, Jaccard likeness) of every pair whose likeness is at least `least`.

    Two sets that are so alike have ENOUGH of their rarest members in common: only those are indexed and counted
    (prefix filtering: Chaudhuri 2006, ICDE; with several in common: Wang 2012, SIGMOD), so that nothing is
    compared with everything.
    """
    counts = Counter(member for members in (*first, *second) for member in members)
    rank = {member: place for place, member in enumerate(sorted(counts, key=lambda member: (counts[member], member)))}
    ranked = [sorted(rank[member] for member in members) for members in second]
    lists: dict[int, list[int]] = defaultdict(list)
    for place, own in enumerate(ranked):
        for member in own[: _prefix(len(own), least)]:
            lists[member].append(place)
    index = {member: np.array(places) for member, places in lists.items()}
    sets = [frozenset(members) for members in ranked]
    found = []
    for place, members in enumerate(first):
        own = sorted(rank[member] for member in members)
        hits = [index[member] for member in own[: _prefix(len(own), least)] if member in index]
        if not hits:
            continue
        others, shared = np.unique(np.concatenate(hits), return_counts=True)
        for other in others[shared >= min(ENOUGH, _least_shared(len(own), least))].tolist():
            likeness = _jaccard(own, sets[other])
            if likeness >= least:
                found.append((place, other, likeness))
    return found


def _least_shared(size: int, least: float) -> int:
    """How many members a set of this size has in common with any set that is alike enough."""
    return math.ceil(least * size - 1e-9)


def _prefix(size: int, least: float) -> int:
    return size - _least_shared(size, least) + ENOUGH


def _jaccard(own: list[int], other: frozenset[int]) -> float:
    shared = len(other.intersection(own))
    return shared / (len(own) + len(other) - shared)


def leakage(traces: Sequence[Trace], held_out: Sequence[Trace] = ()) -> list[dict[str, Any]]:
    """One finding for each pair of splits in the file, and one against `held_out`.

    Each holds `between`, `sizes`, and the pairs that are `same` (to the leak guard) and `near` (likeness 0.8 or
    more), a question of the first set standing in one pair, with what is most like it. Against `held_out` stand the
    training traces, or all where the file has none. Traces count from 1.
    """
    rows = list(enumerate(traces, 1))
    splits: dict[str, list[tuple[int, Trace]]] = {}
    for row in rows:
        splits.setdefault(row[1].question.split, []).append(row)
    names = sorted(splits, key=lambda name: (name != "train", name))
    found = [
        _compare(splits[one], splits[other], (one or "(no split)", other or "(no split)"))
        for place, one in enumerate(names)
        for other in names[place + 1 :]
    ]
    if held_out:
        train = [row for row in rows if row[1].question.split in ("", "train")] or rows
        found.append(_compare(train, list(enumerate(held_out, 1)), ("this file", "the held-out file")))
    return found


def _compare(
    first: Sequence[tuple[int, Trace]], second: Sequence[tuple[int, Trace]], between: tuple[str, str]
) -> dict[str, Any]:
    firsts, seconds = _by_key(first), _by_key(second)
    same = [(place, seconds[key][0], 1.0) for key, places in firsts.items() if key in seconds for place in places]
    rest = [places for key, places in firsts.items() if key not in seconds]
    others = [places[0] for places in seconds.values()]
    alike = near_pairs(
        [shingles(first[places[0]][1].question) for places in rest],
        [shingles(second[place][1].question) for place in others],
    )
    nearest = {one: (others[other], likeness) for one, other, likeness in sorted(alike, key=lambda pair: pair[2])}
    near = [(place, *pair) for one, pair in nearest.items() for place in rest[one]]

    def told(pairs: list[tuple[int, int, float]]) -> list[dict[str, Any]]:
        return [
            {
                "trace": first[one][0],
                "question": first[one][1].question.text,
                "other_trace": second[other][0],
                "other": second[other][1].question.text,
                "likeness": likeness,
            }
            for one, other, likeness in sorted(pairs)
        ]

    return {"between": list(between), "sizes": [len(first), len(second)], "same": told(same), "near": told(near)}


def _by_key(rows: Sequence[tuple[int, Trace]]) -> dict[tuple[str, ...], list[int]]:
    places: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for place, (_, trace) in enumerate(rows):
        places[question_key(trace.question)].append(place)
    return places
