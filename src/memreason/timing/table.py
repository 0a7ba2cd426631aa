"""The table of a bench: what is compared, the ratio of each turn, and what is to be reached."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from itertools import cycle
from typing import Any, NamedTuple

__all__ = ["table"]

Figures = dict[str, Any]


class Compared(NamedTuple):
    """A row: which stage's jobs, against which of them, in which figure; what to reach, and what to aim at."""

    stage: str
    job: str
    baseline: str  # the first words of its label
    figure: str
    reach: str
    aim: str
    less: bool = False  # small is good: theirs stands above

    def ratios(self, ours: list[Figures], theirs: list[Figures]) -> list[float]:
        """Turn by turn, or each of ours against their only one; above 1 is better."""
        assert len(theirs) in (1, len(ours))
        pairs = [(a[self.figure], b[self.figure]) for a, b in zip(ours, cycle(theirs), strict=False)]
        return [b / a if self.less else a / b for a, b in pairs]


TRAINING = "training, tokens/s"
EVALUATION = "evaluation, tokens/s"  # not questions: the slow ones get some of them, which may be longer or shorter
ROWS = (
    Compared("training", TRAINING, "plain loop", "tokens_per_second", "5", "8"),
    Compared("training", TRAINING, "TRL", "tokens_per_second", "4", "6"),
    Compared("training", "training, peak memory", "plain loop", "peak_memory", "1.0", "1.7", less=True),
    Compared("evaluation", EVALUATION, "generate one by one", "tokens_per_second", "40", "100"),
    Compared("evaluation", EVALUATION, "generate with prompt lookup", "tokens_per_second", "", ""),
    Compared("evaluation", EVALUATION, "generate sorted", "tokens_per_second", "1.8", "3"),
    Compared("evaluation", "evaluation, wall clock, s", "vLLM", "wall_seconds", "1.5", "3", less=True),
    Compared("evaluation", EVALUATION, "vLLM", "tokens_per_second", "0.5", "1.0"),
)


def table(results: Figures) -> list[Figures]:
    """One dict a row: job, against, reach, aim, and where there is one ratio with its extremes, ours, theirs."""
    return [*_compared(results), _share_of_peak(results), _encoding(results), _start(results)]


def _compared(results: Figures) -> Iterator[Figures]:
    for row in ROWS:
        found = results.get(row.stage, {})
        for label in (label for label in found if label.startswith(row.baseline)):
            ratios = row.ratios(found["memreason"], found[label])
            ours, theirs = (statistics.median(one[row.figure] for one in found[name]) for name in ("memreason", label))
            yield {
                "job": row.job,
                "against": label,
                "reach": row.reach,
                "aim": row.aim,
                "ratio": statistics.median(ratios),
                "from": min(ratios),
                "to": max(ratios),
                "ours": ours,
                "theirs": theirs,
            }


def _share_of_peak(results: Figures) -> Figures:
    ours, peak = results["training"]["memreason"], results["machine"]["gemm_bf16"]
    rate = statistics.median(one["tokens_per_second"] for one in ours)
    return {
        "job": "training, bf16 peak share",
        "against": "4 x parameters x tokens",
        "reach": "0.25",
        "aim": "0.40",
        "ratio": 4 * ours[0]["parameters"] * rate / 1e9 / peak,
    }


def _encoding(results: Figures) -> Figures:
    found = results["encoding"]
    return {
        "job": "encoding, traces/s",
        "against": "encode_batch_fast",
        "reach": "0.8",
        "aim": "",
        "ratio": found["ratio"],
        "ours": found["streamed"],
        "theirs": found["bare"],
    }


def _start(results: Figures) -> Figures:
    seconds = results["start"]["help_seconds"]
    return {"job": "--help, seconds", "against": "", "reach": "< 0.3", "aim": "", "ours": seconds}
