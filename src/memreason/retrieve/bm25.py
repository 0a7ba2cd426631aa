"""Search by words (BM25, through bm25s): an index on disk, mapped into memory when it is asked.

Robertson et al. 1994 (TREC-3) in Lucene's form; bm25s: arXiv 2407.03618.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import bm25s
from bm25s.utils.corpus import JsonlCorpus

from memreason.core.errors import RetrieverError
from memreason.core.files import cache_dir, writing
from memreason.retrieve.corpus import corpus_hash, read_corpus
from memreason.retrieve.passage import Passage

__all__ = ["Bm25", "open_bm25"]

WORD = r"(?u)\w+"  # of any script; common words weigh next to nothing as they are


def _tokens(texts: Sequence[str]) -> list[list[str]]:
    found: list[list[str]] = bm25s.tokenize(
        list(texts), token_pattern=WORD, stopwords=[], return_ids=False, show_progress=False
    )
    return found


class Bm25:
    """An index and its passages, both read from disk as far as a query needs them."""

    def __init__(self, folder: Path, corpus: str) -> None:
        self.corpus = str(Path(corpus).resolve()) if Path(corpus).exists() else corpus
        self.index = bm25s.BM25.load(folder, mmap=True, show_progress=False)
        self.passages = JsonlCorpus(folder / "corpus.jsonl", show_progress=False, save_index=False, verbosity=0)
        self.lock = threading.Lock()  # passages are read where the last reading left off

    def __reduce__(self) -> tuple[Callable[[str], Bm25], tuple[str]]:
        return open_bm25, (self.corpus,)  # to another process goes the name, not the index

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        """Up to `k` passages for each query, best first, equal ones in the corpus's order."""
        if not queries:
            return []
        count = min(k, int(self.index.scores["num_docs"]))
        found = self.index.retrieve(_tokens(queries), k=count, show_progress=False)
        ranked = [
            sorted((-float(score), int(place)) for place, score in zip(places, scores, strict=True) if score > 0)
            for places, scores in zip(found.documents, found.scores, strict=True)
        ]
        with self.lock:
            return [[self._passage(place, -score) for score, place in row] for row in ranked]

    def _passage(self, place: int, score: float) -> Passage:
        one = self.passages[place]
        return Passage(one["id"], one["text"], score, one["source"])


def open_bm25(corpus: str) -> Bm25:
    """The index of a corpus, kept in the cache under the corpus's hash: a corpus that changed gets a new one.

    Raises RetrieverError if it holds no passage, DataError for a malformed file.
    """
    folder = cache_dir() / "bm25" / corpus_hash(corpus)
    if not folder.is_dir():
        partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
        with writing(folder):
            try:
                _build(corpus, partial)
                if not folder.is_dir():  # another process may have been quicker
                    partial.rename(folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return Bm25(folder, corpus)


def _build(corpus: str, folder: Path) -> None:
    documents = [one._asdict() for one in read_corpus(corpus)]
    tokens = _tokens([one["text"] for one in documents])
    if not any(tokens):
        raise RetrieverError(f"eval.corpus: {corpus} holds no passage with a word in it")
    index = bm25s.BM25()
    index.index(tokens, show_progress=False)
    index.save(folder, corpus=documents, show_progress=False, raise_on_serialization_error=True)
