"""The run: questions through a teacher, N in flight, every reply and every outcome in the journal before the next."""

from __future__ import annotations

import asyncio
import gc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

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

    @property
    def prompts(self) -> Prompts:
        return Prompts(PROTOCOLS[self.recipe.protocol].purposes, self.recipe.prompts, self.recipe.checks)

    @property
    def name(self) -> str:
        """Names outcomes in the journal: what could change one, and nothing else."""
        recipe, teacher = self.recipe, self.recipe.teacher
        settings = recipe.model_dump(include={"protocol", "checks", "attempts", "sample"})
        settings |= teacher.model_dump(include={"model", "temperature", "top_p", "max_tokens"})
        return settings_hash({**settings, "prompts": self.prompts.version})


@dataclass
class Tally:
    """What a run did: outcomes of this run, those that were there before, and what they took."""

    accepted: int = 0
    rejected: int = 0
    failed: int = 0
    before: int = 0  # has an outcome, or is being labelled by another process
    replies: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    checks: Counter[str] = field(default_factory=Counter)

    @property
    def done(self) -> int:
        return self.accepted + self.rejected + self.failed

    def add(self, outcome: Outcome) -> None:
        setattr(self, outcome.status, getattr(self, outcome.status) + 1)
        self.checks += outcome.counts

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


def play(trace: Trace, job: Job, prompts: Prompts, journal: Journal) -> Request | Outcome:
    """How far the journal's replies bring a question: its outcome, or the next request that has no reply yet."""
    talk, reply = label_trace(trace, job.recipe, prompts, job.right), None
    while not isinstance(found := _advance(talk, reply), Outcome):
        reply = journal.find(key_of(found, job.recipe.teacher, job.recipe.sample))
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
    tally, prompts = Tally(), job.prompts
    with _seldom_collected(), tqdm(total=len(traces), desc=label, unit="q", smoothing=0.05) as bar:

        def pass_over(count: int) -> None:
            tally.before += count
            bar.update(count)

        waiting = _claimed(traces, journal, pass_over)

        async def work() -> None:
            for trace in waiting:  # one iterator for all workers
                await _label(trace, job, prompts, teacher, journal, tally)
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


def _claimed(traces: Sequence[Trace], journal: Journal, pass_over: Callable[[int], None]) -> Iterator[Trace]:
    """Claim questions a block at a time; those that have an outcome, or that another process works on, are not ours."""
    for start in range(0, len(traces), BLOCK):
        block = traces[start : start + BLOCK]
        ours = journal.claim([trace.question.id for trace in block])
        pass_over(len(block) - len(ours))
        yield from (trace for trace in block if trace.question.id in ours)


async def _label(trace: Trace, job: Job, prompts: Prompts, teacher: Teacher, journal: Journal, tally: Tally) -> None:
    """Play the journal's replies, and ask for what it lacks, until there is an outcome."""
    recipe, talk, reply = job.recipe, label_trace(trace, job.recipe, prompts, job.right), None
    fresh: list[Kept] = []  # at most one: it goes into the journal before anything else is asked, or with the outcome
    while not isinstance(found := _advance(talk, reply), Outcome):
        key = key_of(found, recipe.teacher, recipe.sample)
        reply = journal.find(key)
        if reply is not None:
            continue
        if fresh:
            journal.keep(*fresh)
        try:
            reply = await teacher.ask(found)
        except NoReply as error:
            entry = {"purpose": found.purpose, "checks": ["no_reply"], "reasons": str(error), "reply": None}
            found, fresh = Outcome("failed", None, (entry,)), []
            break
        fresh = [Kept(key, trace.question.id, found.purpose, recipe.sample, recipe.teacher.model, reply)]
        tally.pay(reply)
    journal.settle(trace.question.id, found, *fresh)
    tally.add(found)
