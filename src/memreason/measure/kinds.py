"""The kind that a line is by its words: by rule on atlas, elsewhere learnt from labelled lines."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

from memreason.core.trace import Question, Trace
from memreason.data.atlas_rules import line_kind

__all__ = ["KindOf", "by_words", "kind_reader", "learnt_reader", "reader_accuracy"]

KindOf = Callable[[Question, str], str | None]


def kind_reader(traces: Sequence[Trace]) -> KindOf:
    """Reads atlas's lines by their forms, and those of other tasks by what `traces` (labelled ones) teach."""
    learnt = learnt_reader(traces)
    return lambda question, text: line_kind(text) if "form" in question.meta else learnt(question, text)


def by_words(trace: Trace) -> Trace:
    """The trace of an atlas question with kinds told by its lines' words, not by their blocks."""
    read = [(step, line_kind(step.text)) for step in trace.steps]
    return replace(trace, steps=tuple(replace(step, kinds=(kind,) if kind else ()) for step, kind in read))


def learnt_reader(traces: Sequence[Trace]) -> KindOf:
    """Naive Bayes over the words and pairs of words of labelled lines of one kind. None if there are none."""
    counts: dict[str, Counter[str]] = {}
    lines: Counter[str] = Counter()
    for step in (step for trace in traces for step in trace.steps if len(step.kinds) == 1):
        lines[step.kinds[0]] += 1
        counts.setdefault(step.kinds[0], Counter()).update(_features(step.text))
    known = len(set().union(*counts.values())) if counts else 0
    sizes = {kind: counts[kind].total() + known for kind in counts}

    def kind_of(question: Question, text: str) -> str | None:
        features = _features(text)
        scores = {
            kind: math.log(lines[kind]) + sum(math.log((found[feature] + 1) / sizes[kind]) for feature in features)
            for kind, found in counts.items()
        }
        return max(scores, key=lambda kind: scores[kind], default=None)

    return kind_of


def _features(text: str) -> list[str]:
    words = ["^", *re.findall(r"\w+|[^\w\s]", text.lower())]
    return words + [" ".join(pair) for pair in pairwise(words)]


def reader_accuracy(kind_of: KindOf, traces: Sequence[Trace]) -> float | None:
    """Share of labelled lines, of one kind each, whose kind it reads as labelled: held-out traces, to be believed."""
    found = [
        kind_of(trace.question, step.text) == step.kinds[0]
        for trace in traces
        for step in trace.steps
        if len(step.kinds) == 1
    ]
    return sum(found) / len(found) if found else None
