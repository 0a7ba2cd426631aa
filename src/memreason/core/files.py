"""Files that survive: JSONL that can be read, appended to and resumed; atomic writes; hashes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from memreason.core.errors import DataError, StorageError
from memreason.core.trace import Trace

__all__ = [
    "append_jsonl",
    "cache_dir",
    "file_hash",
    "new_folder",
    "read_json",
    "read_jsonl",
    "read_traces",
    "settings_hash",
    "write_json",
    "write_jsonl",
    "write_text",
    "write_traces",
    "writing",
]


def cache_dir() -> Path:
    """Where models and imported data are kept: $MEMREASON_HOME, else the user's cache folder."""
    base = os.environ.get("MEMREASON_HOME")
    if base:
        return Path(base)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "memreason"


# Libraries wrap the system's error: safetensors in a SafetensorError, tokenizers in an Exception, torch in a
# RuntimeError.
WRAPPED = re.compile(r"[^:]*\(os error \d+\)|PytorchStreamWriter failed[^.:]*|unexpected pos \d+ vs \d+")


@contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Turn a failed write of the block into a StorageError that names the file and what to do."""
    try:
        yield
    except Exception as error:
        wrapped = WRAPPED.search(str(error))
        if not (isinstance(error, OSError) or wrapped):
            raise
        reason = getattr(error, "strerror", None) or (wrapped and wrapped.group().strip()) or error
        raise StorageError(
            f"{path}: cannot be written ({reason}). "
            "What was complete before is kept; free space or fix the permissions, then run the same command again."
        ) from error


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write to that becomes `out` if all went well, and is gone otherwise, after a kill with the next one.

    Raises StorageError if `out` holds files already.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StorageError(f"{out}: holds files already; give an empty folder")
    partial = out.with_name(f".{out.name}.partial")
    with writing(out):
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        partial.mkdir(parents=True)
    try:
        yield partial
        with writing(out):
            if out.exists():
                out.rmdir()
            partial.replace(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_text(path: Path | str, text: str | Iterable[str]) -> None:
    """Write whole or not at all: a temporary file beside it, flushed to disk, then renamed. Parts are streamed."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("w", encoding="utf-8") as handle:
                handle.writelines([text] if isinstance(text, str) else text)
                handle.flush()
                os.fsync(handle.fileno())
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def write_json(path: Path | str, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path | str) -> Any:
    """Raises DataError if the file is missing, not UTF-8 or not JSON."""
    text = _read_text(Path(path))
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not JSON ({error.msg} at column {error.colno})") from error


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path}:{line}: not UTF-8 (byte {error.object[error.start]:#04x} at {error.start}). "
            "Convert it first, e.g. iconv -f latin1 -t utf-8."
        ) from error


def read_jsonl(path: Path | str, *, torn_tail: bool = False) -> Iterator[tuple[int, Any]]:
    """Yield (line number, object) for each non-blank line.

    `torn_tail=True` is for our own append-only files: a last line that a kill cut short is left out.
    Raises DataError with file:line for any other malformed line.
    """
    path = Path(path)
    lines = _read_text(path).split("\n")  # not splitlines(): U+2028 may stand inside a JSON string
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except json.JSONDecodeError as error:
            if torn_tail and number == len(lines):
                return
            raise DataError(
                f"{path}:{number}: not JSON ({error.msg} at column {error.colno}): {line[:80]!r}"
            ) from error


def append_jsonl(path: Path | str, objects: Iterable[Mapping[str, Any]]) -> None:
    """Append whole lines and flush them to disk, after cutting off a torn last line."""
    path = Path(path)
    lines = "".join(_jsonl(objects))
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as handle:
            _cut_torn_tail(handle)
            end = handle.tell()
            try:
                handle.write(lines.encode())
                handle.flush()
                os.fsync(handle.fileno())
            except OSError:
                os.ftruncate(handle.fileno(), end)  # a full disk must not leave half a line behind
                raise


def _cut_torn_tail(handle: Any) -> None:
    size = handle.seek(0, os.SEEK_END)
    position = size
    while position > 0:
        start = max(0, position - 65536)
        handle.seek(start)
        newline = handle.read(position - start).rfind(b"\n")
        if newline >= 0:
            position = start + newline + 1
            break
        position = start
    if position != size:
        handle.truncate(position)
    handle.seek(position)


def read_traces(path: Path | str) -> list[Trace]:
    """Read one's own traces. Raises DataError: file:line for a bad line, the file if it holds none."""
    traces = [Trace.from_json(value, f"{path}:{number}") for number, value in read_jsonl(path)]
    if not traces:
        raise DataError(f"{path}: holds no traces. One JSON object a line with question, answer and steps is needed.")
    return traces


def write_jsonl(path: Path | str, objects: Iterable[Mapping[str, Any]]) -> None:
    write_text(path, _jsonl(objects))


def _jsonl(objects: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    return (json.dumps(value, ensure_ascii=False) + "\n" for value in objects)


def write_traces(path: Path | str, traces: Iterable[Trace]) -> None:
    write_jsonl(path, (trace.to_json() for trace in traces))


def file_hash(path: Path | str) -> str:
    """SHA-256 of a file, in hex."""
    with Path(path).open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def settings_hash(settings: Mapping[str, Any]) -> str:
    """Eight hex digits that name a set of settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:8]
