"""A vector for each step: which words it has, weighed by how rare they are (tf-idf)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from memreason.core.errors import DataError
from memreason.core.stages import DataRecipe

__all__ = ["fit_words", "word_vectors"]

TOKEN = r"\w+|[^\w\s]"  # a sign such as + is a word too


def fit_words(texts: Sequence[str], data: DataRecipe) -> tuple[list[str], Any]:
    """The words of these texts, and what each weighs. Raises DataError if the frequencies leave none."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    found = TfidfVectorizer(token_pattern=TOKEN, min_df=data.min_frequency, max_df=data.max_frequency)
    try:
        found.fit(texts)
    except ValueError as error:
        raise DataError(
            f"data.min_frequency {data.min_frequency}, data.max_frequency {data.max_frequency}: they leave no word of "
            f"{len(texts)} steps"
        ) from error
    return [str(word) for word in found.get_feature_names_out()], found.idf_.astype(np.float32)


def word_vectors(texts: Sequence[str], words: Sequence[str], idf: Any) -> Any:
    """A sparse matrix (texts, words), its rows of length 1; a row is empty if no word of the text is known."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    known = TfidfVectorizer(token_pattern=TOKEN, vocabulary={word: n for n, word in enumerate(words)}, dtype=np.float32)
    known.idf_ = idf
    return known.transform(texts)
