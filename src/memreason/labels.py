"""The labelling verb as functions: questions, a teacher, a journal, and the files that come of them. No torch."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from memreason import __version__
from memreason.core.errors import DataError, RecipeError
from memreason.core.files import read_traces, settings_hash, write_json, write_jsonl, write_text, write_traces
from memreason.core.labelling import LabelRecipe, load_label_recipe
from memreason.core.stages import DataRecipe
from memreason.core.trace import Question, Trace
from memreason.data.mix import subset
from memreason.data.tasks import load_eval
from memreason.label.batch import BatchReport, exchange
from memreason.label.checks import CHECKS
from memreason.label.journal import Journal
from memreason.label.prices import Price, estimate, price_of, spent
from memreason.label.run import Job, Tally, label_all
from memreason.label.teacher import OpenAITeacher, Teacher
from memreason.measure.score import score_trace

if sys.platform == "win32":
    from asyncio import run as run_loop
else:
    from uvloop import run as run_loop  # a quarter more requests a second

__all__ = ["batch", "estimate_run", "export", "label_questions", "merge", "retag"]

SAMPLE = 10  # questions of an estimate


def label_questions(recipe: LabelRecipe, *, teacher: Teacher | None = None) -> dict[str, Any]:
    """Label the questions of a recipe and return the summary. Running it again goes on where it was.

    `teacher` is one of your own; else the recipe's endpoints, or its model in our engine. Also after an error or
    Ctrl-C, traces.jsonl and rejected.jsonl hold all that has an outcome.
    """
    traces, job = _questions(recipe), _job(recipe)
    with _journal(recipe, job) as journal:
        try:
            tally = _run(job, traces, journal, teacher)
        finally:
            summary = _write(recipe, journal, traces)
        return _summary(recipe, journal, traces, summary, tally)


def estimate_run(recipe: LabelRecipe, *, teacher: Teacher | None = None) -> dict[str, Any]:
    """Label a sample of ten questions, which is kept, and say what all of them would take."""
    traces, job = _questions(recipe), _job(recipe)
    some = subset(traces, min(SAMPLE, len(traces)), seed=recipe.seed)
    with _journal(recipe, job) as journal:
        _run(job, some, journal, teacher, label="estimating")
        found = [journal.outcome(trace.question.id) for trace in some]
        usage = journal.usage(trace.question.id for trace in some)
        accepted = sum(outcome is not None and outcome[0] == "accepted" for outcome in found)
        whole = estimate(len(some), len(traces), usage, recipe.teacher, _price(recipe))
        _write(recipe, journal, traces)
    return {**whole, "sample": len(some), "accepted": accepted / len(some), "usage": usage}


def batch(recipe: LabelRecipe, folder: Path | str) -> tuple[BatchReport, dict[str, Any]]:
    """Read batch results from a folder and write the requests that are open: again and again until none is."""
    traces, job = _questions(recipe), _job(recipe)
    with _journal(recipe, job) as journal:
        report = exchange(folder, traces, job, journal)
        return report, _summary(recipe, journal, traces, _write(recipe, journal, traces))


def retag(traces: Sequence[Trace], recipe: LabelRecipe) -> list[Trace]:
    """A second opinion on the kinds of lines that are there: the traces with their texts and the teacher's kinds.

    `recipe` names the teacher, how many traces are drawn (`n`), and the folder that keeps the replies.
    """
    asked = recipe.folder / "asked.jsonl"
    write_traces(asked, [trace for trace in traces if trace.steps])
    checks = recipe.checks.model_copy(update={"skip": list(CHECKS)})  # kinds are asked for, not judged
    changes = {"task": str(asked), "protocol": "tag", "checks": checks, "output_dir": str(recipe.folder)}
    return read_traces(label_questions(recipe.model_copy(update=changes))["traces"])


def merge(recipe: LabelRecipe, journals: Sequence[Path | str]) -> dict[str, Any]:
    """Take over the journals of other machines or shards, and write the files of all questions. Asks nothing."""
    traces, job = _questions(recipe), _job(recipe)
    with _journal(recipe, job) as journal:
        for other in journals:
            journal.merge(other)
        return _summary(recipe, journal, traces, _write(recipe, journal, traces))


def export(recipe: LabelRecipe, path: Path | str) -> int:
    """Write every reply of the journal to a JSONL file; returns how many."""
    with _journal(recipe, _job(recipe)) as journal:
        write_jsonl(path, journal.export())
        return int(journal.usage()["replies"])


def _questions(recipe: LabelRecipe) -> list[Trace]:
    """Each question once. Raises DataError if two different ones bear the same id."""
    traces: dict[str, Trace] = {}
    for trace in load_eval(recipe.task, recipe.split, DataRecipe(), recipe.n, seed=recipe.seed):
        first = traces.setdefault(trace.question.id, trace)
        if first.question.text != trace.question.text:
            texts = f"{first.question.text!r} and {trace.question.text!r}"
            raise DataError(f"{recipe.task}: the id {trace.question.id!r} stands for {texts}; ids must differ")
    which, parts = recipe.part
    return [trace for trace in traces.values() if _number(trace.question.id) % parts == which]


def _number(question: str) -> int:
    """The same on every machine, and evenly spread whatever the ids are."""
    return int.from_bytes(hashlib.sha256(question.encode()).digest()[:8], "big")


def _job(recipe: LabelRecipe) -> Job:
    return Job(recipe, lambda trace: score_trace(trace).verdict == "correct", _weights(recipe))


def _is_local(recipe: LabelRecipe) -> bool:
    return recipe.protocol == "self" if recipe.teacher.local is None else recipe.teacher.local


def _weights(recipe: LabelRecipe) -> str:
    """Names the weights of a run or folder that is asked here: its replies are not those of what it was before."""
    found = sorted(Path(recipe.teacher.model).rglob("*.safetensors")) if _is_local(recipe) else []
    stamps = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in found]
    return settings_hash({"weights": stamps}) if found else ""


@contextmanager
def _journal(recipe: LabelRecipe, job: Job) -> Iterator[Journal]:
    """The journal of the recipe's folder, which belongs to one task and split."""
    path = recipe.folder / "recipe.yaml"
    if path.is_file():
        theirs = load_label_recipe(path)
        if (theirs.task, theirs.split) != (recipe.task, recipe.split):
            raise RecipeError(
                f"{recipe.folder} holds labels of {theirs.task}/{theirs.split}; give another --name or --output_dir",
                "label",
            )
    write_text(path, recipe.to_yaml())
    journal = Journal(_file(recipe, "journal", "sqlite"), job.name)
    try:
        yield journal
    finally:
        journal.close()


def _file(recipe: LabelRecipe, name: str, ending: str) -> Path:
    """A file of the run; those of a shard bear its number."""
    shard = f"-{recipe.shard.replace('/', '-of-')}" if recipe.shard else ""
    return recipe.folder / f"{name}{shard}.{ending}"


def _run(
    job: Job, traces: Sequence[Trace], journal: Journal, teacher: Teacher | None, label: str = "labelling"
) -> Tally:
    recipe = job.recipe
    in_flight = sum(endpoint.in_flight for endpoint in recipe.teacher.endpoints)

    async def run() -> Tally:
        asked = teacher or _teacher(recipe, {trace.question.id: trace.question for trace in traces}, in_flight)
        try:
            return await label_all(traces, job, asked, journal, in_flight=in_flight, price=_price(recipe), label=label)
        finally:
            if teacher is None:
                await asked.close()

    return run_loop(run())


def _teacher(recipe: LabelRecipe, questions: dict[str, Question], in_flight: int) -> Teacher:
    if not recipe.teacher.model:
        raise RecipeError("teacher.model: which one? Give --teacher NAME, as the server knows it", "label")
    if not _is_local(recipe):
        return OpenAITeacher(recipe.teacher)
    from memreason.label.local import is_run, local_teacher  # torch

    if is_run(recipe.teacher.model) and recipe.protocol != "self":
        raise RecipeError(f"{recipe.teacher.model} is a run, which writes traces of its own: --protocol self", "label")
    return local_teacher(recipe.teacher.model, questions, recipe.teacher, recipe.sample, in_flight)


def _price(recipe: LabelRecipe) -> Price | None:
    return price_of(recipe.teacher.model, recipe.prices)


def _write(recipe: LabelRecipe, journal: Journal, traces: Iterable[Trace]) -> dict[str, Any]:
    """traces.jsonl and rejected.jsonl from the journal, in the order of the questions; returns the counts."""
    counts = {"questions": 0, "accepted": 0, "rejected": 0, "failed": 0, "open": 0}
    checks: dict[str, int] = {}
    rejected: list[dict[str, Any]] = []

    def accepted() -> Iterator[str]:
        for trace in traces:
            found = journal.outcome(trace.question.id)
            status = found[0] if found else "open"
            counts["questions"] += 1
            counts[status] += 1
            for name in (name for entry in (found[2] if found else ()) for name in entry["checks"]):
                checks[name] = checks.get(name, 0) + 1
            if found and found[1]:
                yield json.dumps(found[1], ensure_ascii=False) + "\n"
            elif found:
                line = {"id": trace.question.id, "question": trace.question.text, "answer": trace.question.answer}
                rejected.append({**line, "status": status, "history": found[2]})

    write_text(_file(recipe, "traces", "jsonl"), accepted())
    write_jsonl(_file(recipe, "rejected", "jsonl"), rejected)
    return {**counts, "checks": dict(sorted(checks.items(), key=lambda item: -item[1]))}


def _summary(
    recipe: LabelRecipe, journal: Journal, traces: Sequence[Trace], written: dict[str, Any], tally: Tally | None = None
) -> dict[str, Any]:
    usage, price = journal.usage(), _price(recipe)
    summary = {
        **written,
        "usage": usage,
        "dollars": price and spent(price, usage),
        "this_run": {"replies": tally.replies, "done": tally.done} if tally else None,
        "labelling": journal.labelling,
        "version": __version__,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "questions_hash": settings_hash({"ids": [trace.question.id for trace in traces]}),
        "traces": str(_file(recipe, "traces", "jsonl")),
        "rejected_file": str(_file(recipe, "rejected", "jsonl")),
        "journal": str(journal.path),
    }
    write_json(_file(recipe, "summary", "json"), summary)
    return summary
