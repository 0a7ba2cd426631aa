"""The local engine: batches of similar length, a KV cache, and rows that leave the batch when they finish."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from memreason.core.recipe import EvalRecipe
from memreason.core.trace import Question
from memreason.encode.scheme import Codec
from memreason.finetune.methods import is_adapted, merged_rows

__all__ = ["Generation", "generate"]

log = logging.getLogger("memreason")


@dataclass(frozen=True)
class Generation:
    """Ids of one generated trace (its opening block included) and the log-probability of each generated one."""

    question: Question
    sample: int
    ids: list[int]
    logprobs: list[float]


@dataclass
class _Row:
    question: Question
    sample: int
    prompt: list[int]
    limit: int
    ids: list[int]
    logprobs: list[float]
    random: torch.Generator


def generate(
    model: Any,
    codec: Codec,
    questions: Sequence[Question],
    settings: EvalRecipe,
    *,
    skip: frozenset[tuple[str, int]] = frozenset(),
) -> Iterator[list[Generation]]:
    """Answer each question `n_samples` times; yield finished batches, longest prompts first.

    A question that leaves no room for an answer (settings.max_length, or the model's positions) gets no tokens.
    Greedy answers do not depend on the batch size in fp32; sampled ones draw from a generator of
    their own, seeded by question, sample and seed. `skip` holds (question id, sample) already done.
    """
    room = getattr(model.config, "max_position_embeddings", None)
    rows = [
        _start(codec, question, sample, settings, room)
        for question in questions
        for sample in range(settings.n_samples)
        if (question.id, sample) not in skip
    ]
    rows.sort(key=lambda row: -len(row.prompt))
    opening = codec.opening()
    if too_long := [row for row in rows if row.limit < 1]:
        log.warning("%d questions are longer than the limit of prompt and answer: they get none", len(too_long))
        yield [Generation(row.question, row.sample, opening, []) for row in too_long]
        rows = [row for row in rows if row.limit >= 1]
    choose = _chooser(model, settings)
    with torch.inference_mode(), merged_rows(model):
        for start in range(0, len(rows), settings.batch_size):
            batch = rows[start : start + settings.batch_size]
            _run(model, codec, batch, choose)
            yield [Generation(row.question, row.sample, opening + row.ids, row.logprobs) for row in batch]


def _start(codec: Codec, question: Question, sample: int, settings: EvalRecipe, positions: int | None) -> _Row:
    prompt = codec.question_ids(question) + codec.opening()
    whole = settings.max_length or len(prompt) + settings.max_new_tokens  # the published limit counts the prompt
    limit = min(whole, positions or whole) - len(prompt)
    seed = int(question.id[:12], 16) if _is_hex(question.id[:12]) else sum(question.id.encode())
    random = torch.Generator().manual_seed((seed ^ (settings.seed * 1000003 + sample)) % 2**63)
    return _Row(question, sample, prompt, limit, [], [], random)


def _is_hex(text: str) -> bool:
    return bool(text) and all(c in "0123456789abcdef" for c in text)


def _chooser(model: nn.Module, settings: EvalRecipe) -> Callable[[torch.Tensor, Sequence[_Row]], torch.Tensor]:
    """How the next token is taken from log-probabilities of shape (rows, vocabulary)."""
    temperature, top_p, top_k = settings.temperature, settings.top_p, 0
    if settings.decoding == "model-default":
        defaults: Any = getattr(model, "generation_config", None)
        if not getattr(defaults, "do_sample", False):
            return lambda scores, rows: scores.argmax(dim=-1)
        temperature = defaults.temperature or 1.0
        top_p, top_k = defaults.top_p or 1.0, defaults.top_k or 0
    elif settings.decoding == "greedy":
        return lambda scores, rows: scores.argmax(dim=-1)

    def sample(scores: torch.Tensor, rows: Sequence[_Row]) -> torch.Tensor:
        probabilities = (scores / temperature).softmax(dim=-1).sort(dim=-1, descending=True)
        values = probabilities.values.clone()
        values[values.cumsum(dim=-1) - values > top_p] = 0
        if top_k:
            values[:, top_k:] = 0
        edges = (values / values.sum(dim=-1, keepdim=True)).cumsum(dim=-1)
        points = torch.tensor([float(torch.rand((), generator=row.random)) for row in rows], device=scores.device)
        index = torch.searchsorted(edges, points[:, None]).clamp(max=edges.shape[1] - 1)
        return probabilities.indices.gather(1, index).squeeze(1)

    return sample


def _run(model: nn.Module, codec: Codec, rows: list[_Row], choose: Callable[..., torch.Tensor]) -> None:
    """Generate for one batch, in place. A finished row leaves the cache at once."""
    device = next(model.parameters()).device
    longest = max(len(row.prompt) for row in rows)
    pads = [longest - len(row.prompt) for row in rows]
    ids = torch.tensor([[codec.eos_id] * pad + row.prompt for pad, row in zip(pads, rows, strict=True)], device=device)
    mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in pads], device=device)
    network, cache, extra, virtual = _prefill(model, len(rows), ids)
    mask = torch.cat([mask.new_ones(len(rows), virtual), mask], dim=1)
    active = list(rows)
    while active:
        width = next(iter(extra.values() or [ids])).shape[1]
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -width:]
        inputs = extra or {"input_ids": ids}
        output = network(
            **inputs,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        scores = output.logits[:, -1].float().log_softmax(dim=-1)
        chosen = choose(scores, active)
        picked = scores.gather(1, chosen[:, None]).squeeze(1).tolist()
        for row, token, logprob in zip(active, chosen.tolist(), picked, strict=True):
            row.ids.append(token)
            row.logprobs.append(logprob)
        stay = [n for n, row in enumerate(active) if row.ids[-1] != codec.eos_id and len(row.ids) < row.limit]
        extra = {}
        ids = chosen[:, None]
        mask = torch.cat([mask, mask.new_ones(len(active), 1)], dim=1)
        if len(stay) < len(active):
            keep = torch.tensor(stay, dtype=torch.long, device=device)
            ids, mask = ids[keep], mask[keep]
            active = [active[n] for n in stay]
            if active:
                cache.batch_select_indices(keep)


def _prefill(model: Any, count: int, ids: torch.Tensor) -> tuple[Any, Any, dict[str, torch.Tensor], int]:
    """The network to call, its first cache, first inputs if not ids, and the length of a cached virtual prefix.

    PEFT puts a prefix in front of every call, also of those that continue a cache; here it goes in once.
    """
    cache: Any = DynamicCache(config=model.config)
    if not is_adapted(model) or not model.active_peft_config.is_prompt_learning:
        return model, cache, {}, 0
    config, network = model.active_peft_config, model.get_base_model()
    if config.peft_type == "PREFIX_TUNING":
        cache = model.get_prompt(batch_size=count)
        return network, cache, {}, config.num_virtual_tokens
    words = network.get_input_embeddings()(ids)
    prompts = model.get_prompt(batch_size=count).to(words)
    return network, cache, {"inputs_embeds": torch.cat([prompts, words], dim=1)}, config.num_virtual_tokens
