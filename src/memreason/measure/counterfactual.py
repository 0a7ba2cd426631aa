"""Whose fault, by trying: put other memory lines in place of the generated ones, and see what the answer becomes.

With gold lines right: the memory was at fault. Still wrong: a step is. Two placebos go along: the trace's own lines
put back, which should change nothing, and the gold lines of another question, which should help no one. Gold lines are
those of a labelled trace of the same question, the data set's own facts, or passages that a search finds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol

from memreason.core.errors import TaskError
from memreason.core.trace import MEMORY, Step, Trace
from memreason.measure.attribute import Attribution, readable
from memreason.measure.score import Score, score_trace
from memreason.measure.stats import mcnemar_exact, paired_bootstrap, wilson

__all__ = ["INTERVENTIONS", "Gold", "Lines", "Search", "attribute_by_trying", "begin", "effects", "gold_lines"]

Gold = Literal["labelled", "facts", "retrieved"]
Lines = Mapping[str, Sequence[Step]]  # memory lines by question id
PASSAGES = 4  # of a search, for each question


class Found(Protocol):
    """A passage of a search."""

    @property
    def id(self) -> str: ...

    @property
    def text(self) -> str: ...


Search = Callable[[Sequence[str], int], Sequence[Sequence[Found]]]  # queries, how many -> passages of each
INTERVENTIONS: dict[str, Callable[[Sequence[Step], Sequence[Step], Sequence[Step]], Sequence[Step]]] = {
    "gold": lambda own, gold, other: gold,
    "own": lambda own, gold, other: own,
    "other": lambda own, gold, other: other,
}
KEPT: dict[Gold, Callable[[Trace], list[Step]]] = {
    "labelled": lambda trace: trace.of_kind(MEMORY),
    "facts": lambda trace: [Step((MEMORY,), fact) for fact in trace.question.facts or () if isinstance(fact, str)],
}


def gold_lines(gold: Sequence[Trace], source: Gold | None = None, search: Search | None = None) -> tuple[Gold, Lines]:
    """(where from, gold memory lines by question id); a question without any is left out.

    Without a `source`: labelled traces where there are some, else the questions' facts. Raises TaskError if no
    question has lines of that source.
    """
    if source == "retrieved":
        if search is None:
            raise TaskError("--gold retrieved: there is nothing to search in. Give --eval.corpus FILE.jsonl, or atlas.")
        found = search([trace.question.text for trace in gold], PASSAGES)
        taken = [[Step((MEMORY,), one.text, str(one.id)) for one in passages] for passages in found]
        if lines := _by_question(gold, taken):
            return source, lines
        raise TaskError("--gold retrieved: the search finds nothing for any question. Give another --eval.corpus.")
    for name in (source,) if source else KEPT:
        if lines := _by_question(gold, map(KEPT[name], gold)):
            return name, lines
    task = (gold[0].question.task if gold else "") or "this task"
    wanted = {"labelled": "labelled traces", "facts": "facts that are texts"}.get(
        source or "", "labelled traces or facts"
    )
    raise TaskError(
        f"{task}: its questions have no {wanted} to take gold memory lines from. Import labelled traces of this split "
        "(memreason data import), or choose another --gold: labelled, facts or retrieved."
    )


def _by_question(gold: Sequence[Trace], lines: Iterable[Sequence[Step]]) -> dict[str, list[Step]]:
    told = ((trace.question.id, [step for step in some if step.text]) for trace, some in zip(gold, lines, strict=True))
    return {question: some for question, some in told if some}


def begin(name: str, made: Sequence[Trace], gold: Lines) -> list[Trace]:
    """Traces to be generated on from: memory lines alone, as the intervention gives them. Those with gold lines only.

    The other question is the next one of the same form and another group, or, where there is none, of another group,
    so that its lines look alike and do not help.
    """
    tried = [trace for trace in made if trace.question.id in gold]
    begun = []
    for place, trace in enumerate(tried):
        other = _other(trace, tried[place + 1 :] + tried[:place])
        lines = trace.of_kind(MEMORY), gold[trace.question.id], gold[other.question.id] if other else ()
        begun.append(replace(trace, steps=tuple(INTERVENTIONS[name](*lines))))
    return begun


def _other(trace: Trace, following: Sequence[Trace]) -> Trace | None:
    asked = trace.question

    def first(**same: Any) -> Trace | None:
        foreign = (other for other in following if other.question.group != asked.group)
        return next((other for other in foreign if all(other.question.meta.get(k) == v for k, v in same.items())), None)

    return first(form=asked.meta.get("form")) or first()


def attribute_by_trying(
    made: Sequence[Trace], source: Gold, gold: Lines, tried: Mapping[str, Sequence[Trace]]
) -> list[Attribution]:
    """The verdict of each question, from what its trace became with gold lines. The evidence is what was given and
    what was generated behind it, for each intervention.

    A wrong answer is a memory fault if gold lines mend it, else a reason fault: then a step fails even behind gold
    lines, and whether the trace's own lines were true as well cannot be told. Nor can luck, of a right answer. Without
    gold lines, or room behind them, it is unjudged.
    """
    evidence: dict[str, dict[str, Any]] = {}
    after = {trace.question.id: score_trace(trace) for trace in tried["gold"]}
    for name, traces in tried.items():
        became = {trace.question.id: trace for trace in traces}
        for begun in begin(name, made, gold):
            question = begun.question.id
            evidence.setdefault(question, {})[name] = _tail(begun, became[question])
    found = []
    for trace in made:
        shown = evidence.get(trace.question.id, {})
        went_on = shown and (shown["gold"]["steps"] or shown["gold"]["answer"])  # not where the lines fill the limit
        found.append(replace(_verdict(trace, source, after[trace.question.id] if went_on else None), evidence=shown))
    return found


def _verdict(trace: Trace, source: Gold, after: Score | None) -> Attribution:
    score = score_trace(trace)
    if score.verdict == "correct" or not readable(trace, score):
        return Attribution(trace, score, "right" if score.verdict == "correct" else "format")
    if after is None:
        return Attribution(trace, score, "unjudged")
    said = f"with gold lines ({source}) given, the answer is {after.extracted or 'none'}"
    if after.verdict == "correct":
        return Attribution(trace, score, "memory", memory=(said,))
    return Attribution(trace, score, "reason", reason=(said,))


def _tail(begun: Trace, became: Trace) -> dict[str, Any]:
    """The lines that were given, what was generated behind them, and its answer."""
    new = became.steps[len(begun.steps) :]
    given, steps = ([step.to_json() for step in some] for some in (begun.steps, new))
    return {"given": given, "steps": steps, "answer": became.prediction}


def effects(made: Sequence[Trace], gold: Lines, tried: Mapping[str, Sequence[Trace]]) -> dict[str, Any]:
    """What the interventions did to the questions that have gold lines: `accuracy`, the share of readable wrong answers
    that are right then (`mended`), and of all answers that went from right to wrong or back (`changed`).

    `beyond_chance`: accuracy, and the share mended, with gold lines less that with another question's.
    """
    scores = {trace.question.id: (trace, score_trace(trace)) for trace in made if trace.question.id in gold}
    before = {question: score.verdict == "correct" for question, (_, score) in scores.items()}
    wrong = [question for question, pair in scores.items() if not before[question] and readable(*pair)]
    right = {name: _right(traces) for name, traces in tried.items()}
    groups = {question: trace.question.group for question, (trace, _) in scores.items()}
    return {
        "without": len(made) - len(scores),
        "wrong": len(wrong),
        "accuracy": {name: _share(found.values()) for name, found in {"before": before, **right}.items()},
        "mended": {name: _share(found[question] for question in wrong) for name, found in right.items()},
        "changed": {name: _share(found[one] != before[one] for one in before) for name, found in right.items()},
        "beyond_chance": {
            name: _difference(right["gold"], right["other"], {question: groups[question] for question in asked})
            for name, asked in {"accuracy": list(before), "mended": wrong}.items()
            if asked
        },
    }


def _difference(first: Mapping[str, bool], other: Mapping[str, bool], groups: Mapping[str, str]) -> dict[str, Any]:
    """Of the questions that have a group here: the share right in the first less that in the other, and McNemar's p."""
    ours, theirs = ([right[question] for question in groups] for right in (first, other))
    difference, low, high = paired_bootstrap(ours, theirs, list(groups.values()))
    return {"n": len(groups), "difference": difference, "by_group": [low, high], "p": mcnemar_exact(ours, theirs)}


def _right(traces: Sequence[Trace]) -> dict[str, bool]:
    return {trace.question.id: score_trace(trace).verdict == "correct" for trace in traces}


def _share(values: Iterable[bool]) -> dict[str, Any]:
    some = list(values)
    return {"n": len(some), "share": sum(some) / max(1, len(some)), "wilson": list(wilson(sum(some), len(some)))}
