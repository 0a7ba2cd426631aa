"""How sure the model was of each line, and whether that tells which memory lines are false."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from memreason.core.trace import MEMORY
from memreason.data.atlas import memory_line_true

__all__ = ["auroc", "checked_lines", "confidence_table", "line_figures"]

BINS = 10
DRAWS = 1000
SIGNS = {"logprob": -1, "entropy": 1, "margin": -1}  # which way a figure points if a line is false


def line_figures(sample: Mapping[str, Any]) -> list[dict[str, float | None]]:
    """Of each line of a sample (one object of samples.jsonl), over the tokens of its text without its blocks: mean
    log-probability, mean entropy (nats) and least margin. None where nothing was generated, as in a retrieved line."""
    meta, figures = sample["meta"], ("logprobs", "entropies", "margins")
    given, spans = meta.get("given", 0), meta.get("spans", ())
    bodies = meta.get("bodies") or [start for start, _ in spans]  # samples of older versions have none
    lines = []
    for body, (_, end) in zip(bodies, spans, strict=True):
        inside = slice(max(0, body - given), max(0, end - given))
        texts = [[value for value in sample.get(name, ())[inside] if value is not None] for name in figures]
        logprobs, entropies, margins = texts
        lines.append({"logprob": _mean(logprobs), "entropy": _mean(entropies), "margin": min(margins, default=None)})
    return lines


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def checked_lines(samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every memory line whose truth is known (atlas) and that the model wrote itself: its figures, `false`, and the
    group that its question belongs to."""
    found = []
    for sample in samples:
        for step, figures in zip(sample["steps"], line_figures(sample), strict=False):
            true = memory_line_true(step["text"]) if MEMORY in step["kinds"] and not step.get("source") else None
            if true is not None and figures["logprob"] is not None:
                group = sample["meta"].get("group") or sample["id"]
                found.append({**figures, "false": not true, "group": group, "text": step["text"], "id": sample["id"]})
    return found


def auroc(scores: Sequence[float], positive: Sequence[bool]) -> float | None:
    """How often a positive has the higher score than a negative, ties half. None if either is missing."""
    which = np.asarray(positive, dtype=bool)
    hits, misses = int(which.sum()), int((~which).sum())
    if not hits or not misses:
        return None
    _, place, counts = np.unique(np.asarray(scores, dtype=float), return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]  # equal scores share the mean of their ranks
    return float((ranks[which].sum() - hits * (hits + 1) / 2) / (hits * misses))


def confidence_table(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """AUROC of "this memory line is false" from each figure, with intervals (95 %, groups drawn together), and how
    true the lines are by confidence (exp of the mean log-probability), in bins of equal size. None if no line of
    these samples can be checked."""
    lines = checked_lines(samples)
    if not lines:
        return None
    false = [line["false"] for line in lines]
    known = [name for name in SIGNS if all(line[name] is not None for line in lines)]  # not every engine tells all
    aurocs = {name: _with_interval(lines, false, name) for name in known}
    best = aurocs["logprob"]
    return {
        "n": len(lines),
        "false": sum(false),
        "score": "mean log-probability",
        "auroc": best["auroc"],
        "auroc_interval": best["interval"],
        "aurocs": aurocs,
        "bins": _bins(lines),
    }


def _with_interval(lines: Sequence[Mapping[str, Any]], false: Sequence[bool], name: str) -> dict[str, Any]:
    scores = np.array([SIGNS[name] * line[name] for line in lines])
    groups: dict[str, list[int]] = {}
    for place, line in enumerate(lines):
        groups.setdefault(line["group"], []).append(place)
    members, which, draws = [np.array(group) for group in groups.values()], np.array(false), []
    generator = np.random.default_rng(0)
    for _ in range(DRAWS):
        drawn = np.concatenate([members[n] for n in generator.integers(len(members), size=len(members))])
        value = auroc(scores[drawn], which[drawn])  # type: ignore[arg-type]
        draws += [] if value is None else [value]
    interval = [float(end) for end in np.quantile(draws, [0.025, 0.975])] if draws else None
    return {"auroc": auroc(scores, which), "interval": interval}  # type: ignore[arg-type]


def _bins(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A reliability diagram: lines by confidence, as many in each bin."""
    ordered = sorted(lines, key=lambda line: float(line["logprob"]))
    bins = []
    for part in np.array_split(np.arange(len(ordered)), min(BINS, len(ordered))):
        some = [ordered[place] for place in part]
        sure = [math.exp(line["logprob"]) for line in some]
        true = sum(not line["false"] for line in some) / len(some)
        bins.append(
            {
                "low": sure[0],
                "high": sure[-1],
                "n": len(some),
                "mean_confidence": sum(sure) / len(sure),
                "share_true": true,
            }
        )
    return bins
