"""Decoding here: by the engine's cohorts, or by Transformers where a model cannot be fed so."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from typing import Any

import torch

from memreason.core.errors import ModelError
from memreason.core.stages import EvalRecipe
from memreason.core.trace import Question
from memreason.encode.codec import Codec
from memreason.fast.attention import attending
from memreason.fast.matrices import laid_out
from memreason.fast.memory import keep_freed_memory
from memreason.fast.sparse import UNMASKED
from memreason.finetune.methods import merged, network_of
from memreason.generate.engine import COHORTS, Network, generate_in_cohorts
from memreason.generate.plain import generate_plainly
from memreason.generate.rows import Row

__all__ = ["decode", "refuse_unfed"]


def decode(
    model: Any,
    codec: Codec,
    waiting: deque[Row],
    settings: EvalRecipe,
    more: Callable[[], bool] = lambda: False,
) -> Generator[list[Row], None, None]:
    """Take rows from the queue until it is empty and all have ended; yield those that ended, after each pass.

    Between two passes rows may be put into the queue, and those in flight be read. When nothing is left, `more` is
    asked whether rows wait again: it may wait for them.
    """
    keep_freed_memory()
    if _feeds(network_of(model)):
        with merged(model), laid_out(model), torch.inference_mode(), attending(model, COHORTS):
            yield from generate_in_cohorts(model, codec, waiting, settings, more)
        return
    if settings.calculator:
        raise ModelError("eval.calculator: Transformers itself decodes this model, and cannot be given results")
    refuse_unfed(model, codec, fed=False)
    yield from generate_plainly(model, waiting, settings, codec.eos_id, more)


def refuse_unfed(model: Any, codec: Codec, *, fed: bool | None = None) -> None:
    """Raises ModelError for sparse attention on a model that the engine cannot feed (None: which is tried)."""
    if codec.parting and not (_feeds(network_of(model)) if fed is None else fed):
        raise ModelError(f"tokens.sparse_attention: {network_of(model).config.model_type} {UNMASKED}")


def _feeds(network: Any) -> bool:
    """Whether the engine can feed this model, tried on six tokens: four, then two more, against all at once.

    Not so where more than keys and values is carried on (state-space layers), or attention has parts of its own.
    """
    if not getattr(network, "_supports_attention_backend", False):
        return False
    size = network.get_input_embeddings().weight.shape[0]
    ids = torch.arange(size // 4, size // 2, max(1, size // 24)).tolist()[:6]
    row = Row(Question("", ""), 0, 9, ids[:4], torch.Generator())
    with torch.inference_mode(), attending(network, COHORTS):
        fed = Network(network)
        cohort = fed.cohort([row])
        fed.scores([cohort])
        row.fed, row.pending, row.drafted = 4, ids[4:], 1
        cohort.plan()
        (found,) = fed.scores([cohort])
    # "eager" rounds as the cohorts' attention does, so that in bf16 too little noise is left
    with torch.inference_mode(), attending(network, "eager"):
        expected = network(input_ids=torch.tensor([ids], device=fed.device), use_cache=False).logits[0, -2:]
    return bool((found - expected).float().norm() < 0.05 * expected.float().norm())
