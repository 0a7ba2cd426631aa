"""The journal: one SQLite file that holds every reply and every outcome, safe to kill and to share.

`replies` are keyed by request, so that none is paid for twice; `outcomes` by labelling and question; `claims` say
which living process works on which question. A claim dies with its process: it holds a lock file that the system
lets go of however the process ends.
"""

from __future__ import annotations

import json
import sqlite3
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from memreason.core.errors import DataError, StorageError
from memreason.label.outcome import Outcome
from memreason.label.request import Reply

__all__ = ["Journal", "Kept"]

TABLES = """
create table if not exists replies (
  key text primary key, question text, purpose text, sample integer, model text, time real, content text,
  finish_reason text, refusal text, prompt_tokens integer, completion_tokens integer, seconds real, endpoint text
) without rowid;
create table if not exists outcomes (
  labelling text, question text, status text, trace text, history text, primary key (labelling, question)
) without rowid;
create table if not exists claims (
  labelling text, question text, owner text, primary key (labelling, question)
) without rowid;
create table if not exists batched (
  key text primary key, file text, question text, purpose text, sample integer, model text
) without rowid;
create table if not exists results_read (hash text primary key) without rowid;
create index if not exists replies_question on replies (question);
"""
USAGE = {
    "replies": "1",
    "prompt_tokens": "prompt_tokens",
    "completion_tokens": "completion_tokens",
    "batch_prompt_tokens": "prompt_tokens * (endpoint = 'batch')",
    "batch_completion_tokens": "completion_tokens * (endpoint = 'batch')",
    "seconds": "seconds",
}
CLAIM = """
insert or ignore into claims select ?, ?, ? where not exists (
  select 1 from outcomes where labelling = ? and question = ? and status != 'failed'
)"""
REPLY = ("content", "finish_reason", "refusal", "prompt_tokens", "completion_tokens", "seconds", "endpoint")


class Kept(NamedTuple):
    """A reply and what it replies to."""

    key: str
    question: str
    purpose: str
    sample: int
    model: str
    reply: Reply


class Journal:
    """Opened once a process. Every call is one transaction. Raises DataError for a file that is no journal."""

    def __init__(self, path: Path | str, labelling: str = "") -> None:
        self.path, self.labelling, self.owner = Path(path), labelling, uuid.uuid4().hex
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.base = sqlite3.connect(self.path, timeout=60, isolation_level=None)
            # With a write-ahead log a kill loses nothing that was committed; only a power cut may, the last moments.
            for line in ("pragma journal_mode=wal", "pragma synchronous=normal"):
                self.base.execute(line)
            self.base.executescript(TABLES)
        except sqlite3.DatabaseError as error:
            raise DataError(f"{self.path}: cannot be opened as a journal ({error})") from error
        self.lock = FileLock(self._lock_of(self.owner))
        self.lock.acquire(timeout=0)
        self._bury()

    def close(self) -> None:
        """Let go of the claims that are left."""
        self.base.execute("delete from claims where owner = ?", (self.owner,))
        self.base.close()
        self.lock.release()
        self._lock_of(self.owner).unlink(missing_ok=True)

    def _lock_of(self, owner: str) -> Path:
        return self.path.with_name(f".{self.path.name}.{owner}.lock")

    def _bury(self) -> None:
        """Claims of processes that ended without closing are free again."""
        for (owner,) in self.base.execute("select distinct owner from claims").fetchall():
            lock = FileLock(self._lock_of(owner))
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue  # it lives (this process among them)
            self.base.execute("delete from claims where owner = ?", (owner,))
            lock.release()
            self._lock_of(owner).unlink(missing_ok=True)

    def _write(self, *statements: tuple[str, tuple[Any, ...]]) -> None:
        try:
            self.base.execute("begin immediate")
            for statement, values in statements:
                self.base.execute(statement, values)
            self.base.execute("commit")
        except sqlite3.Error as error:
            if self.base.in_transaction:
                self.base.execute("rollback")
            raise StorageError(
                f"{self.path}: cannot be written ({error}). What it holds is kept; free space or fix the permissions, "
                "then run the same command again."
            ) from error

    def claim(self, questions: Sequence[str]) -> set[str]:
        """Take questions: those that have no outcome yet and that no living process works on."""
        self._write(*[(CLAIM, (self.labelling, one, self.owner, self.labelling, one)) for one in questions])
        mine = "select question from claims where labelling = ? and owner = ?"
        return {row[0] for row in self.base.execute(mine, (self.labelling, self.owner))}.intersection(questions)

    def find(self, key: str) -> Reply | None:
        row = self.base.execute(f"select {', '.join(REPLY)} from replies where key = ?", (key,)).fetchone()
        return Reply(*row) if row else None

    def keep(self, *replies: Kept) -> None:
        """Write replies down, before anything else is asked."""
        if replies:
            self._write(*map(_insert, replies))

    def settle(self, question: str, outcome: Outcome, *replies: Kept) -> None:
        """Write down what became of a question, with the replies that led there, and let go of it."""
        trace = outcome.trace and json.dumps(outcome.trace.to_json(), ensure_ascii=False)
        history = json.dumps(outcome.history, ensure_ascii=False)
        here = (self.labelling, question)
        self._write(
            *map(_insert, replies),
            ("insert or replace into outcomes values (?, ?, ?, ?, ?)", (*here, outcome.status, trace, history)),
            ("delete from claims where labelling = ? and question = ?", here),
        )

    def outcome(self, question: str) -> tuple[str, dict[str, Any] | None, list[dict[str, Any]]] | None:
        """(status, trace, history) of a question of this labelling, or None."""
        row = self.base.execute(
            "select status, trace, history from outcomes where labelling = ? and question = ?",
            (self.labelling, question),
        ).fetchone()
        return row and (row[0], row[1] and json.loads(row[1]), json.loads(row[2]))

    def usage(self, questions: Iterable[str] | None = None) -> dict[str, Any]:
        """Replies, tokens (those of batches apart as well) and seconds of waiting; of all questions, or those named."""
        sums = ", ".join(f"total({what}) as {name}" for name, what in USAGE.items())
        wheres = [("", ())] if questions is None else [("where question = ?", (one,)) for one in questions]
        rows = [self.base.execute(f"select {sums} from replies {where}", values).fetchone() for where, values in wheres]
        found = {name: sum(column) for name, column in zip(USAGE, zip(*rows, strict=True), strict=True)}
        return {name: round(value, 3) if name == "seconds" else int(value) for name, value in found.items()}

    def batched(self) -> dict[str, tuple[str, tuple[Any, ...]]]:
        """Requests that stand in a batch file: key -> (file, (question, purpose, sample, model))."""
        return {key: (file, tuple(rest)) for key, file, *rest in self.base.execute("select * from batched")}

    def mark_batched(self, file: str, rows: Iterable[tuple[Any, ...]]) -> None:
        """These requests (key, question, purpose, sample, model) stand in that file."""
        insert = (
            "insert or replace into batched (file, key, question, purpose, sample, model) values (?, ?, ?, ?, ?, ?)"
        )
        self._write(*[(insert, (file, *row)) for row in rows])

    def unmark_batched(self, keys: Iterable[str]) -> None:
        self._write(*[("delete from batched where key = ?", (key,)) for key in keys])

    def is_read(self, hash: str) -> bool:
        """Whether a file of results with that content has been read."""
        return bool(self.base.execute("select 1 from results_read where hash = ?", (hash,)).fetchone())

    def mark_read(self, hash: str) -> None:
        self._write(("insert or ignore into results_read values (?)", (hash,)))

    def export(self) -> Iterator[dict[str, Any]]:
        """Every reply as an object, by question."""
        cursor = self.base.execute("select * from replies order by question, time")
        names = [column[0] for column in cursor.description]
        for row in cursor:
            yield dict(zip(names, row, strict=True))

    def merge(self, other: Path | str) -> None:
        """Take over replies and outcomes of another journal; what is here already stays."""
        if not Path(other).is_file():
            raise DataError(f"{other}: no such journal")
        try:
            self.base.execute("attach database ? as other", (str(other),))
            self.base.execute("select 1 from other.replies, other.outcomes limit 1")
        except sqlite3.DatabaseError as error:
            raise DataError(f"{other}: cannot be read as a journal ({error})") from error
        self._write(
            ("insert or ignore into replies select * from other.replies", ()),
            ("delete from outcomes where status = 'failed'", ()),
            ("insert or ignore into outcomes select * from other.outcomes where status != 'failed'", ()),
        )
        self.base.execute("detach database other")


def _insert(kept: Kept) -> tuple[str, tuple[Any, ...]]:
    row = (*kept[:-1], time.time(), *(getattr(kept.reply, name) for name in REPLY))
    return f"insert or ignore into replies values ({', '.join('?' * len(row))})", row
