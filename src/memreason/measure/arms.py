"""Arms of a comparison on the same questions: accuracy, differences from one of them, faults.

Seeds and questions are crossed: every seed of an arm answers the same questions. An interval that only drew questions
anew would leave out what another seed would have changed, and one over all pairs would count a question's answers as
independent. So groups of questions and seeds are drawn anew, each with replacement (the pigeonhole bootstrap, Owen
2007, Annals of Applied Statistics 1:386, which is slightly too wide rather than too narrow).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import NormalDist, fmean
from typing import Any

import numpy as np

from memreason.core.errors import DataError
from memreason.core.trace import Trace
from memreason.measure.attribute import VERDICTS, attribute, can_check
from memreason.measure.kinds import by_words
from memreason.measure.score import Score, chance, majority
from memreason.measure.stats import crossed_bootstrap, holm, mcnemar_exact, sign_flip, wilson

__all__ = ["POWER", "arm_faults", "arm_table"]

Groups = Sequence[str]
Right = Sequence[Sequence[bool]]  # seed by seed, question by question
Answered = Sequence[tuple[Trace, Score]]  # of one seed, in the order of the questions
POWER = 0.8  # with which the smallest difference would have been seen, at 5 % on two sides
DETECTED = NormalDist().inv_cdf(0.975) + NormalDist().inv_cdf(POWER)


def arm_table(arms: Mapping[str, Sequence[Answered]], against: str) -> dict[str, Any]:
    """Of each arm (name -> answers, seed by seed) accuracy with its interval and, from `against`, the difference with
    a paired interval, an exact test, and the smallest difference that would have been seen.

    The test is McNemar's, carried over to several seeds: each question counts once, by how much more often one arm is
    right on it. (A majority of seeds would favour whichever arm's seeds agree more.)

    Raises DataError where two arms answered other questions.
    """
    questions = [trace.question for trace, _ in arms[against][0]]
    ids = [question.id for question in questions]
    for name, seeds in arms.items():
        if any([trace.question.id for trace, _ in answered] != ids for answered in seeds):
            raise DataError(f"arm {name} answered other questions than {against}: there is nothing to compare")
    groups = [question.group for question in questions]
    right = {name: [_right(answered) for answered in seeds] for name, seeds in arms.items()}
    rows = [_row(name, seeds, right[name], groups) for name, seeds in arms.items()]
    others = [row for row in rows if row["arm"] != against]
    for row in others:
        row["difference"] = _difference(right[row["arm"]], right[against], groups)
    for row, p in zip(others, holm([row["difference"]["p"] for row in others]), strict=True):
        row["difference"]["p_holm"] = p
    about = {"n": len(ids), "groups": len(set(groups)), "chance": chance(questions), "majority": majority(questions)}
    return {"against": against, **about, "arms": rows}


def _right(answered: Answered) -> list[bool]:
    return [score.verdict == "correct" for _, score in answered]


def _row(name: str, seeds: Sequence[Answered], right: Right, groups: Groups) -> dict[str, Any]:
    mean, low, high, _ = crossed_bootstrap(right, groups)
    if mean in (0, 1):  # all draws are alike: no interval, though another question may come out otherwise
        low, high = wilson(len(set(groups)) * int(mean), len(set(groups)))
    silent = [score.verdict == "no_answer" for answered in seeds for _, score in answered]
    whole = [not trace.faults for answered in seeds for trace, _ in answered]
    return {
        "arm": name,
        "seeds": len(seeds),
        "accuracy": mean,
        "interval": [low, high],
        "by_seed": [fmean(one) for one in right],
        "no_answer": fmean(silent),
        "well_formed": fmean(whole),
        "faults": arm_faults(seeds),
    }


def _difference(ours: Right, theirs: Right, groups: Groups) -> dict[str, Any]:
    value, low, high, spread = crossed_bootstrap(ours, groups, theirs)
    more = (np.sum(ours, axis=0) * len(theirs) - np.sum(theirs, axis=0) * len(ours)).tolist()
    return {
        "value": value,
        "interval": [low, high],
        "detectable": DETECTED * spread,
        "p": sign_flip(more),
        "more_here": sum(one > 0 for one in more),
        "more_there": sum(one < 0 for one in more),
        "p_by_seed": [mcnemar_exact(a, b) for a, b in zip(ours, theirs, strict=False)],
    }


def arm_faults(seeds: Sequence[Answered]) -> dict[str, Any] | None:
    """Counts of the exact verdicts over all seeds. Lines are read by their words in every arm alike, whatever their
    blocks say; None where facts are not known, or an arm writes no lines."""
    traces = [trace for answered in seeds for trace, _ in answered]
    if not all(can_check(trace.question) for trace in traces) or not any(trace.steps for trace in traces):
        return None
    found = [attribute(by_words(trace)) for trace in traces]
    counts = Counter(one.verdict for one in found)
    missed, needed = sum(one.missed for one in found), sum(one.needed for one in found)
    return {
        "counts": {verdict: counts[verdict] for verdict in VERDICTS},
        "memory": fmean(bool(one.memory) for one in found),
        "reason": fmean(bool(one.reason) for one in found),
        "false_lines": missed / needed if needed else None,
    }
