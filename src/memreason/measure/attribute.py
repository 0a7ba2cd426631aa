"""Whose fault is a wrong answer? Exactly, where the facts are known: on atlas every line can be checked.

M: a memory line that the question needs is false or missing. R: the reason line, or the answer, is not what the form's
rule draws from the trace's own lines. A wrong answer is a memory fault (M), a reason fault (R), both, or a format
fault (nothing to read). A right answer with M is lucky: it was not drawn from what the trace recalled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from memreason.core.errors import TaskError
from memreason.core.trace import MEMORY, REASON, Question, Trace
from memreason.data.atlas_rules import UNSETTLED, answer_from, memory_faults, reason_fault
from memreason.measure.score import Score, score_trace
from memreason.measure.stats import cluster_bootstrap, wilson

__all__ = ["VERDICTS", "Attribution", "Verdict", "attribute", "can_check", "fault_table", "readable"]

Verdict = Literal["memory", "reason", "both", "format", "lucky", "right", "unjudged"]
VERDICTS: tuple[Verdict, ...] = ("memory", "reason", "both", "format", "lucky", "right")  # those of the exact way
LEVELS = ("obscurity", "hops", "form")
THIRDS = ("low", "middle", "high")


@dataclass(frozen=True)
class Attribution:
    """What became of one question by one way, and why: `memory` and `reason` say what was at fault in words.

    `needed` is how many facts the question needs, where that is known and there is something to read; `missed` how many
    of them no line states, or a line states falsely. `evidence` is what else the way has to show.
    """

    trace: Trace
    score: Score
    verdict: Verdict
    memory: tuple[str, ...] = ()
    reason: tuple[str, ...] = ()
    needed: int = 0
    missed: int = 0
    evidence: Mapping[str, Any] = field(default_factory=dict)

    @property
    def wrong(self) -> bool:
        return self.score.verdict != "correct"

    def to_json(self) -> dict[str, Any]:
        faults = {"memory": list(self.memory), "reason": list(self.reason)}
        return {"id": self.trace.question.id, "verdict": self.verdict, "score": self.score.verdict, **faults}


def readable(trace: Trace, score: Score) -> bool:
    """Whether there are lines and an answer. A wrong answer without is a format fault, whichever way is taken."""
    return bool(trace.steps) and score.verdict != "no_answer"


def can_check(question: Question) -> bool:
    """Whether the exact way is open: the question is of one of atlas's forms and has its facts."""
    return (
        "form" in question.meta and bool(question.facts) and all(isinstance(f, Mapping) for f in question.facts or ())
    )


def attribute(trace: Trace) -> Attribution:
    """The exact way. Raises TaskError for a question whose facts are not atlas's."""
    question, score = trace.question, score_trace(trace)
    if not can_check(question):
        raise TaskError(f"{question.task or 'this task'}: lines can be checked exactly on atlas only")
    if not readable(trace, score):
        return Attribution(trace, score, "right" if score.verdict == "correct" else "format")
    lines = [step.text for step in trace.of_kind(MEMORY)]
    reasons = [step.text for step in trace.of_kind(REASON)]
    memory = memory_faults(question, lines)
    reason = [f"{fault}: {text}" for text in reasons if (fault := reason_fault(question, lines, text))]
    follows = answer_from(question, lines)
    if follows is not None and score.extracted != follows:
        reason.append(f"the answer is {score.extracted}, from the lines follows {follows}")
    elif not reasons:
        reason.append("there is no reason line")
    needed, missed = len(question.facts or ()), sum(fault != UNSETTLED for fault in memory)
    return Attribution(trace, score, _verdict(score, memory, reason), tuple(memory), tuple(reason), needed, missed)


def _verdict(score: Score, memory: Sequence[str], reason: Sequence[str]) -> Verdict:
    if score.verdict == "correct":
        return "lucky" if memory else "right"
    # Without either, true lines would have led to the gold answer.
    assert memory or reason
    return "both" if memory and reason else "memory" if memory else "reason"


def fault_table(found: Sequence[Attribution], verdicts: Sequence[Verdict] = VERDICTS) -> dict[str, Any]:
    """Counts of those verdicts; their shares with intervals (Wilson's, and by group), among all questions and among
    wrong answers; and, by obscurity (thirds), hops and form where questions have them, the shares of questions with a
    memory or reason fault and of needed memory lines that are false or missing."""
    counts = Counter(one.verdict for one in found)
    wrong = [one for one in found if one.wrong]
    return {
        "n": len(found),
        "wrong": len(wrong),
        "counts": {verdict: counts[verdict] for verdict in verdicts},
        "shares": {verdict: _share(found, _is(verdict)) for verdict in verdicts},
        "of_wrong": {verdict: _share(wrong, _is(verdict)) for verdict in verdicts if verdict not in ("lucky", "right")},
        "by": {name: _by(found, name) for name in LEVELS if all(name in one.trace.question.meta for one in found)},
    }


def _is(verdict: Verdict) -> Callable[[Attribution], bool]:
    return lambda one: one.verdict == verdict


def _share(found: Sequence[Attribution], which: Callable[[Attribution], bool]) -> dict[str, Any] | None:
    return _interval([(which(one), one.trace.question.group) for one in found])


def _interval(values: Sequence[tuple[bool, Hashable]]) -> dict[str, Any] | None:
    """The share of true (value, group) pairs, with its intervals of 95 %; None where there are none."""
    if not values:
        return None
    share, *by_group = cluster_bootstrap([float(v) for v, _ in values], [group for _, group in values], samples=2000)
    return {"share": share, "wilson": list(wilson(sum(v for v, _ in values), len(values))), "by_group": by_group}


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
            "wrong": _share(some, lambda one: one.wrong),
            "per_line": _interval(
                [(n < one.missed, one.trace.question.group) for one in some for n in range(one.needed)]
            ),
        }
        for name, some in sorted(
            groups.items(), key=lambda item: THIRDS.index(item[0]) if item[0] in THIRDS else item[0]
        )
    ]


def _level(one: Attribution, level: str) -> Any:
    value = one.trace.question.meta[level]
    return THIRDS[min(2, int(3 * value))] if level == "obscurity" else value
