"""How far two labelled files of the same questions agree: same lines with other kinds, other lines, other answers."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from memreason.core.trace import LETTERS, MEMORY, Question, Trace
from memreason.data.mix import plain, question_key
from memreason.measure.score import question_kind
from memreason.measure.stats import cluster_bootstrap, kappa_bootstrap, wilson

__all__ = ["agreement", "gold"]

SHOWN = 20  # examples of each sort
Pair = tuple[Trace, Trace]


class Line(NamedTuple):
    """A line that both files have, word for word, in the same question."""

    question: Question
    text: str
    first: str
    second: str


def gold(question: Question) -> str:
    """The gold answer; of a letter the choice behind it, since another file may have them in another order."""
    if question.choices and question_kind(question) == "letter":
        place = LETTERS.index(question.answer.strip().upper())
        return question.choices[place] if place < len(question.choices) else question.answer
    return question.answer


def agreement(first: Sequence[Trace], second: Sequence[Trace]) -> dict[str, Any]:
    """Compare two labellings, question by question.

    Questions are matched by id, else by normalised text and choices; of a question that stands twice in a file the
    first one counts. Lines are matched by normalised text within a question. Intervals are of 95 %: Wilson's takes
    lines for independent, the bootstrap draws whole questions.
    """
    pairs = _matched(first, second)
    same = [pair for pair in pairs if _texts(pair[0]) == _texts(pair[1])]
    lines = [line for pair in pairs for line in _same_lines(*pair)]
    unequal = [(one, other) for one, other in pairs if plain(gold(one.question)) != plain(gold(other.question))]
    return {
        "sizes": [len(first), len(second)],
        "questions": len(pairs),
        "same_texts": len(same),
        "answers": {"differ": len(unequal), "examples": [_answers(*pair) for pair in unequal[:SHOWN]]},
        "same_lines": _flips(lines),
        "other_texts": _sequences([pair for pair in pairs if _texts(pair[0]) != _texts(pair[1])]),
    }


def _matched(first: Sequence[Trace], second: Sequence[Trace]) -> list[Pair]:
    by_id = {trace.question.id: trace for trace in reversed(second)}
    by_key = {question_key(trace.question): trace for trace in reversed(second)}
    pairs: dict[int, Pair] = {}
    for trace in first:
        other = by_id.get(trace.question.id) or by_key.get(question_key(trace.question))
        if other is not None:
            pairs.setdefault(id(other), (trace, other))
    return list(pairs.values())


def _texts(trace: Trace) -> list[str]:
    return [plain(step.text) for step in trace.steps]


def _kinds(trace: Trace) -> list[str]:
    return ["+".join(step.kinds) for step in trace.steps]


def _same_lines(one: Trace, other: Trace) -> list[Line]:
    """Lines that both have; of a line that stands several times, the first with the first and so on."""
    waiting: dict[str, list[str]] = defaultdict(list)
    for text, kind in zip(_texts(other), _kinds(other), strict=True):
        waiting[text].append(kind)
    return [
        Line(one.question, step.text, kind, waiting[text].pop(0))
        for step, text, kind in zip(one.steps, _texts(one), _kinds(one), strict=True)
        if waiting.get(text)
    ]


def _flips(lines: Sequence[Line]) -> dict[str, Any]:
    """Lines that have another kind in the other file, the table of kinds, and kappa (None where it is 0 / 0)."""
    flipped = [line for line in lines if line.first != line.second]
    kinds = sorted({kind for line in lines for kind in (line.first, line.second)})
    counts = Counter((line.first, line.second) for line in lines)
    groups = [line.question.id for line in lines]
    kappa, *interval = kappa_bootstrap([(line.first, line.second) for line in lines], groups)
    told = [line._asdict() | {"question": line.question.text} for line in flipped[:SHOWN]]
    return {
        "lines": len(lines),
        "questions": len(set(groups)),
        "flips": len(flipped),
        "flipped_questions": len({line.question.id for line in flipped}),
        "rate": len(flipped) / max(1, len(lines)),
        "interval": list(wilson(len(flipped), len(lines))),
        "interval_by_question": _by_question([line.first != line.second for line in lines], groups),
        "kinds": kinds,
        "confusion": [[counts[one, other] for other in kinds] for one in kinds],
        "kappa": _number(kappa),
        "kappa_interval": [_number(end) for end in interval],
        "examples": told,
    }


def _by_question(flipped: Sequence[bool], groups: Sequence[str]) -> list[float]:
    return list(cluster_bootstrap(flipped, groups)[1:]) if flipped else [0.0, 1.0]


def _number(value: float) -> float | None:
    return None if np.isnan(value) else value


def _sequences(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Where texts differ, what of the kinds is the same: how many lines, which kinds, in which order.

    Each as [questions, share, share if the second file's traces were dealt out at random].
    """
    kinds = [(_kinds(one), _kinds(other)) for one, other in pairs]
    shares = [(_memory(one), _memory(other)) for one, other in kinds if one and other]
    return {
        "questions": len(pairs),
        "both_labelled": len(shares),
        "same_count": _same([(len(one), len(other)) for one, other in kinds]),
        "same_kinds": _same([(tuple(sorted(one)), tuple(sorted(other))) for one, other in kinds]),
        "same_order": _same([(tuple(one), tuple(other)) for one, other in kinds]),
        "mean_lines": [_mean(len(one) for one, _ in kinds), _mean(len(other) for _, other in kinds)],
        "memory_share": {
            "means": [_mean(one for one, _ in shares), _mean(other for _, other in shares)],
            "mean_difference": _mean(abs(one - other) for one, other in shares),
            "correlation": _correlation(shares),
        },
    }


def _same(pairs: Sequence[tuple[Hashable, Hashable]]) -> list[float]:
    n = max(1, len(pairs))
    first, second = Counter(one for one, _ in pairs), Counter(other for _, other in pairs)
    same = sum(one == other for one, other in pairs)
    return [same, same / n, sum(count * second[value] for value, count in first.items()) / n**2]


def _memory(kinds: Sequence[str]) -> float:
    return sum(MEMORY in kind.split("+") for kind in kinds) / len(kinds)


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return fmean(found) if found else None


def _correlation(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Pearson's; None where one side does not vary."""
    if len(pairs) < 2 or any(len(set(side)) == 1 for side in zip(*pairs, strict=True)):
        return None
    return float(np.corrcoef(np.array(pairs).T)[0, 1])


def _answers(one: Trace, other: Trace) -> dict[str, str]:
    return {"question": one.question.text, "first": gold(one.question), "second": gold(other.question)}
