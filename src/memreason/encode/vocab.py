"""The scheme's tokens become rows: tokenizer entries, embeddings, their first values and checks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from tokenizers import AddedToken
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memreason.core.errors import ModelError
from memreason.encode.base import bare_tokenizer, text_fingerprint
from memreason.encode.codec import Codec
from memreason.encode.demonstrations import Demonstrations
from memreason.encode.scheme import TokenScheme

__all__ = ["add_rows", "add_tokens", "bias_rows"]

NOISE = 0.1  # of the spread of the word's rows: tokens of one block must differ, and still mean the word


def add_tokens(
    scheme: TokenScheme, tokenizer: PreTrainedTokenizerBase, demonstrations: Demonstrations | None = None
) -> Codec:
    """Add the scheme's tokens to the tokenizer (in place) and bind both, and what is shown before each question.

    Raises ModelError if the base tokenizer already has one of them: its text could then become a block.
    """
    known = [token for token in scheme.tokens if token in tokenizer.get_vocab()]
    if known:
        raise ModelError(f"the base tokenizer already holds {known}; choose other kinds")
    fingerprint = text_fingerprint(bare_tokenizer(tokenizer))
    # special=False and normalized=False: they survive skip_special_tokens and the normaliser (law 5).
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in scheme.tokens])
    digest = demonstrations.digest if demonstrations else ""
    return Codec(replace(scheme, tokenizer=fingerprint, demonstrations=digest), tokenizer, demonstrations)


def add_rows(model: PreTrainedModel, codec: Codec) -> None:
    """Give the new tokens their rows, in place: the embedding grows if it must and never shrinks.

    Rows take the ids that the tokenizer gave, which on padded vocabularies lie below the number of
    rows. Each starts as the mean of the rows of its kind's word plus seeded noise (law 6).
    """
    ids = [i for block in codec.blocks.values() for i in block]
    if not ids:
        return
    network: Any = model  # Transformers types its layers as Tensor | Module
    rows = network.get_input_embeddings().weight.shape[0]
    if max(ids) >= rows:
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    head = network.get_output_embeddings()
    matrices = [network.get_input_embeddings().weight]
    if head is not None and head.weight is not matrices[0]:
        matrices.append(head.weight)
    generator = torch.Generator().manual_seed(codec.scheme.noise_seed)
    with torch.no_grad():
        for name, block in codec.blocks.items():
            word = codec.encode(" " + name)
            noise = torch.randn(len(block), matrices[0].shape[1], generator=generator)
            for matrix in matrices:
                base = matrix[word].float().mean(dim=0).cpu()
                spread = matrix[word].float().std().cpu()
                matrix[block] = (base + NOISE * spread * noise).to(matrix)
        if head is not None and getattr(head, "bias", None) is not None:
            head.bias[ids] = 0.0  # the published code left random values here
    bias_rows(model, codec)


def bias_rows(model: Any, codec: Codec) -> None:
    """Let the head add the scheme's `row_bias` to the logits of the new tokens, in place, if it has one.

    A head without a bias gets one, which plain Transformers knows nothing of: `merge` hands it over.
    """
    if not codec.scheme.row_bias:
        return
    head, ids = model.get_output_embeddings(), [i for block in codec.blocks.values() for i in block]
    if head.bias is None:
        head.bias = nn.Parameter(head.weight.new_zeros(len(head.weight)), requires_grad=False)
    with torch.no_grad():
        head.bias[ids] = torch.tensor(codec.scheme.row_bias).to(head.bias)
    model.generation_config.sequence_bias = None  # of a merged model: it would count twice
