"""How an evaluation's memory lines come from outside: which retriever, and below which threshold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from memreason.core.errors import RecipeError
from memreason.core.files import read_json
from memreason.core.stages import EvalRecipe
from memreason.generate.recall import retrieving
from memreason.generate.rows import Engine
from memreason.measure.unsure import CALIBRATION
from memreason.retrieve.corpus import corpus_hash
from memreason.retrieve.passage import Retriever, searching

__all__ = ["FIELDS", "Outside", "open_retriever", "outside"]

FIELDS = {"memory", "corpus", "retrieved", "unsure_below"}  # of an EvalRecipe


class Outside(NamedTuple):
    """How to decode (None: plainly), and what tells an evaluation from one with other memory."""

    engine: Engine | None = None
    spec: Mapping[str, Any] = MappingProxyType({})


def open_retriever(corpus: str) -> Retriever:
    """A retrieval server by its address, or the BM25 index of a corpus. Raises RetrieverError, DataError."""
    if _is_address(corpus):
        from memreason.retrieve.http import HttpRetriever

        return HttpRetriever(corpus)
    from memreason.retrieve.bm25 import open_bm25

    return open_bm25(corpus)


def _is_address(corpus: str) -> bool:
    return corpus.startswith(("http://", "https://"))


def outside(settings: EvalRecipe, checkpoint: Path) -> Outside:
    """Open what `settings.memory` asks for.

    Raises RecipeError where no threshold is given and none was calibrated for this checkpoint.
    """
    if settings.memory == "recall":
        return Outside()
    corpus = settings.corpus
    assert corpus is not None  # the recipe checks it
    threshold = None if settings.memory == "retrieve" else _threshold(settings, checkpoint)
    below, precede = math.inf if threshold is None else threshold, settings.retrieved == "precedes"
    engine = retrieving(searching(open_retriever(corpus)), below, precede=precede)
    known = corpus if _is_address(corpus) else corpus_hash(corpus)
    spec = {"memory": settings.memory, "corpus": known, "unsure_below": threshold}
    return Outside(engine, spec | ({"retrieved": settings.retrieved} if precede else {}))


def _threshold(settings: EvalRecipe, checkpoint: Path) -> float:
    path = checkpoint / CALIBRATION
    if settings.unsure_below is not None:
        return settings.unsure_below
    if not path.is_file():
        raise RecipeError(
            f"eval.unsure_below: not given, and {checkpoint} is not calibrated. Give one, e.g. -0.1, or run "
            f"`memreason calibrate {checkpoint}` first",
            "eval",
        )
    return float(read_json(path)["threshold"])
