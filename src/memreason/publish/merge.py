"""An adapter becomes part of its base model."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from memreason.core.errors import CheckpointError, ExportError
from memreason.encode.codec import Codec
from memreason.finetune.checkpoint import Checkpoint

__all__ = ["hand_bias_over", "merge", "refuse_sparse", "refuse_virtual_tokens"]


def merge(loaded: Checkpoint) -> Any:
    """The adapter of a checkpoint written into its base weights, in their dtype: a plain Transformers model.

    The checkpoint's own model is used up. Raises CheckpointError for methods whose virtual tokens stand outside the
    weights: there is nothing to merge.
    """
    refuse_virtual_tokens(loaded)
    model: Any = loaded.model
    if isinstance(model, PeftModel):
        model = model.merge_and_unload()  # type: ignore[operator]
    return model


def refuse_virtual_tokens(loaded: Checkpoint) -> None:
    model: Any = loaded.model
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        raise CheckpointError(
            f"{loaded.folder}: {loaded.recipe.method.name} trains virtual tokens that stand outside the weights; "
            "there is nothing to merge. Use the checkpoint with its base model, or --to adapter."
        )


def refuse_sparse(opened: Checkpoint) -> None:
    if opened.codec.parting:
        raise ExportError(
            f"{opened.folder}: trained with tokens.sparse_attention, which no other tool computes: it would see there "
            "what it never saw. Use the checkpoint with memreason (eval, ask, serve), or train one without."
        )


def hand_bias_over(model: Any, codec: Codec) -> None:
    """Where Transformers' class has no bias in its head, the one of imported rows goes into the generation config.

    It acts in `generate` alone there; loaded as a checkpoint here, the model has it in the head again.
    """
    if not codec.scheme.row_bias:
        return
    with torch.device("meta"):
        plain: Any = AutoModelForCausalLM.from_config(model.config)
    if plain.get_output_embeddings().bias is None:
        model.get_output_embeddings().bias = None
        ids = codec.describe().values()
        pairs = [[[i], value] for i, value in zip(ids, codec.scheme.row_bias, strict=True)]
        model.generation_config.sequence_bias = pairs
