"""OpenAI Batch files: the requests that are open go out, the results come back into the journal.

One command does both, again and again until nothing is open: it reads every results file of the folder, then writes
the requests that no file holds yet. A requests file that the user deletes, and requests that came back with an
error, are open again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memreason.core.errors import DataError
from memreason.core.files import file_hash, read_jsonl, write_text
from memreason.core.trace import Trace
from memreason.label.endpoint import chat_format, reply_of
from memreason.label.journal import Journal, Kept
from memreason.label.outcome import Outcome
from memreason.label.request import Request
from memreason.label.run import Job, play

__all__ = ["BatchReport", "exchange"]

LINES, BYTES = 50_000, 190_000_000  # of one file, as OpenAI takes them (200 MB)


@dataclass
class BatchReport:
    """What one exchange did."""

    read: int = 0
    errors: int = 0
    written: int = 0
    unknown: int = 0  # results that no file of this journal asked for, or that were read before
    waiting: int = 0  # requests in files whose results are not here yet
    settled: int = 0
    files: tuple[Path, ...] = ()


def exchange(folder: Path | str, traces: Sequence[Trace], job: Job, journal: Journal) -> BatchReport:
    """Read the results in `folder`, settle the questions that they finish, write the requests that are open."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    report = BatchReport()
    journal.unmark_batched([key for key, (file, _) in journal.batched().items() if not (folder / file).is_file()])
    for path in sorted(folder.glob("*.jsonl")):
        if not path.name.startswith("requests-") and not journal.is_read(digest := file_hash(path)):
            _read(path, journal, report)
            journal.mark_read(digest)
    waiting, fresh = journal.batched(), dict[str, Request]()
    ours = journal.claim([trace.question.id for trace in traces])
    for trace in (trace for trace in traces if trace.question.id in ours):
        found = play(trace, job, journal)
        if isinstance(found, Outcome):
            journal.settle(trace.question.id, found)
            report.settled += 1
        elif (key := job.key(found)) in waiting:
            report.waiting += 1
        else:
            fresh[key] = found
    report.written, report.files = len(fresh), tuple(_write(folder, fresh, job, journal))
    return report


def _read(path: Path, journal: Journal, report: BatchReport) -> None:
    """Put results into the journal. One that came back with an error is open again."""
    batched = journal.batched()
    for number, line in read_jsonl(path):
        key = line.get("custom_id") if isinstance(line, dict) else None
        if not isinstance(key, str):
            raise DataError(f"{path}:{number}: not a line of batch results (custom_id and response are needed)")
        if key not in batched:
            report.unknown += 1
            continue
        response = line.get("response") or {}
        if line.get("error") or response.get("status_code") != 200:
            report.errors += 1
        else:
            question, purpose, sample, model = batched[key][1]
            reply = reply_of(response.get("body"), endpoint="batch")
            journal.keep(Kept(key, question, purpose, sample, model, reply))
            report.read += 1
        journal.unmark_batched([key])


def _write(folder: Path, requests: dict[str, Request], job: Job, journal: Journal) -> Iterator[Path]:
    """Files of the size that is taken; a file stands before the journal says so, so that a kill loses none."""
    lines: list[str] = []
    rows: list[tuple[Any, ...]] = []
    size = 0
    for key, request in requests.items():
        line = json.dumps(_line(key, request, job), ensure_ascii=False) + "\n"
        if rows and (len(rows) == LINES or size + len(line.encode()) > BYTES):
            yield _write_one(folder, lines, rows, journal)
            lines, rows, size = [], [], 0
        lines.append(line)
        rows.append((key, request.question, request.purpose, job.recipe.sample, job.recipe.teacher.model))
        size += len(line.encode())
    if rows:
        yield _write_one(folder, lines, rows, journal)


def _write_one(folder: Path, lines: list[str], rows: list[tuple[Any, ...]], journal: Journal) -> Path:
    numbers = [int(path.stem.split("-")[1]) for path in folder.glob("requests-*.jsonl")]
    path = folder / f"requests-{max(numbers, default=0) + 1}.jsonl"
    write_text(path, "".join(lines))
    journal.mark_batched(path.name, rows)
    return path


def _line(key: str, request: Request, job: Job) -> dict[str, Any]:
    way = "schema" if job.recipe.teacher.structured == "auto" else job.recipe.teacher.structured
    body = request.body(job.recipe.teacher) | chat_format(way, request)
    return {"custom_id": key, "method": "POST", "url": "/v1/chat/completions", "body": body}
