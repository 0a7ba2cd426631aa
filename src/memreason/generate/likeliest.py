"""Replies of untrained models that name none of a question's answers get the one that the model finds likeliest.

Behind the reply comes "The answer is:", the second prompt of zero-shot chain of thought (arXiv 2205.11916, section 3),
and of the answers that the question has, choices or True and False, the likeliest there is put behind that. Small
models that were tuned for chats otherwise tell a story, or stop: they would count as models that know nothing.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

import torch

from memreason.core.stages import EvalRecipe
from memreason.encode.codec import Codec
from memreason.encode.free import answers_of, reply_end, says_answer
from memreason.fast.attention import attending
from memreason.finetune.methods import network_of
from memreason.generate.choose import Taken
from memreason.generate.decode import decode
from memreason.generate.rows import Row

__all__ = ["decode_and_name"]

BATCH = 8  # replies in one pass


class Cue(NamedTuple):
    """A row, the ids that go behind its reply, and for each answer those that come next."""

    row: Row
    ids: list[int]
    answers: list[list[int]]


def decode_and_name(model: Any, codec: Codec, waiting: deque[Row], settings: EvalRecipe) -> Iterator[list[Row]]:
    """The local engine; where answers are free, every reply to a question whose answers are listed names one."""
    for ended in decode(model, codec, waiting, settings):
        cues = [cue for row in ended if (cue := _cue(model, codec, row))] if codec.scheme.free else []
        for first in range(0, len(cues), BATCH):
            _name(model, codec, cues[first : first + BATCH])
        yield ended


def _cue(model: Any, codec: Codec, row: Row) -> Cue | None:
    """None for a row that names an answer, has none to name, or has no room for it."""
    answers = answers_of(row.question)
    if not answers or says_answer(row.question, codec.parse(row.question, row.ids).prediction):
        return None
    end = reply_end(codec, row.ids)
    reply = row.ids[:end]
    lead = ("" if not reply or codec.decode(reply).endswith("\n") else "\n") + codec.scheme.answer_lead
    behind = [codec.encode(f"{lead} {answer}") for answer in answers]
    room = getattr(model.config, "max_position_embeddings", None) or math.inf
    if len(codec.question_ids(row.question)) + end + max(map(len, behind)) > room:
        return None
    del row.ids[end:], row.taken[end:]  # EOS, or a question of its own
    alike = takewhile(lambda column: len(set(column)) == 1, zip(*behind, strict=False))
    shared = len(list(alike))  # answers differ by the first id behind it
    return Cue(row, behind[0][:shared], [ids[shared:] for ids in behind])


def _name(model: Any, codec: Codec, cues: Sequence[Cue]) -> None:
    """Of what is put behind a reply only the answer's first id has a log-probability."""
    prompts = [codec.question_ids(cue.row.question) + cue.row.ids + cue.ids for cue in cues]
    for cue, logprobs in zip(cues, _next_logprobs(model, prompts), strict=True):
        first, *rest = max(cue.answers, key=lambda ids: float(logprobs[ids[0]]))
        given = [Taken(token, math.nan, math.nan, math.nan) for token in (*cue.ids, *rest, codec.eos_id)]
        given.insert(len(cue.ids), Taken(first, float(logprobs[first]), math.nan, math.nan))
        for one in given:
            cue.row.take(one)


@torch.inference_mode()
def _next_logprobs(model: Any, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    """Log-probabilities of the id behind each prompt, (prompts, vocabulary)."""
    longest, device = max(map(len, prompts)), model.get_input_embeddings().weight.device
    ids = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in prompts], device=device)
    mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in prompts], device=device)
    last, place = torch.tensor([len(ids) - 1 for ids in prompts], device=device).unique(return_inverse=True)
    with attending(network_of(model), "eager"):  # the engine's own is in place while it works
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=last).logits
    found: torch.Tensor = logits[torch.arange(len(prompts), device=device), place].float().log_softmax(dim=-1)
    return found
