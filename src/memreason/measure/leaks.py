"""Questions of one set that also stand in another: the same after normalisation, or nearly the same."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from typing import Any

from memreason.core.trace import Question, Trace
from memreason.data.mix import question_key

__all__ = ["leakage", "near_pairs", "shingles", "words"]

NEAR = 0.8  # Jaccard likeness from which two questions are nearly the same
RUN = 2  # words of a shingle
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

    Two sets that are so alike share one of their rarest members: only those are indexed and looked up (prefix
    filtering: Chaudhuri 2006, ICDE; Bayardo 2007, WWW), so that nothing is compared with everything.
    """
    counts = Counter(member for members in (*first, *second) for member in members)
    rank = {member: place for place, member in enumerate(sorted(counts, key=lambda member: (counts[member], member)))}
    index: dict[int, list[int]] = defaultdict(list)
    ranked = [sorted(rank[member] for member in members) for members in second]
    for place, members in enumerate(ranked):
        for member in _rarest(members, least):
            index[member].append(place)
    sets = [frozenset(members) for members in ranked]
    found = []
    for place, members in enumerate(first):
        own = sorted(rank[member] for member in members)
        near = {other for member in _rarest(own, least) for other in index.get(member, ())}
        for other in sorted(near):
            likeness = _jaccard(own, sets[other], least)
            if likeness >= least:
                found.append((place, other, likeness))
    return found


def _rarest(members: list[int], least: float) -> list[int]:
    return members[: len(members) - math.ceil(least * len(members) - 1e-9) + 1]


def _jaccard(own: list[int], other: frozenset[int], least: float) -> float:
    if min(len(own), len(other)) < least * max(len(own), len(other)) - 1e-9:  # too unlike in size alone
        return 0.0
    shared = len(other.intersection(own))
    return shared / (len(own) + len(other) - shared)


def leakage(traces: Sequence[Trace], held_out: Sequence[Trace] = ()) -> list[dict[str, Any]]:
    """One finding for each pair of splits in the file, and one against `held_out`.

    Each holds `between`, `sizes`, and the pairs that are `same` (to the leak guard) and `near` (likeness 0.8 or
    more). Against `held_out` stand the training traces, or all where the file has none. Traces count from 1.
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
        found.append(_compare(train, list(enumerate(held_out, 1)), ("file", "held out")))
    return found


def _compare(
    first: Sequence[tuple[int, Trace]], second: Sequence[tuple[int, Trace]], between: tuple[str, str]
) -> dict[str, Any]:
    places: dict[tuple[str, ...], int] = {}
    for place, (_, trace) in enumerate(second):
        places.setdefault(question_key(trace.question), place)
    same: list[tuple[int, int, float]] = []
    rest: list[int] = []
    for place, (_, trace) in enumerate(first):
        other = places.get(question_key(trace.question))
        if other is None:
            rest.append(place)
        else:
            same.append((place, other, 1.0))
    near = near_pairs(
        [shingles(first[place][1].question) for place in rest], [shingles(trace.question) for _, trace in second]
    )
    near = [(rest[place], other, likeness) for place, other, likeness in near]

    def told(pairs: list[tuple[int, int, float]]) -> list[dict[str, Any]]:
        return [
            {
                "trace": first[one][0],
                "question": first[one][1].question.text,
                "other_trace": second[other][0],
                "other": second[other][1].question.text,
                "likeness": likeness,
            }
            for one, other, likeness in pairs
        ]

    return {"between": list(between), "sizes": [len(first), len(second)], "same": told(same), "near": told(near)}
