"""Whose fault is a wrong answer? Exactly, where the facts are known: on atlas every line can be checked.

M: a memory line that the question needs is false or missing. R: the reason line, or the answer, is not what the form's
rule draws from the trace's own lines. A wrong answer is a memory fault (M), a reason fault (R), both, or a format
fault (nothing to read). A right answer with M is lucky: it was not drawn from what the trace recalled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from memreason.core.errors import TaskError
from memreason.core.trace import MEMORY, REASON, Trace
from memreason.data.atlas_rules import answer_from, memory_faults, reason_fault
from memreason.measure.score import Score, score_trace
from memreason.measure.stats import cluster_bootstrap, wilson

__all__ = ["VERDICTS", "Attribution", "attribute", "fault_table"]

Verdict = Literal["memory", "reason", "both", "format", "lucky", "right"]
VERDICTS: tuple[Verdict, ...] = ("memory", "reason", "both", "format", "lucky", "right")
LEVELS = ("obscurity", "hops", "form")
THIRDS = ("low", "middle", "high")


@dataclass(frozen=True)
class Attribution:
    """What became of one question, and why: the lines at fault in words."""

    trace: Trace
    score: Score
    verdict: Verdict
    memory: tuple[str, ...] = ()
    reason: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        evidence = {"memory": list(self.memory), "reason": list(self.reason)}
        return {"id": self.trace.question.id, "verdict": self.verdict, "score": self.score.verdict, **evidence}


def attribute(trace: Trace) -> Attribution:
    """The exact way. Raises TaskError for a question whose facts are not atlas's."""
    question, score = trace.question, score_trace(trace)
    if "form" not in question.meta or not question.facts:
        raise TaskError(f"{question.task or 'this task'}: lines can be checked exactly on atlas only")
    lines = [step.text for step in trace.of_kind(MEMORY)]
    reasons = [step.text for step in trace.of_kind(REASON)]
    if score.verdict == "no_answer" or not trace.steps:
        return Attribution(trace, score, "format" if score.verdict != "correct" else "right")
    memory = memory_faults(question, lines)
    reason = [f"{fault}: {text}" for text in reasons if (fault := reason_fault(question, lines, text))]
    follows = answer_from(question, lines)
    if follows is not None and score.extracted != follows:
        reason.append(f"the answer is {score.extracted}, from the lines follows {follows}")
    elif not reasons:
        reason.append("there is no reason line")
    return Attribution(trace, score, _verdict(score, memory, reason), tuple(memory), tuple(reason))


def _verdict(score: Score, memory: Sequence[str], reason: Sequence[str]) -> Verdict:
    if score.verdict == "correct":
        return "lucky" if memory else "right"
    # Without either, true lines would have led to the gold answer.
    assert memory or reason
    return "both" if memory and reason else "memory" if memory else "reason"


def fault_table(found: Sequence[Attribution]) -> dict[str, Any]:
    """Counts; the share of each verdict with intervals (Wilson's, and by country), among all questions and among wrong
    answers; and the shares of memory and reason faults by obscurity (thirds), hops and form."""
    counts = Counter(one.verdict for one in found)
    wrong = [one for one in found if one.score.verdict != "correct"]
    return {
        "n": len(found),
        "wrong": len(wrong),
        "counts": {verdict: counts[verdict] for verdict in VERDICTS},
        "shares": {verdict: _share(found, _is(verdict)) for verdict in VERDICTS},
        "of_wrong": {verdict: _share(wrong, _is(verdict)) for verdict in VERDICTS[:4]},
        "by": {level: _by(found, level) for level in LEVELS},
    }


def _is(verdict: Verdict) -> Callable[[Attribution], bool]:
    return lambda one: one.verdict == verdict


def _share(found: Sequence[Attribution], which: Callable[[Attribution], bool]) -> dict[str, Any] | None:
    """A share with its intervals of 95 %; None where there is nothing to take a share of."""
    if not found:
        return None
    values = [which(one) for one in found]
    groups = [one.trace.question.group for one in found]
    share, *by_group = cluster_bootstrap([float(value) for value in values], groups, samples=2000)
    return {"share": share, "wilson": list(wilson(sum(values), len(values))), "by_group": by_group}


def _by(found: Sequence[Attribution], level: str) -> list[dict[str, Any]]:
    groups: dict[Any, list[Attribution]] = {}
    for one in found:
        groups.setdefault(_level(one, level), []).append(one)
    return [
        {
            level: name,
            "n": len(some),
            "memory": _share(some, lambda one: bool(one.memory)),
            "reason": _share(some, lambda one: bool(one.reason)),
            "wrong": _share(some, lambda one: one.score.verdict != "correct"),
        }
        for name, some in sorted(
            groups.items(), key=lambda item: THIRDS.index(item[0]) if item[0] in THIRDS else item[0]
        )
    ]


def _level(one: Attribution, level: str) -> Any:
    value = one.trace.question.meta[level]
    return THIRDS[min(2, int(3 * value))] if level == "obscurity" else value
