"""Corpora: a JSONL file, a folder of texts, or atlas's own facts, read as passages with ids."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from memreason.core.errors import DataError, RetrieverError
from memreason.core.files import file_hash, read_jsonl
from memreason.data.atlas_forms import fact_lines

__all__ = ["ATLAS", "Document", "corpus_hash", "read_corpus"]

ATLAS = "atlas"
ENDINGS = (".jsonl", ".md", ".txt")


class Document(NamedTuple):
    """One passage of a corpus, and the file it stands in."""

    id: str
    text: str
    source: str


def read_corpus(name: str) -> Iterator[Document]:
    """The passages of a corpus, in order.

    A JSONL line has a text (`text`, or `contents` as in Search-R1's corpora) and perhaps an `id`; a text file is cut
    at blank lines. In a folder ids begin with the file's name. Raises DataError (file:line) for a line without text.
    """
    if name == ATLAS:
        yield from (Document(f"atlas:{'|'.join(fact)}", line, ATLAS) for line, fact in fact_lines())
        return
    root = Path(name)
    for path in _files(name):
        prefix = "" if path == root else f"{path.relative_to(root).as_posix()}#"
        read = _lines if path.suffix == ".jsonl" else _paragraphs
        yield from (Document(prefix + one, text, str(path)) for one, text in read(path))


def _files(name: str) -> list[Path]:
    """Raises RetrieverError if nothing of that name can be searched."""
    root = Path(name)
    found = [root] if root.is_file() else sorted(path for path in root.rglob("*") if path.is_file())
    found = [path for path in found if path.suffix in ENDINGS]
    if not found:
        raise RetrieverError(
            f"eval.corpus: {name!r} is no corpus. Name a .jsonl, .txt or .md file, a folder that holds some, "
            f"the http(s) address of a retrieval server, or {ATLAS}."
        )
    return found


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    for number, line in read_jsonl(path):
        text = (line.get("text") or line.get("contents")) if isinstance(line, dict) else None
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{path}:{number}: a passage needs a 'text' (or 'contents') that is not empty")
        yield str(line.get("id", number)), text


def _paragraphs(path: Path) -> Iterator[tuple[str, str]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}. Convert it first.") from error
    parts = (part.strip() for part in re.split(r"\n\s*\n", text))
    yield from ((str(number), part) for number, part in enumerate((part for part in parts if part), 1))


def corpus_hash(name: str) -> str:
    """16 hex digits that change with any passage, file name or id."""
    if name == ATLAS:
        parts = [f"{one.id} {one.text}" for one in read_corpus(name)]
    else:
        parts = [f"{path.name if path == Path(name) else path} {file_hash(path)}" for path in _files(name)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
