"""Whose fault, by asking: a teacher model reads question, gold answer and trace, and names what went wrong.

It runs as a labelling does: every reply is in a journal before the next is asked for, and none is paid for twice.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from memreason.core.files import settings_hash
from memreason.core.labelling import LabelRecipe
from memreason.core.trace import Trace
from memreason.label.journal import Journal
from memreason.label.outcome import Labelling, Outcome
from memreason.label.prompting import Prompts
from memreason.label.request import Failed, Request, content_of
from memreason.label.run import Job, label_all
from memreason.label.teacher import OpenAITeacher, Teacher
from memreason.measure.attribute import Attribution, readable
from memreason.measure.score import score_trace

__all__ = ["FAULTS", "attribute_by_judge", "opinion"]

FAULTS = ("memory", "reason", "both", "format")
FIELDS = {  # the reasons before the verdict, so that it can follow from them
    "why": {"type": "string"},
    "line": {"type": ["integer", "null"]},
    "verdict": {"type": "string", "enum": list(FAULTS)},
}
SCHEMA = {"type": "object", "properties": FIELDS, "required": list(FIELDS), "additionalProperties": False}


class _Judging(Job):
    """A labelling whose requests ask for a verdict on the trace as it stands."""

    @cached_property
    def prompts(self) -> Prompts:
        return Prompts(("judge",), Path(__file__).with_name("prompts"))

    def talk(self, trace: Trace) -> Labelling:
        return opinion(trace, self.prompts, self.recipe.attempts)


def opinion(trace: Trace, prompts: Prompts, attempts: int) -> Labelling:
    """Yield requests, take replies, return an outcome that holds the verdict in its trace's `meta["judge"]`.

    A reply that does not fit is asked for again, with the reason, until `attempts` have failed.
    """
    messages = prompts.messages("judge", trace.question, steps=trace.steps, prediction=trace.prediction)
    request, history = Request("judge", trace.question.id, messages, SCHEMA), list[dict[str, Any]]()
    while len(history) < attempts:
        reply = yield request
        try:
            found = _fitting(content_of(reply, request), len(trace.steps))
            return Outcome("accepted", replace(trace, meta={"judge": found}), tuple(history))
        except Failed as failure:
            entry = {"purpose": "judge", "checks": [failure.name], "reasons": failure.reason, "reply": reply.content}
            history.append(entry)
            complaint = f"This cannot be used: {failure.reason}. Write the whole reply again."
            said = [{"role": "assistant", "content": reply.content}] if reply.content else []
            said.append({"role": "user", "content": complaint})
            request = replace(request, messages=(*request.messages, *said), turn=len(history))
    return Outcome("rejected", None, tuple(history))


def _fitting(found: Mapping[str, Any], lines: int) -> dict[str, Any]:
    """The reply's object if it is of the schema, which not every server sees to. Raises Failed."""
    verdict, line, why = str(found["verdict"]).strip().lower(), found["line"], found["why"]
    if verdict not in FAULTS:
        raise Failed("verdict", f'"verdict" must be one of {", ".join(FAULTS)}, got {verdict!r}')
    if line is not None and (type(line) is not int or not 1 <= line <= lines):
        raise Failed("line", f'"line" must be a number from 1 to {lines} or null, got {line!r}')
    if not isinstance(why, str) or not why.strip():
        raise Failed("why", '"why" must say in words what went wrong')
    return {"verdict": verdict, "line": line, "why": " ".join(why.split())}


def attribute_by_judge(
    made: Sequence[Trace], recipe: LabelRecipe, path: Path, *, teacher: Teacher | None = None
) -> tuple[list[Attribution], dict[str, Any]]:
    """The judge's verdict on each wrong answer with something to read, and what asking took.

    `recipe` names the model, its endpoints and how many attempts a question has; `path` is the journal. `unjudged` is
    a question without a reply that fits, or without any. Raises TeacherError where no request would be answered.
    """
    scored = [(trace, score_trace(trace)) for trace in made]
    wrong = [trace for trace, score in scored if score.verdict != "correct" and readable(trace, score)]
    job = _Judging(recipe, lambda trace: True)
    lines = [trace.to_json() for trace in wrong]
    journal = Journal(path, settings_hash({"job": job.name, "traces": lines}))  # of other lines, verdicts are others
    try:
        if wrong:
            asyncio.run(_ask(wrong, job, journal, teacher))
        outcomes = {trace.question.id: journal.outcome(trace.question.id) for trace in wrong}
        usage = journal.usage(outcomes)
    finally:
        journal.close()
    found = [_attribution(trace, outcomes.get(trace.question.id)) for trace in made]
    failures = Counter(name for one in outcomes.values() if one for entry in one[2] for name in entry["checks"])
    asked = {"model": recipe.teacher.model, "prompt": job.prompts.version, "asked": len(wrong)}
    unjudged = sum(one.verdict == "unjudged" for one in found)
    took = {name: usage[name] for name in ("replies", "prompt_tokens", "completion_tokens")}
    return found, {**asked, "unjudged": unjudged, **took, "failures": dict(failures)}


async def _ask(wrong: Sequence[Trace], job: Job, journal: Journal, teacher: Teacher | None) -> None:
    asked = teacher or OpenAITeacher(job.recipe.teacher)
    in_flight = sum(one.in_flight for one in job.recipe.teacher.endpoints)
    try:
        await label_all(wrong, job, asked, journal, in_flight=in_flight, label="judging")
    finally:
        if teacher is None:
            await asked.close()


def _attribution(trace: Trace, outcome: tuple[str, dict[str, Any] | None, list[dict[str, Any]]] | None) -> Attribution:
    score = score_trace(trace)
    if score.verdict == "correct" or not readable(trace, score):
        return Attribution(trace, score, "right" if score.verdict == "correct" else "format")
    if outcome is None or outcome[1] is None:
        return Attribution(trace, score, "unjudged", evidence={"failed": outcome[2] if outcome else []})
    said = outcome[1]["meta"]["judge"]
    words = (f"line {said['line']}: {said['why']}" if said["line"] else said["why"],)
    evidence = {**said, "text": trace.steps[said["line"] - 1].text if said["line"] else None}
    memory, reason = (words if said["verdict"] in (kind, "both") else () for kind in ("memory", "reason"))
    return Attribution(trace, score, said["verdict"], memory, reason, evidence=evidence)
