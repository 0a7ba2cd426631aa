"""Which demonstrations teach most: candidates by the loss that the base model has behind them, before any training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedTokenizerBase

from memreason.core.recipe import Recipe
from memreason.core.trace import Trace
from memreason.encode.base import load_model
from memreason.encode.codec import Codec
from memreason.encode.demonstrations import Demonstrations
from memreason.encode.examples import Example, collate, encode_trace
from memreason.encode.pieces import IGNORED
from memreason.encode.scheme import TokenScheme

__all__ = ["by_loss"]

TOKENS = 1024  # of one pass, whose logits are all there at once


def by_loss(
    recipe: Recipe,
    scheme: TokenScheme,
    tokenizer: PreTrainedTokenizerBase,
    candidates: Sequence[Trace],
    sample: Sequence[Trace],
) -> list[int]:
    """Places of the candidates, least loss first: the mean, in nats a token, over the sample's traces behind each one.

    The base does not know planning tokens yet: lines are rendered without them. A candidate behind which a trace of
    the sample exceeds `train.model_max_length` comes last. The main process chooses for all.
    """
    ranked = [list(range(len(candidates)))]
    if PartialState().is_main_process:
        bare = replace(scheme, n_prefix=0, n_special=0, placement="each_step")
        codecs = [Codec(bare, tokenizer, Demonstrations([one], 1)) for one in candidates]
        rows = [encode_trace(codec, trace) for codec in codecs for trace in sample]
        losses = _losses(recipe, rows).reshape(len(candidates), len(sample)).mean(axis=1)
        ranked = [np.argsort(losses, kind="stable").tolist()]
    return list(broadcast_object_list(ranked)[0])


@torch.no_grad()
def _losses(recipe: Recipe, rows: Sequence[Example]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Mean loss of each row's supervised tokens; infinite for a row that training would drop."""
    model: Any = load_model(**recipe.model.model_dump(), seed=recipe.seed)
    if torch.cuda.is_available() and not (recipe.model.quantize or recipe.model.offload):
        model.to(PartialState().device)
    losses = np.full(len(rows), np.inf)
    for places in _passes([len(row["input_ids"]) for row in rows], recipe.train.model_max_length):
        batch = {name: values.to(model.device) for name, values in collate([rows[i] for i in places], 0).items()}
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        logits = model(**inputs, use_cache=False).logits.transpose(1, 2).float()
        found = torch.nn.functional.cross_entropy(logits, batch["shift_labels"], ignore_index=IGNORED, reduction="none")
        losses[places] = (found.sum(1) / (batch["shift_labels"] != IGNORED).sum(1)).cpu().numpy()
    return losses


def _passes(lengths: Sequence[int], longest: int) -> Iterator[list[int]]:
    """Places of rows that go through the model together: of about one length, at most TOKENS in all."""
    places: list[int] = []
    for i in sorted((i for i, length in enumerate(lengths) if length <= longest), key=lambda i: lengths[i]):
        if places and (len(places) + 1) * lengths[i] > TOKENS:
            yield places
            places = []
        places.append(i)
    if places:
        yield places
