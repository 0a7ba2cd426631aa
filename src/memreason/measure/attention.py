"""What looks at what: attention of whole traces, summed between segments while the layers compute it.

A segment's *mass* on another is what its tokens give to all tokens of the other together, averaged over its tokens;
over all segments a row sums to one. *Per key* is the mean weight of one token for one that it sees, since a longer
segment draws more. The row of a token is where it looks when it is read, to choose the token behind it.

Layers × heads × length² is never held: the attention function computes a few queries of one layer at a time (eager, the
softmax in fp32), hands the weights to a collector and lets go of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AttentionInterface

from memreason.core.errors import ModelError
from memreason.fast.attention import attending
from memreason.finetune.methods import is_adapted, merged, network_of

__all__ = ["COLLECTING", "Collect", "Flow", "collecting", "flow", "learnt_tokens"]

COLLECTING = "memreason_collecting"  # the name of our attention in Transformers' table
CELLS = 1 << 24  # weights held at once: 64 MB
TRIED = 256  # tokens of the first trace on which a model is tried
Collect = Callable[[int, int, Tensor, Tensor], None]
"""layer, position of the first query, weights (heads, queries, keys), which keys are seen (queries, keys)."""
Pick = Callable[[int, Tensor], Tensor | None]
"""layer, weights (heads, queries, keys) -> the maps that are wanted of it, (maps, queries, keys)."""


class Flow(NamedTuple):
    """Attention between segments, (layers, maps, segments, segments), rows looking at columns; nan where nothing looks
    (mass) or nothing is seen (per_key)."""

    mass: NDArray[np.float64]
    per_key: NDArray[np.float64]


def learnt_tokens(model: Any) -> int:
    """Virtual tokens that PEFT puts in front of every input."""
    learnt = is_adapted(model) and model.active_peft_config.is_prompt_learning
    return int(model.active_peft_config.num_virtual_tokens) if learnt else 0


@contextmanager
def collecting(model: Any, ids: Sequence[int]) -> Iterator[None]:
    """A model ready for `flow`, its adapters merged meanwhile. `ids` is an input to try it on.

    Raises ModelError for a model whose attention is no function of Transformers' table, or is more than scores, mask
    and softmax: the logits must be those of its own eager attention.
    """
    with merged(model), torch.inference_mode():
        network, tried = network_of(model), torch.tensor([ids[:TRIED]], device=next(model.parameters()).device)
        seen: set[int] = set()
        config, right = network.config.get_text_config(), False
        if getattr(network, "_supports_attention_backend", False) and not getattr(config, "attention_chunk_size", None):
            with attending(network, "eager"):
                expected = network(input_ids=tried, use_cache=False, logits_to_keep=1).logits.float()
            with attending(network, COLLECTING):
                settings = {"collector": lambda layer, *_: seen.add(layer), "logits_to_keep": 1}
                found = network(input_ids=tried, use_cache=False, **settings).logits.float()
            right = bool((found - expected).norm() < 0.05 * expected.norm()) and len(seen) == config.num_hidden_layers
        if not right:
            raise ModelError(
                f"{config.model_type}: its attention cannot be looked at, because it is not (or not in every layer) a "
                "function of Transformers' table. That of Llama, Mistral, Qwen, Gemma and most others can."
            )
        with attending(model, COLLECTING):
            yield


def flow(
    model: Any,
    ids: Sequence[int],
    labels: Sequence[int],
    count: int,
    *,
    pick: Pick = lambda layer, weights: weights,
    cells: int = CELLS,
    since: Sequence[int] | None = None,
) -> Flow:
    """Attention between `count` segments of one input, for each layer and head, inside `collecting`.

    `labels` gives the segment (0, 1, …) of each position, virtual ones included. `pick` chooses or averages heads; a
    layer of which it wants nothing is left out. At most `cells` weights are held at once. `since`: the first position
    that each token sees, where attention is sparse.
    """
    device = next(model.parameters()).device
    member = torch.nn.functional.one_hot(torch.tensor(labels, device=device), count).float()
    sums: dict[int, tuple[Tensor, Tensor]] = {}

    def collect(layer: int, first: int, weights: Tensor, seen: Tensor) -> None:
        picked = pick(layer, weights)
        if picked is None:
            return
        rows, columns = member[first : first + weights.shape[1]].T, member[: weights.shape[2]]
        found = rows @ (picked @ columns), rows @ seen.float() @ columns
        before = sums.get(layer)
        sums[layer] = found if before is None else (before[0] + found[0], before[1] + found[1])

    inputs = torch.tensor([ids], device=device)
    given = {} if since is None else {"since": torch.tensor(since, device=device)}
    model(input_ids=inputs, use_cache=False, logits_to_keep=1, collector=collect, cells=cells, **given)
    mass, pairs = (torch.stack([sums[n][k] for n in sorted(sums)]).double().cpu().numpy() for k in (0, 1))
    # Keys and values that were learnt (prefix-tuning) stand in front and ask nothing.
    behind = len(ids) + (0 if _only_keys(model) else learnt_tokens(model))
    asking = member[-behind:].sum(0).double().cpu().numpy()[:, None]
    with np.errstate(invalid="ignore"):
        return Flow(mass / np.where(asking, asking, np.nan), mass / pairs[:, None])


def _only_keys(model: Any) -> bool:
    return is_adapted(model) and model.active_peft_config.peft_type == "PREFIX_TUNING"


def _attend(module: Any, query: Tensor, key: Tensor, value: Tensor, _mask: Any, **settings: Any) -> tuple[Tensor, None]:
    """Transformers' door: tensors of (1, heads, tokens, width) in, (1, tokens, heads, width) out."""
    dtype = torch.promote_types(query.dtype, value.dtype)  # over a quantised base they differ
    query, key, value = (tensor[0].to(dtype) for tensor in (query, key, value))
    heads, count, width = query.shape
    groups, keys = key.shape[:2]
    query = query * (settings.get("scaling") or width**-0.5)
    cap, window, since = settings.get("softcap"), settings.get("sliding_window"), settings.get("since")
    size = max(1, settings.get("cells", CELLS) // (heads * keys))
    found = value.new_empty(count, heads, value.shape[-1])
    for start in range(0, count, size):
        asked = query[:, start : start + size]
        first, end = keys - count + start, keys - count + start + asked.shape[1]
        scores = asked.reshape(groups, -1, width) @ key[:, :end].transpose(1, 2)
        if cap:
            scores = (scores / cap).tanh() * cap
        behind = torch.arange(first, end, device=query.device)[:, None] - torch.arange(end, device=query.device)
        seen = behind >= 0 if window is None else (behind >= 0) & (behind < window)
        if since is not None:
            seen &= torch.arange(end, device=query.device) >= since[first:end, None].to(query.device)
        weights = scores.view(heads, -1, end).float().masked_fill_(~seen, -torch.inf).softmax(dim=-1)
        settings["collector"](module.layer_idx, first, weights, seen)
        weighed = weights.to(dtype).view(groups, -1, end) @ value[:, :end]
        found[start : start + size] = weighed.view(heads, asked.shape[1], -1).transpose(0, 1)
    return found[None], None


AttentionInterface.register(COLLECTING, _attend)
