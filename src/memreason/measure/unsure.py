"""When a memory line is worth looking up: the threshold below which lines are mostly false, and how many were."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from memreason.core.errors import TaskError
from memreason.core.trace import MEMORY, Trace
from memreason.measure.confidence import auroc, checked_lines, line_figures
from memreason.measure.score import score_trace

__all__ = ["CALIBRATION", "QUANTILES", "calibrated", "retrieved_share", "youden"]

CALIBRATION = "calibration.json"  # beside a checkpoint's weights
QUANTILES = (10, 25, 50, 75)  # per cent of the lines that were least sure
CHECKED, BY_ANSWER = "lines checked against the facts", "lines of wrong against those of right answers"


def youden(scores: Sequence[float], false: Sequence[bool]) -> dict[str, float] | None:
    """The threshold that tells false lines (scores below it) from true ones best: Youden's J (1950, Cancer 3:32), the
    share of false lines below it less the share of true ones below it. Of equal ones the highest: what is looked up
    needlessly costs less than a false line kept. None where all are false or none is, or all score alike.
    """
    values, which = np.asarray(scores, dtype=float), np.asarray(false, dtype=bool)
    steps = np.unique(values)
    if which.all() or not which.any() or len(steps) < 2:
        return None
    thresholds = (steps[1:] + steps[:-1]) / 2
    hits = np.searchsorted(np.sort(values[which]), thresholds) / which.sum()
    alarms = np.searchsorted(np.sort(values[~which]), thresholds) / (~which).sum()
    gains = hits - alarms
    best = int(np.flatnonzero(gains >= gains.max() - 1e-12)[-1])
    named = {"threshold": thresholds, "j": gains, "false_below": hits, "true_below": alarms}
    return {name: float(row[best]) for name, row in named.items()}


def calibrated(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The threshold that recalled samples (objects of samples.jsonl) teach, and quantiles of their lines' sureness.

    Lines that can be checked (atlas) count by their truth, others by their question's verdict. Raises TaskError where
    nothing can be learnt: no memory lines, or none of them false.
    """
    every = [one for sample in samples for one in _memory_lines(sample)]
    checked = checked_lines(samples)
    lines, way = (checked, CHECKED) if checked else (every, BY_ANSWER)
    scores, false = [line["logprob"] for line in lines], [line["false"] for line in lines]
    best = youden(scores, false)
    if best is None:
        raise TaskError(
            f"nothing to calibrate with: of {len(lines)} memory lines {sum(false)} count as false ({way}). "
            "Answer more questions (--eval.n), or give --eval.unsure_below"
        )
    sure = np.quantile([line["logprob"] for line in every], [share / 100 for share in QUANTILES]).tolist()
    found = {"n": len(lines), "false": sum(false), "way": way, "auroc": auroc([-score for score in scores], false)}
    return {**best, **found, "quantiles": {str(q): value for q, value in zip(QUANTILES, sure, strict=True)}}


def _memory_lines(sample: Mapping[str, Any]) -> list[dict[str, Any]]:
    wrong = score_trace(Trace.from_json(sample)).verdict != "correct"
    told = zip(sample["steps"], line_figures(sample), strict=False)
    kept = [figures for step, figures in told if MEMORY in step["kinds"] and figures["logprob"] is not None]
    return [{**figures, "false": wrong} for figures in kept]


def retrieved_share(traces: Sequence[Trace]) -> dict[str, Any]:
    """Memory lines of these traces, and the share that was retrieved."""
    lines = [bool(step.source) for trace in traces for step in trace.of_kind(MEMORY)]
    return {"memory_lines": len(lines), "retrieved": sum(lines) / max(1, len(lines))}
