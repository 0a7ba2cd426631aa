"""Several ways of attribution side by side: the strongest one's verdict, and how far they agree."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from memreason.core.trace import Trace
from memreason.measure.attribute import VERDICTS, Attribution, Verdict, fault_table, readable
from memreason.measure.score import score_trace
from memreason.measure.stats import kappa_bootstrap, wilson
from memreason.measure.trends import trends

__all__ = ["WAYS", "compare_ways", "fault_lines", "faults_of", "read_ways", "strongest"]

Ways = Mapping[str, Sequence[Attribution]]  # the same questions in the same order
WAYS: dict[str, tuple[Verdict, ...]] = {  # strongest first, with the verdicts that each can give
    "exact": VERDICTS,
    "counterfactual": ("memory", "reason", "format", "right", "unjudged"),
    "judge": ("memory", "reason", "both", "format", "right", "unjudged"),
}


def _verdicts_of(ways: Ways) -> list[Verdict]:
    """What the strongest verdicts can be: the exact way leaves nothing unjudged."""
    known = VERDICTS if "exact" in ways else (*VERDICTS, "unjudged")
    return [verdict for verdict in known if any(verdict in WAYS[name] for name in ways)]


def strongest(ways: Ways) -> list[Attribution]:
    """Of each question the finding of the strongest way that has a verdict on it."""
    rows = zip(*(ways[name] for name in WAYS if name in ways), strict=True)
    return [next((one for one in row if one.verdict != "unjudged"), row[0]) for row in rows]


def fault_lines(ways: Ways) -> list[dict[str, Any]]:
    """For each question the strongest way's verdict and why, then every way's verdict, its words, and what it has to
    show."""
    lines = []
    for place, main in enumerate(strongest(ways)):
        found = {name: ways[name][place] for name in WAYS if name in ways}
        shown = {name: dict(one.evidence) for name, one in found.items() if one.evidence}
        said = {name: _words(one) for name, one in found.items() if name != "exact" and _words(one)}
        verdicts = {name: one.verdict for name, one in found.items()}
        lines.append({**main.to_json(), "ways": verdicts, "said": said, **shown})
    return lines


def _words(one: Attribution) -> list[str]:
    """Why, of a way that says the same of memory and reason where both are at fault: every one but the exact."""
    return [*dict.fromkeys((*one.memory, *one.reason))]


def read_ways(lines: Sequence[Mapping[str, Any]], made: Sequence[Trace]) -> dict[str, list[Attribution]]:
    """The ways of `fault_lines` again, less the exact one, which costs nothing. `made` are the traces they are of."""
    names = [name for name in WAYS if name != "exact" and all(name in line["ways"] for line in lines)]
    return {name: [_read(name, *pair) for pair in zip(lines, made, strict=True)] for name in names}


def _read(name: str, line: Mapping[str, Any], trace: Trace) -> Attribution:
    verdict, words = line["ways"][name], tuple(line["said"].get(name, ()))
    memory, reason = (words if verdict in (kind, "both") else () for kind in ("memory", "reason"))
    return Attribution(trace, score_trace(trace), verdict, memory, reason, evidence=line.get(name, {}))


def faults_of(ways: Ways) -> dict[str, Any]:
    """The table of the strongest verdicts, its trends, the counts of each way, and how far the ways agree."""
    found, names = strongest(ways), [name for name in WAYS if name in ways]
    counts = {name: Counter(one.verdict for one in ways[name]) for name in names}
    return {
        **fault_table(found, _verdicts_of(ways)),
        "trends": trends(found),
        "ways": {name: {verdict: counts[name][verdict] for verdict in WAYS[name]} for name in names},
        "agreement": compare_ways(ways),
    }


def compare_ways(ways: Ways) -> list[dict[str, Any]]:
    """Each two ways: how their verdicts on readable wrong answers fall together, the share that agrees (Wilson's
    interval) and Cohen's kappa (interval by group).

    Agreement is over verdicts that both ways can give: one that tries cannot tell `both` from one of the two.
    """
    return [_compare(pair, ways) for pair in combinations([name for name in WAYS if name in ways], 2)]


def _compare(between: tuple[str, str], ways: Ways) -> dict[str, Any]:
    both = zip(*(ways[name] for name in between), strict=True)
    wrong = [pair for pair in both if pair[0].wrong and readable(pair[0].trace, pair[0].score)]
    shared = set.intersection(*(set(WAYS[name]) for name in between)) - {"unjudged"}
    compared = [pair for pair in wrong if all(one.verdict in shared for one in pair)]
    agreed = sum(one.verdict == other.verdict for one, other in compared)
    kappa, *by_group = kappa_bootstrap(
        [(one.verdict, other.verdict) for one, other in compared], [one.trace.question.group for one, _ in compared]
    )
    confusion = Counter(f"{one.verdict}, {other.verdict}" for one, other in wrong)
    return {
        "between": list(between),
        "wrong": len(wrong),
        "confusion": dict(sorted(confusion.items())),
        "agreement": {
            "n": len(compared),
            "share": agreed / max(1, len(compared)),
            "wilson": list(wilson(agreed, len(compared))),
        },
        "kappa": None if math.isnan(kappa) else {"kappa": kappa, "by_group": by_group},
    }
