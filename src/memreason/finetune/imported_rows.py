"""The rows of a published checkpoint's planning tokens: read, and put where its layout has them.

There the new rows stand behind all rows of the base model: id R + k, with R the rows of the embedding, has new row k in
the embedding and in a head of its own, and there a bias that was never trained. Its tokens, however, take the ids that
the tokenizer gives them. Where the embedding is padded these lie below R: such a token is a row of the base model, and
the row that was trained for it was never looked up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memreason.core.errors import CheckpointError
from memreason.finetune.unpickle import read_layer

__all__ = ["Rows", "kept_bias", "place", "read_rows"]

SINGLE, INPUT, OUTPUT = "embeddings.pt", "input_embeddings.pt", "output_embeddings.pt"


@dataclass(frozen=True)
class Rows:
    """Rows of planning tokens in the embedding and in the head, (tokens, width) each, and the head's bias, (tokens,).

    `before` holds the base model's rows where a file has those too.
    """

    embedding: Tensor
    head: Tensor
    bias: Tensor
    before: tuple[Tensor, ...] = ()

    @property
    def tied(self) -> bool:
        return torch.equal(self.embedding, self.head)


def read_rows(source: Path, count: int, size: int, *, tied: bool) -> Rows:
    """`count` new rows, of one file (older checkpoints, `tied` bases alone) or two, on a base of `size` rows.

    Raises CheckpointError for a file that is missing, holds something else, or another number of rows.
    """
    single = (source / SINGLE).is_file()
    if single and not tied:
        raise CheckpointError(
            f"{source / SINGLE}: rows of the embedding alone, but the base's head has rows of its own"
        )
    found = []
    for name, kind in ((SINGLE, "Embedding"),) if single else ((INPUT, "Embedding"), (OUTPUT, "Linear")):
        path = source / name
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file; it holds the rows of the planning tokens")
        layer = read_layer(path, kind)
        have = len(layer["weight"])
        if have not in (count, size + count):
            raise CheckpointError(f"{path}: holds {have} rows, but prompt_text.json names {count} planning tokens")
        found.append(layer)
    embedding, head = found[0]["weight"], found[-1]["weight"]
    bias = found[-1].get("bias", torch.zeros(len(head)))
    if embedding.shape[1] != head.shape[1] or len(bias) != len(head):
        raise CheckpointError(f"{source / OUTPUT}: its shapes do not go with those of {INPUT}")
    before = tuple(one[:size] for one in (embedding, head) if len(one) > count)
    return Rows(embedding[-count:], head[-count:], bias[-count:], before)


def place(rows: Rows, model: Any, first: int, order: Sequence[int], *, warn: Callable[[str], None]) -> Rows:
    """Rows and bias of each planning token: what its id means in the published layout.

    Token n has row `order[n]`, and row k the id `first` + k. `warn` is told if ids are not those of trained rows.
    Raises CheckpointError if the rows are of another base model.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    size, width = embedding.weight.shape
    if rows.embedding.shape[1] != width:
        raise CheckpointError(
            f"{INPUT}: rows of {rows.embedding.shape[1]} channels do not fit the base model, which has {width}"
        )
    if first > size:
        raise CheckpointError(f"the tokenizer has {first} entries and the base model {size} rows: not one model's")
    for mine, theirs in zip((embedding.weight, head.weight), rows.before, strict=False):
        if not torch.allclose(mine.detach().float(), theirs, atol=1e-2):
            raise CheckpointError(f"{INPUT}: its rows of old tokens are not those of the base model")
    ids = [first + row for row in order]
    below = sum(i < size for i in ids)
    if below:
        warn(
            f"{below} of {len(ids)} planning tokens have ids below {size}, the rows of the base model: the published "
            "code took the base's own rows for them and never used those it trained. So does this checkpoint, and its "
            "blocks are as unrelated to lines as they were there. Train anew for tokens that mean something."
        )
    bias = torch.zeros(size) if head.bias is None else head.bias.detach()

    def meant(new: Tensor, old: Tensor) -> Tensor:
        return torch.stack([old[i].detach().float() if i < size else new[i - size] for i in ids])

    return Rows(meant(rows.embedding, embedding.weight), meant(rows.head, head.weight), meant(rows.bias, bias))


def kept_bias(bias: Tensor, *, drop: bool, warn: Callable[[str], None]) -> tuple[float, ...]:
    """The bias for the scheme, one value a token; none if it is zero or, with a warning of its size, dropped."""
    if not bias.any():
        return ()
    if not drop:
        return tuple(bias.tolist())
    sizes = f"at most {bias.abs().max():.3g}, {bias.abs().mean():.3g} in the mean"
    warn(
        f"the head's bias on planning tokens is left out ({sizes}): their logits differ by it from the published code's"
    )
    return ()
