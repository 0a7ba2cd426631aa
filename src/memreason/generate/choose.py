"""How the next token is taken from logits, and which tokens are as good as sure to follow it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from memreason.core.stages import EvalRecipe
from memreason.encode.codec import Codec
from memreason.encode.scheme import ANSWER, PREFIX

__all__ = ["Choose", "Taken", "chooser", "drafts_of", "take"]

RUN = 64  # numbers of a row of logits that are compared at once
ROWS = 16  # of logits that are looked at together: their fp32 copies stay in the cache
Choose = Callable[[Tensor, Sequence[float]], Tensor]


def chooser(model: nn.Module, settings: EvalRecipe) -> Choose:
    """How a token is taken from logits (tokens, vocabulary), with a random number for each."""
    temperature, top_p, top_k = settings.temperature, settings.top_p, 0
    sampled = settings.decoding == "sample"
    if settings.decoding == "model-default":
        defaults: Any = getattr(model, "generation_config", None)
        sampled = bool(getattr(defaults, "do_sample", False))
        if sampled:
            temperature, top_p, top_k = defaults.temperature or 1.0, defaults.top_p or 1.0, defaults.top_k or 0
    if not sampled:
        return lambda logits, points: _largest(logits)

    def sample(logits: Tensor, points: Sequence[float]) -> Tensor:
        probabilities = (logits.float() / temperature).softmax(dim=-1).sort(dim=-1, descending=True)
        values = probabilities.values.clone()
        values[values.cumsum(dim=-1) - values > top_p] = 0
        if top_k:
            values[:, top_k:] = 0
        edges = (values / values.sum(dim=-1, keepdim=True)).cumsum(dim=-1)
        index = torch.searchsorted(edges, torch.tensor(points, device=edges.device)[:, None])
        return probabilities.indices.gather(1, index.clamp(max=edges.shape[1] - 1)).squeeze(1)

    return sample


def _largest(logits: Tensor) -> Tensor:
    """The first of the largest of each row (rows, vocabulary), which is argmax.

    On a CPU argmax looks at number after number, amax at many at once: first the run in which it stands is found.
    """
    size = logits.shape[1]
    run = min(RUN, size)
    runs = torch.cat([logits.unfold(1, run, run).amax(dim=-1), logits[:, -run:].amax(dim=-1, keepdim=True)], dim=1)
    start = (runs.argmax(dim=-1) * run).clamp(max=size - run)
    return start + logits.gather(1, start[:, None] + torch.arange(run, device=start.device)).argmax(dim=-1)


class Taken(NamedTuple):
    """A token that was taken: its log-probability, the entropy (nats) of the distribution that it came from, and its
    margin (its probability less that of the likeliest other token)."""

    token: int
    logprob: float
    entropy: float
    margin: float


def take(logits: Tensor, points: Sequence[float], choose: Choose) -> Iterator[Taken]:
    """A token for each row of logits."""
    found = [_taken(logits[n : n + ROWS], points[n : n + ROWS], choose) for n in range(0, len(logits), ROWS)]
    return map(Taken, *(torch.cat(column).tolist() for column in zip(*found, strict=True)))


def _taken(logits: Tensor, points: Sequence[float], choose: Choose) -> tuple[Tensor, ...]:
    """Tokens, log-probabilities, entropies, margins: each (rows,)."""
    logits = logits.float()  # the largest of bf16 numbers takes five times as long to find
    chosen = choose(logits, points)
    shares, at = logits.softmax(dim=-1), chosen[:, None]
    total = logits.amax(dim=-1) - shares.amax(dim=-1).log()  # log-sum-exp
    logprob = logits.gather(1, at).squeeze(1) - total
    entropy = total - torch.linalg.vecdot(shares, logits)
    margin = shares.gather(1, at).squeeze(1) - shares.scatter_(1, at, 0).amax(dim=-1)
    return chosen, logprob, entropy, margin


def drafts_of(codec: Codec) -> dict[int, list[int]]:
    """Token -> the tokens that follow it as good as always (see the head of engine.py)."""
    scheme = codec.scheme
    drafts: dict[int, list[int]] = {}
    for name in codec.blocks:
        ids = [*codec.block(name)]
        if name == ANSWER and scheme.placement != "plan_first":
            ids += codec.encode(scheme.answer_template.split("{answer}")[0].rstrip())
        drafts |= {token: ids[n + 1 :] for n, token in enumerate(ids) if token in codec.blocks[name] and ids[n + 1 :]}
    opening = list(codec.block(PREFIX))  # not codec.opening(), which is empty where a prompt holds it already
    if scheme.placement == "each_step" and opening:
        ends = {line[-1] for text in ("", "a", "a.") if (line := codec.encode(text + scheme.line_ending))}
        drafts |= dict.fromkeys(ends, opening)
    return drafts
