"""How near questions are to candidates: by their words (BM25), or by the embedding of a model that the user names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from memreason.core.trace import Question
from memreason.encode.base import load_model, load_tokenizer

__all__ = ["by_embedding", "by_words"]

WORD = r"(?u)\w+"  # of any script; common words weigh next to nothing as they are
BATCH = 32
LONGEST = 512  # tokens of a question that are read
Scores = NDArray[np.float64]


def _text(question: Question) -> str:
    return " ".join([question.text, *(question.choices or ())])


def by_words(candidates: Sequence[Question]) -> Callable[[Sequence[Question]], Scores]:
    """BM25 in Lucene's form (bm25s: arXiv 2407.03618). Scores are (questions, candidates)."""
    import bm25s  # brings numba where there is one, and vLLM 0.32 stumbles over a numba that came before it

    def tokens(questions: Sequence[Question]) -> list[list[str]]:
        texts = [_text(question) for question in questions]
        settings = {"token_pattern": WORD, "stopwords": [], "return_ids": False, "show_progress": False}
        found: list[list[str]] = bm25s.tokenize(texts, **settings)
        return found

    index = bm25s.BM25()
    index.index(tokens(candidates), show_progress=False)

    def scores(questions: Sequence[Question]) -> Scores:
        return np.stack([index.get_scores(words) for words in tokens(questions)]).astype(np.float64)

    return scores


def by_embedding(candidates: Sequence[Question], model: str) -> Callable[[Sequence[Question]], Scores]:
    """Cosine of mean last hidden states. The model is loaded when it is first asked. Scores are as above."""

    @cache
    def known() -> Scores:
        return _embed(model, candidates)

    return lambda questions: _embed(model, questions) @ known().T


@cache
def _embedder(name: str) -> tuple[Any, Any]:
    model: Any = load_model(name, dtype="fp32")
    return load_tokenizer(name), model.to("cuda" if torch.cuda.is_available() else "cpu")


@torch.no_grad()
def _embed(name: str, questions: Sequence[Question]) -> Scores:
    """Unit vectors (questions, width). Longer questions go together, so that little is padded."""
    tokenizer, model = _embedder(name)
    ids = [list(tokenizer(_text(question))["input_ids"])[:LONGEST] for question in questions]
    vectors = np.zeros((len(ids), model.get_input_embeddings().weight.shape[1]))
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for first in range(0, len(order), BATCH):
        places = order[first : first + BATCH]
        longest = len(ids[places[-1]])
        rows = torch.tensor([ids[i] + [0] * (longest - len(ids[i])) for i in places], device=model.device)
        lengths = torch.tensor([len(ids[i]) for i in places], device=model.device)
        mask = (torch.arange(longest, device=model.device) < lengths[:, None]).long()
        states = model.base_model(input_ids=rows, attention_mask=mask, use_cache=False).last_hidden_state
        means = (states * mask[..., None]).sum(1) / lengths[:, None]
        vectors[places] = torch.nn.functional.normalize(means.float(), dim=1).cpu().numpy()
    return vectors
