"""Replies of untrained models that name none of a question's answers: the likeliest one is taken.

Behind the reply comes "The answer is:", the second prompt of zero-shot chain of thought (arXiv 2205.11916, section 3),
and of the answers that the question has, choices or True and False, the model's likeliest is its answer. Small models
that were tuned for chats otherwise tell a story, or stop: they would count as models that know nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any, NamedTuple

import torch

from memreason.core.trace import Question
from memreason.encode.codec import Codec
from memreason.encode.free import answers_of, reply_end, says_answer
from memreason.generate.rows import Generation

__all__ = ["CUED", "cued"]

CUED = "cued"  # in a sample's meta: its answer was taken by likelihood
BATCH = 8  # replies in one pass
Sample = dict[str, Any]


class Cue(NamedTuple):
    """A reply up to its end, the cue behind it, and for each answer the ids that come next."""

    sample: Sample
    reply: list[int]
    cue: list[int]
    answers: list[list[int]]


def cued(
    model: Any, codec: Codec, samples: Sequence[Sample], questions: Mapping[str, Question]
) -> Iterator[list[Generation]]:
    """Generations anew of those samples that name no answer: the reply, the cue and the likeliest answer.

    None where answers are not free, and none for questions whose answers are not listed.
    """
    cues = [cue for sample in samples if (cue := _cue(codec, sample, questions[sample["id"]]))]
    prompts = [codec.question_ids(questions[cue.sample["id"]]) + cue.reply + cue.cue for cue in cues]
    order = sorted(range(len(cues)), key=lambda n: -len(prompts[n]))
    for first in range(0, len(order), BATCH):
        some = order[first : first + BATCH]
        scores = _next_logprobs(model, [prompts[n] for n in some])
        asked = [questions[cues[n].sample["id"]] for n in some]
        yield [_whole(codec, cues[n], *rest) for n, *rest in zip(some, asked, scores, strict=True)]


def _cue(codec: Codec, sample: Sample, question: Question) -> Cue | None:
    answers = answers_of(question)
    asked = sample["meta"].get(CUED) or not sample["logprobs"]
    if not codec.scheme.free or not answers or asked or says_answer(question, sample["prediction"]):
        return None
    reply = sample["ids"][: reply_end(codec, sample["ids"])]
    lead = ("" if not reply or codec.decode(reply).endswith("\n") else "\n") + codec.scheme.answer_lead
    behind = [codec.encode(f"{lead} {answer}") for answer in answers]
    alike = takewhile(lambda column: len(set(column)) == 1, zip(*behind, strict=False))
    shared = len(list(alike))  # answers differ by the first id behind it
    return Cue(sample, reply, behind[0][:shared], [ids[shared:] for ids in behind])


@torch.inference_mode()
def _next_logprobs(model: Any, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    """Log-probabilities of the id behind each prompt, (prompts, vocabulary)."""
    longest, device = max(map(len, prompts)), model.get_input_embeddings().weight.device
    ids = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in prompts], device=device)
    mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in prompts], device=device)
    last, place = torch.tensor([len(ids) - 1 for ids in prompts]).unique(return_inverse=True)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=last.to(device)).logits
    found: torch.Tensor = logits[torch.arange(len(prompts)), place.to(device)].float().log_softmax(dim=-1)
    return found


def _whole(codec: Codec, cue: Cue, question: Question, logprobs: torch.Tensor) -> Generation:
    """Only the reply's ids have figures, and the log-probability of the answer's first one is known."""
    answer = max(cue.answers, key=lambda ids: float(logprobs[ids[0]]))
    ids = [*cue.reply, *cue.cue, *answer, codec.eos_id]

    def known(name: str) -> list[float]:
        figures = [math.nan if value is None else value for value in cue.sample[name][: len(cue.reply)]]
        return figures + [math.nan] * (len(ids) - len(figures))

    own = known("logprobs")
    own[len(cue.reply) + len(cue.cue)] = float(logprobs[answer[0]])
    marked = replace(question, meta={**question.meta, CUED: True})
    return Generation(marked, cue.sample["meta"]["sample"], ids, own, known("entropies"), known("margins"))
