"""Search by a server that speaks Search-R1's `/retrieve` (arXiv 2503.09516, search_r1/search/retrieval_server.py).

Asked: {"queries": [...], "topk": k, "return_scores": true}. Answered: {"result": [[{"document": {"contents":
"\\"title\\"\\ntext"}, "score": ...}]]}, a list for each query; a document may also carry id, title and text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import httpx2
import tenacity

from memreason.core.errors import RetrieverError
from memreason.retrieve.passage import Passage

__all__ = ["HttpRetriever"]

BATCH = 64  # queries of one request
TRIES = 4
TIMEOUT = 60.0  # seconds: an index of millions of passages may be searched on a CPU


class _Again(Exception):
    """No answer this time; another try may bring one."""


class HttpRetriever:
    """A retrieval server, asked for some queries at a time."""

    def __init__(self, url: str, *, first_wait: float = 0.5) -> None:
        self.url, self.client = url, httpx2.Client(timeout=TIMEOUT)
        self.trying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_Again),
            stop=tenacity.stop_after_attempt(TRIES),
            wait=tenacity.wait_exponential(first_wait),
            reraise=True,
        )

    def __reduce__(self) -> tuple[type[HttpRetriever], tuple[str]]:
        return HttpRetriever, (self.url,)  # to another process goes the address, not the connection

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        """Up to `k` passages for each query, in the server's order.

        Raises RetrieverError if the server refuses, does not answer in TRIES tries, or answers something else.
        """
        found: list[list[Passage]] = []
        for start in range(0, len(queries), BATCH):
            some = list(queries[start : start + BATCH])
            body = {"queries": some, "topk": k, "return_scores": True}
            try:
                reply = self.trying(self._ask, body)
            except _Again as error:
                raise RetrieverError(f"{self.url}: {error}, {TRIES} times. Is the retrieval server there?") from error
            found += self._read(reply, len(some), k)
        return found

    def _ask(self, body: dict[str, Any]) -> Any:
        try:
            response = self.client.post(self.url, json=body)
        except httpx2.TransportError as error:
            raise _Again(f"no answer ({error or type(error).__name__})") from error
        if response.status_code >= 500 or response.status_code in (408, 429):
            raise _Again(f"HTTP {response.status_code}")
        if response.status_code != 200:
            said = " ".join(response.text.split())[:200]
            raise RetrieverError(
                f"{self.url}: HTTP {response.status_code}, is it the address of /retrieve? It says: {said}"
            )
        try:
            return response.json()
        except ValueError as error:
            raise RetrieverError(f"{self.url}: the answer is not JSON, so it is no retrieval server's") from error

    def _read(self, reply: Any, count: int, k: int) -> list[list[Passage]]:
        rows = reply.get("result") if isinstance(reply, dict) else None
        if not isinstance(rows, list) or len(rows) != count or not all(isinstance(row, list) for row in rows):
            raise RetrieverError(
                f"{self.url}: the answer's 'result' is no list of passages for each of {count} queries"
            )
        return [[self._passage(one) for one in row[:k]] for row in rows]

    def _passage(self, one: Any) -> Passage:
        """Search-R1's contents are a title in quotes, a line break and the text."""
        document = one.get("document", one) if isinstance(one, dict) else {"contents": one}
        document = document if isinstance(document, dict) else {"contents": document}
        contents = document.get("contents") or document.get("text")
        if not isinstance(contents, str) or not contents.strip():
            raise RetrieverError(f"{self.url}: a passage without 'contents': {str(one)[:100]}")
        head, _, body = contents.partition("\n")
        title = document.get("title") or (head.strip().strip('"') if body else "")
        known = document.get("id") or hashlib.sha256(contents.encode()).hexdigest()[:16]
        score = one.get("score") if isinstance(one, dict) else None
        text = document.get("text") or body or head
        return Passage(str(known), text, float(score or 0.0), title or self.url)
