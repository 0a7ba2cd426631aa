"""Questions being answered, and what comes of them."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch

from memreason.core.stages import EvalRecipe
from memreason.core.trace import Question
from memreason.encode.codec import Codec
from memreason.encode.free import is_over
from memreason.encode.sparse import BEGINNING, Segment, segments
from memreason.generate.choose import Taken

__all__ = ["Engine", "Generation", "Given", "Retrieved", "Row", "Until", "start"]

Given = Callable[[Sequence[int]], list[int]]  # generated ids so far -> what is put behind the last one, if anything
Until = Callable[[Sequence[int]], bool]  # generated ids so far -> whether to stop behind the last one


class Retrieved(NamedTuple):
    """A line whose text was retrieved: the place of its first id, where the model went on, the passage's id, and the
    model's own line with its mean log-probability."""

    place: int
    end: int
    source: str
    own: str
    sureness: float


@dataclass(frozen=True)
class Generation:
    """Ids of one generated trace (its opening block included), and of each generated one its log-probability, and
    entropy (nats) of the distribution that it was taken from, and its margin: nan for ids that were given."""

    question: Question
    sample: int
    ids: list[int]
    logprobs: list[float]
    entropies: list[float]
    margins: list[float]
    retrieved: tuple[Retrieved, ...] = ()


@dataclass
class Row:
    """A question being answered. `fed` tokens have keys and values; `pending` go in next, its last `drafted` unsure.

    It ends with EOS, at its limit, or where `until` says so.
    """

    question: Question
    sample: int
    limit: int
    pending: list[int]
    random: torch.Generator
    until: Until | None = None
    fed: int = 0
    drafted: int = 0
    ids: list[int] = field(default_factory=list)
    taken: list[Taken] = field(default_factory=list)
    draws: list[float] = field(default_factory=list)
    retrieved: list[Retrieved] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)  # of what is fed or pending, where attention is sparse
    prompt: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.prompt = self.pending

    def since(self, parting: Collection[int]) -> list[int]:
        """The first position that each pending token may look at; `parting` are planning tokens that part segments."""
        del self.segments[self.fed :]  # of drafts that were wrong
        before = self.segments[-1] if self.segments else BEGINNING
        self.segments += segments(self.pending, parting, before, self.fed)
        return [segment.since for segment in self.segments[self.fed :]]

    def take(self, one: Taken) -> None:
        self.ids.append(one.token)
        self.taken.append(one)

    def accept(self, found: Iterator[Taken], given: Given | None, eos: int) -> bool:
        """Take what was chosen behind its sure tokens and, as long as the drafted ones are what was chosen, behind each
        of those; and what is given behind them. Returns whether it ended: if not, its last token and such are pending.
        """
        sure, ended, extra = len(self.pending) - self.drafted, False, 0
        draft, self.fed = self.pending[sure:], self.fed + sure
        for k, one in enumerate([next(found) for _ in range(self.drafted + 1)]):
            self.take(one)
            extra = self.take_given(given, eos) if given else 0
            ended = self.ended(eos)
            if ended or extra or draft[k : k + 1] != [one.token]:
                break
            self.fed += 1
        self.pending, self.drafted = self.ids[len(self.ids) - 1 - extra :], 0
        return ended

    def draft(self, following: Mapping[int, list[int]], echoed: int) -> None:
        """Put behind what is pending the tokens that follow its last one as always, or `echoed` of what was read."""
        likely = following.get(self.ids[-1]) or (self.echo(echoed) if echoed else [])
        likely = likely[: self.limit - len(self.ids) - 1]
        self.pending, self.drafted = self.pending + likely, len(likely)

    def echo(self, most: int) -> list[int]:
        """`most` tokens that follow if it goes on as where the last two were read before, if they were.

        Names of the question come again, and so do loops (prompt lookup, `prompt_lookup_num_tokens` in Transformers).
        """
        read = self.prompt + self.ids
        for at in range(len(read) - 1, 1, -1):
            if read[at - 1] == read[-1] and read[at - 2] == read[-2]:
                return (read[at:] * most)[:most]
        return []

    def fill(self, ids: Sequence[int], tables: Sequence[Mapping[int, float]], eos: int) -> None:
        """Take what another engine generated, as far as the row goes. `tables`: log-probabilities, by id, of each token
        and of the likeliest (empty, or none at all: unknown)."""
        for token, table in zip(ids, tables or ({},) * len(ids), strict=True):
            logprob = table.get(token, math.nan)
            others = [value for other, value in table.items() if other != token]
            margin = math.exp(logprob) - math.exp(max(others)) if others else math.nan
            self.take(Taken(token, logprob, math.nan, margin))
            if self.ended(eos):
                break

    def take_given(self, given: Given, eos: int) -> int:
        """Take what is put behind the last token, as far as the row goes. Returns how many tokens that was."""
        extra = [] if self.ended(eos) else given(self.ids)
        for count, token in enumerate(extra, 1):
            self.take(Taken(token, math.nan, math.nan, math.nan))
            if self.ended(eos):
                return count
        return len(extra)

    def over(self, eos: int) -> bool:
        return self.ids[-1] == eos or len(self.ids) >= self.limit

    def ended(self, eos: int) -> bool:
        return self.over(eos) or bool(self.until and self.until(self.ids))

    def generation(self, opening: list[int]) -> Generation:
        figures = zip(*self.taken, strict=True) if self.taken else ((),) * 4
        _, logprobs, entropies, margins = map(list, figures)
        given = len(opening)
        found = tuple(one._replace(place=given + one.place, end=given + one.end) for one in self.retrieved)
        return Generation(self.question, self.sample, opening + self.ids, logprobs, entropies, margins, found)

    def draw(self, number: int) -> float:
        """The random number of generated token `number`: the same one whether it was drafted or not."""
        while len(self.draws) <= number:
            self.draws.append(float(torch.rand((), generator=self.random)))
        return self.draws[number]


Engine = Callable[[Any, Codec, deque[Row], EvalRecipe], Iterator[list[Row]]]  # model, rows waiting -> those that ended


def start(
    codec: Codec,
    question: Question,
    sample: int,
    settings: EvalRecipe,
    positions: int | None,
    until: Until | None = None,
) -> Row:
    prompt = codec.question_ids(question) + codec.opening()
    whole = settings.max_length or len(prompt) + settings.max_new_tokens  # the published limit counts the prompt
    limit = min(whole, positions or whole) - len(prompt)
    seed = int(question.id[:12], 16) if _is_hex(question.id[:12]) else sum(question.id.encode())
    random = torch.Generator().manual_seed((seed ^ (settings.seed * 1000003 + sample)) % 2**63)
    if codec.scheme.free:
        until = until or partial(is_over, codec)
    return Row(question, sample, limit, prompt, random, until)


def _is_hex(text: str) -> bool:
    return bool(text) and all(c in "0123456789abcdef" for c in text)
