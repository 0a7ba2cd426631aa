"""The run: questions through a teacher, N in flight, every reply and every outcome in the journal before the next."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

from tqdm import tqdm

from memreason.core.files import settings_hash
from memreason.core.labelling import LabelRecipe
from memreason.core.trace import Trace
from memreason.label.endpoint import NoReply
from memreason.label.journal import Journal, Kept
from memreason.label.outcome import Labelling, Outcome, Right, label_trace
from memreason.label.prices import Price, money
from memreason.label.prompting import Prompts
from memreason.label.protocols import PROTOCOLS
from memreason.label.request import Reply, Request, key_of
from memreason.label.teacher import Teacher

__all__ = ["Job", "Tally", "label_all", "play"]

BLOCK = 32  # questions claimed at a time


@dataclass(frozen=True)
class Job:
    """A labelling: what is asked of each question, and how its trace is judged."""

    recipe: LabelRecipe
    right: Right
    weights: str = ""  # of a teacher that runs here: trained anew, it is another one

    @cached_property
    def prompts(self) -> Prompts:
        return Prompts(PROTOCOLS[self.recipe.protocol].purposes, self.recipe.prompts, self.recipe.checks)

    @property
    def name(self) -> str:
        """Names outcomes in the journal: what could change one, and nothing else."""
        recipe, teacher = self.recipe, self.recipe.teacher
        settings = recipe.model_dump(include={"protocol", "checks", "attempts", "sample"})
        settings |= teacher.model_dump(include={"model", "temperature", "top_p", "max_tokens"})
        return settings_hash({**settings, "prompts": self.prompts.version, "weights": self.weights})

    def key(self, request: Request) -> str:
        """The request's name in the journal."""
        return key_of(request, self.recipe.teacher, self.recipe.sample, self.weights)

    def kept(self, request: Request, reply: Reply) -> Kept:
        """A reply as it goes into the journal."""
        recipe = self.recipe
        return Kept(self.key(request), request.question, request.purpose, recipe.sample, recipe.teacher.model, reply)

    def talk(self, trace: Trace) -> Labelling:
        return label_trace(trace, self.recipe, self.prompts, self.right)


@dataclass
class Tally:
    """What a run did: its outcomes, and what they took."""

    accepted: int = 0
    rejected: int = 0
    failed: int = 0
    replies: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def done(self) -> int:
        return self.accepted + self.rejected + self.failed

    def add(self, outcome: Outcome) -> None:
        setattr(self, outcome.status, getattr(self, outcome.status) + 1)

    def pay(self, reply: Reply) -> None:
        self.replies += 1
        self.prompt_tokens += reply.prompt_tokens
        self.completion_tokens += reply.completion_tokens

    def say(self, price: Price | None) -> str:
        share = f"{self.accepted / self.done:.0%} accepted" if self.done else "none yet"
        tokens = self.prompt_tokens + self.completion_tokens
        cost = money(price, self.prompt_tokens, self.completion_tokens)
        return ", ".join([share, f"{tokens:,} tokens", *([cost] if price else [])])


def _advance(talk: Labelling, reply: Reply | None) -> Request | Outcome:
    """The next request, or the outcome. None starts it."""
    try:
        return talk.send(reply)  # type: ignore[arg-type]
    except StopIteration as done:
        outcome: Outcome = done.value
        return outcome


def play(trace: Trace, job: Job, journal: Journal) -> Request | Outcome:
    """How far the journal's replies bring a question: its outcome, or the next request that has no reply yet."""
    talk, reply = job.talk(trace), None
    while not isinstance(found := _advance(talk, reply), Outcome):
        reply = journal.find(job.key(found))
        if reply is None:
            return found
    return found


async def label_all(
    traces: Sequence[Trace],
    job: Job,
    teacher: Teacher,
    journal: Journal,
    *,
    in_flight: int,
    price: Price | None = None,
    label: str = "labelling",
) -> Tally:
    """Label every question that has no outcome yet. Stopping at any moment loses nothing that was replied.

    Raises TeacherError as soon as no request would be answered; what was labelled by then is in the journal.
    """
    tally = Tally()
    with _seldom_collected(), tqdm(total=len(traces), desc=label, unit="q", smoothing=0.05) as bar:
        waiting = _claimed(traces, journal, bar.update)

        async def work() -> None:
            for trace in waiting:  # one iterator for all workers
                await _label(trace, job, teacher, journal, tally)
                if bar.update():  # it was drawn: the next time with these figures
                    bar.set_postfix_str(tally.say(price), refresh=False)

        workers = [asyncio.create_task(work()) for _ in range(max(1, min(in_flight, len(traces))))]
        try:
            await asyncio.gather(*workers)
            bar.set_postfix_str(tally.say(price))
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
    return tally


@contextmanager
def _seldom_collected() -> Iterator[None]:
    """The garbage collector leaves the questions alone, and comes less often: it took a fifth of the time."""
    before = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(50_000, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


def _claimed(traces: Sequence[Trace], journal: Journal, pass_over: Callable[[int], object]) -> Iterator[Trace]:
    """Claim questions a block at a time; those that have an outcome, or that another process works on, are not ours."""
    for start in range(0, len(traces), BLOCK):
        block = traces[start : start + BLOCK]
        ours = journal.claim([trace.question.id for trace in block])
        pass_over(len(block) - len(ours))
        yield from (trace for trace in block if trace.question.id in ours)


async def _label(trace: Trace, job: Job, teacher: Teacher, journal: Journal, tally: Tally) -> None:
    """Play the journal's replies, and ask for what it lacks, until there is an outcome."""
    talk, reply = job.talk(trace), None
    fresh: list[Kept] = []  # at most one: it goes into the journal before anything else is asked, or with the outcome
    try:
        while not isinstance(found := _advance(talk, reply), Outcome):
            reply = journal.find(job.key(found))
            if reply is None:
                journal.keep(*fresh)
                reply = await teacher.ask(found)
                fresh = [job.kept(found, reply)]
                tally.pay(reply)
    except NoReply as error:
        assert isinstance(found, Request)
        entry = {"purpose": found.purpose, "checks": ["no_reply"], "reasons": str(error), "reply": None}
        found = Outcome("failed", None, (entry,))
    except BaseException:
        journal.keep(*fresh)  # a prompt that cannot be rendered must not cost the reply before it
        raise
    journal.settle(trace.question.id, found, *fresh)
    tally.add(found)
