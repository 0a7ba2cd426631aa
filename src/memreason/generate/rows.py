"""Questions being answered, and what comes of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from memreason.core.recipe import EvalRecipe
from memreason.core.trace import Question
from memreason.encode.scheme import Codec

__all__ = ["Generation", "Row", "start"]


@dataclass(frozen=True)
class Generation:
    """Ids of one generated trace (its opening block included) and the log-probability of each generated one."""

    question: Question
    sample: int
    ids: list[int]
    logprobs: list[float]


@dataclass
class Row:
    """A question being answered. `fed` tokens have keys and values; `pending` go in next, its last `drafted` unsure."""

    question: Question
    sample: int
    limit: int
    pending: list[int]
    random: torch.Generator
    fed: int = 0
    drafted: int = 0
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    draws: list[float] = field(default_factory=list)

    def draw(self, number: int) -> float:
        """The random number of generated token `number`: the same one whether it was drafted or not."""
        while len(self.draws) <= number:
            self.draws.append(float(torch.rand((), generator=self.random)))
        return self.draws[number]


def start(codec: Codec, question: Question, sample: int, settings: EvalRecipe, positions: int | None) -> Row:
    prompt = codec.question_ids(question) + codec.opening()
    whole = settings.max_length or len(prompt) + settings.max_new_tokens  # the published limit counts the prompt
    limit = min(whole, positions or whole) - len(prompt)
    seed = int(question.id[:12], 16) if _is_hex(question.id[:12]) else sum(question.id.encode())
    random = torch.Generator().manual_seed((seed ^ (settings.seed * 1000003 + sample)) % 2**63)
    return Row(question, sample, limit, prompt, random)


def _is_hex(text: str) -> bool:
    return bool(text) and all(c in "0123456789abcdef" for c in text)
