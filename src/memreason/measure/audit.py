"""What a person must know before training on a labelled file: plain findings, which go into JSON as they are."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from memreason.core.labelling import ChecksRecipe
from memreason.core.trace import LETTERS, MEMORY, REASON, Question, Trace
from memreason.data.mix import plain, question_key
from memreason.label.checks import problems
from memreason.measure.agreement import gold
from memreason.measure.leaks import leakage, words
from memreason.measure.score import chance, majority, question_kind

__all__ = ["audit"]

Problem = tuple[str, str]  # a name, the reason
Groups = list[list[int]]  # places of traces that belong together

BINS = 16
TOP = 12  # how many answers, patterns, places and lines are listed
WEIGHTS = {"leak": 4, "near leak": 2, "same question": 2}  # every other problem weighs 1
QUANTILES = {"min": 0.0, "p10": 0.1, "median": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
WIDTHS = (1, 2, 5, 10, 20, 25, 50, 100, 200, 250, 500, 1000)


def audit(traces: Sequence[Trace], held_out: Sequence[Trace] = (), worst: int = 10) -> dict[str, Any]:
    """Findings about labelled traces; `held_out` are questions that must not stand among them.

    Traces count from 1 in the order given. `worst` is how many rows with the heaviest problems are told in full.
    Shares of lines are of all lines; a line of several kinds counts for each. Raises ValueError without traces.
    """
    if not traces:
        raise ValueError("at least one trace is needed")
    leaks = leakage(traces, held_out)
    questions = _repeated(
        (place, (trace.question.split, question_key(trace.question))) for place, trace in enumerate(traces)
    )
    same_steps = _repeated(
        (place, tuple(plain(step.text) for step in trace.steps)) for place, trace in enumerate(traces) if trace.steps
    )
    found = _problems(traces, leaks, questions, same_steps)
    return {
        "traces": len(traces),
        "questions": len({question_key(trace.question) for trace in traces}),
        "lines": sum(len(trace.steps) for trace in traces),
        "without_steps": sum(not trace.steps for trace in traces),
        "splits": dict(Counter(trace.question.split for trace in traces)),
        "answers": _answers([trace.question for trace in traces]),
        "kinds": _kinds(traces),
        "patterns": _patterns(traces),
        "places": _places(traces),
        "steps": _spread([len(trace.steps) for trace in traces]),
        "lengths": _lengths(traces),
        "duplicates": {
            "questions": _told(questions, traces),
            "steps": _told(same_steps, traces),
            "lines": _common_lines(traces),
        },
        "leakage": leaks,
        "problems": _by_name(found),
        "problem_traces": sum(bool(named) for named in found),
        "worst": _worst(traces, found, worst),
    }


def _answers(questions: Sequence[Question]) -> dict[str, Any]:
    """How often each gold answer stands, and how often a blind draw of the options would give it (None for texts)."""
    counts = Counter(question.answer for question in questions)
    expected: Counter[str] = Counter()
    for question in questions:
        options = _options(question)
        expected.update({option: 1 / len(options) for option in options})
    rows = [
        {"answer": answer, "count": n, "share": n / len(questions), "expected": _share(expected, answer, questions)}
        for answer, n in counts.most_common()
    ]
    if set(counts) <= set(LETTERS):
        rows.sort(key=lambda row: str(row["answer"]))
    return {
        "distinct": len(counts),
        "majority": majority(questions),
        "chance": chance(questions),
        "top": rows[:TOP] if len(counts) > len(LETTERS) else rows,
    }


def _options(question: Question) -> Sequence[str]:
    kind = question_kind(question)
    return ("True", "False") if kind == "truth" else LETTERS[: len(question.choices or ())] if kind == "letter" else ()


def _share(expected: Counter[str], answer: str, questions: Sequence[Question]) -> float | None:
    return expected[answer] / len(questions) if answer in expected else None


def _named_kinds(traces: Sequence[Trace]) -> list[str]:
    """Memory and reason, both if one occurs, then the other kinds of the file, the commonest first."""
    counts = Counter(kind for trace in traces for step in trace.steps for kind in step.kinds)
    pair = [MEMORY, REASON] if counts.keys() & {MEMORY, REASON} else []
    return pair + sorted(counts.keys() - set(pair), key=lambda kind: (-counts[kind], kind))


def _kinds(traces: Sequence[Trace]) -> dict[str, Any]:
    lines = sum(len(trace.steps) for trace in traces)
    labelled = sum(bool(trace.steps) for trace in traces)
    found = {}
    for kind in _named_kinds(traces):
        each = [len(trace.of_kind(kind)) for trace in traces if trace.steps]
        found[kind] = {
            "lines": sum(each),
            "share": sum(each) / max(1, lines),
            "per_trace": sum(each) / max(1, labelled),
            "lacking": sum(not count for count in each),
        }
    return found


def _patterns(traces: Sequence[Trace]) -> dict[str, Any]:
    """The orders of kinds, the commonest first; a line of several kinds is joined by +."""
    counts = Counter(tuple("+".join(step.kinds) for step in trace.steps) for trace in traces if trace.steps)
    total = counts.total()
    top = [{"kinds": list(kinds), "count": n, "share": n / total} for kinds, n in counts.most_common(TOP)]
    return {"distinct": len(counts), "top": top}


def _places(traces: Sequence[Trace]) -> list[dict[str, int]]:
    """Lines of each kind that stand first, second, … in their traces."""
    places: list[Counter[str]] = [Counter() for _ in range(TOP)]
    for trace in traces:
        for place, step in zip(places, trace.steps, strict=False):
            place.update(step.kinds)
    return [dict(place) for place in places if place]


def _lengths(traces: Sequence[Trace]) -> dict[str, Any]:
    """Lengths in words: of lines, of each kind's lines, and of all lines of a trace that has any."""
    kinds: dict[str, list[int]] = {kind: [] for kind in _named_kinds(traces)}
    lines: list[int] = []
    whole: list[int] = []
    for trace in traces:
        counts = [len(words(step.text)) for step in trace.steps]
        lines += counts
        whole += [sum(counts)] if counts else []
        for step, count in zip(trace.steps, counts, strict=True):
            for kind in step.kinds:
                kinds[kind].append(count)
    return {
        "line": _spread(lines),
        "kinds": {kind: _spread(each, lines) for kind, each in kinds.items()},
        "trace": _spread(whole),
    }


def _spread(values: Sequence[int], scale: Sequence[int] = ()) -> dict[str, Any]:
    """Mean, quantiles and a histogram of whole numbers, the bars from `low` to `high`, both included.

    The last bar takes all from the 99th percentile on. `scale` are the values that set the bars, if not these.
    """
    if not values:
        return {"n": 0, "mean": 0.0, "quantiles": {}, "histogram": []}
    data, frame = np.asarray(values), np.asarray(scale or values)
    low, high = int(frame.min()), int(np.quantile(frame, 0.99, method="higher"))
    width = next((width for width in WIDTHS if (high - low) < width * BINS), (high - low) // BINS + 1)
    start, bars = low - low % width, high // width - low // width + 1
    counts = np.bincount(np.minimum(data, high) // width - start // width, minlength=bars)
    histogram = [
        {"low": start + place * width, "high": start + (place + 1) * width - 1, "count": int(count)}
        for place, count in enumerate(counts)
    ]
    histogram[-1]["high"] = max(histogram[-1]["high"], int(frame.max()))
    quantiles = {name: int(np.quantile(data, place, method="nearest")) for name, place in QUANTILES.items()}
    return {"n": len(values), "mean": fmean(values), "quantiles": quantiles, "histogram": histogram}


def _repeated(keys: Iterable[tuple[int, Any]]) -> Groups:
    groups: dict[Any, list[int]] = defaultdict(list)
    for place, key in keys:
        groups[key].append(place)
    return [places for places in groups.values() if len(places) > 1]


def _told(groups: Groups, traces: Sequence[Trace]) -> list[dict[str, Any]]:
    """Groups of traces by their numbers, the greatest first, with the first one's question and every gold answer."""
    told = [
        {
            "traces": [place + 1 for place in group],
            "question": traces[group[0]].question.text,
            "answers": list(dict.fromkeys(gold(traces[place].question) for place in group)),
        }
        for group in groups
    ]
    return sorted(told, key=lambda group: -len(group["traces"]))


def _common_lines(traces: Sequence[Trace]) -> dict[str, Any]:
    """Lines that stand in more than one trace: how many different ones, and the commonest."""
    counts: Counter[str] = Counter()
    texts: dict[str, str] = {}
    for trace in traces:
        here = {plain(step.text): step.text for step in trace.steps}
        counts.update(here.keys())
        for key, text in here.items():
            texts.setdefault(key, text)
    common = [(key, n) for key, n in counts.most_common() if n > 1]
    return {"distinct": len(common), "top": [{"text": texts[key], "traces": n} for key, n in common[:TOP]]}


def _problems(
    traces: Sequence[Trace], leaks: Sequence[dict[str, Any]], questions: Groups, same_steps: Groups
) -> list[list[Problem]]:
    """What is wrong with each trace: failed label checks, then what it shares with others."""
    # Where neither memory nor reason occurs (operators, clusters), no trace can have one line of each.
    limits = ChecksRecipe() if MEMORY in _named_kinds(traces) else ChecksRecipe(skip=["kinds"])
    found = [problems(trace, limits) if trace.steps else _no_steps(trace) for trace in traces]
    for leak in leaks:
        other = leak["between"][1]
        for pair in leak["same"]:
            found[pair["trace"] - 1].append(("leak", f"its question also stands in {other}"))
        for pair in leak["near"]:
            text = f"{pair['likeness']:.2f} like a question of {other}: {pair['other']}"
            found[pair["trace"] - 1].append(("near leak", text))
    for group in questions:
        for place in group:
            found[place].append(("same question", f"the same question as {_numbers(group, place)}"))
    for group in same_steps:
        for place in group:
            found[place].append(("same steps", f"all its lines are those of {_numbers(group, place)}"))
    return found


def _no_steps(trace: Trace) -> list[Problem]:
    """A question that is only asked, of a test or validation split, needs none."""
    return [("no steps", "it has no steps")] if trace.question.split in ("", "train") else []


def _numbers(group: Sequence[int], but: int, shown: int = 4) -> str:
    others = [str(place + 1) for place in group[: shown + 1] if place != but][:shown]
    return f"trace {', '.join(others)}" + ", …" * (len(group) > shown + 1)


def _by_name(found: Sequence[Sequence[Problem]]) -> dict[str, dict[str, int]]:
    """For each name, in how many traces it stands and how often; the commonest first."""
    traces = Counter(name for named in found for name in {name for name, _ in named})
    times = Counter(name for named in found for name, _ in named)
    return {name: {"traces": n, "times": times[name]} for name, n in traces.most_common()}


def _worst(traces: Sequence[Trace], found: Sequence[Sequence[Problem]], worst: int) -> list[dict[str, Any]]:
    """The traces whose problems weigh most, whole."""
    weights = [sum(WEIGHTS.get(name, 1) for name, _ in named) for named in found]
    order = sorted((place for place, weight in enumerate(weights) if weight), key=lambda place: -weights[place])
    return [
        {
            **traces[place].to_json(),
            "trace": place + 1,
            "weight": weights[place],
            "problems": [{"name": name, "reason": reason} for name, reason in found[place]],
        }
        for place in order[:worst]
    ]
