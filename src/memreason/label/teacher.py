"""Teachers: whoever turns a Request into a Reply. One of them asks any number of OpenAI-compatible servers."""

from __future__ import annotations

import asyncio
import time
from typing import Protocol

import tenacity

from memreason.core.errors import TeacherError
from memreason.core.labelling import TeacherRecipe
from memreason.label.endpoint import Again, Endpoint, NoReply
from memreason.label.request import Reply, Request

__all__ = ["OpenAITeacher", "Teacher"]

REFUSED = 20  # requests in a row that no server takes, until the run stops: then it is not the question's fault
NEVER = 15.0  # seconds of failures until the run stops, if there never was a reply: then the address is wrong
BACKOFF = tenacity.wait_exponential_jitter(initial=0.5, max=30)


class Teacher(Protocol):
    """Raises NoReply where this request gets none, TeacherError where no request would get one."""

    async def ask(self, request: Request) -> Reply: ...

    async def close(self) -> None: ...


class OpenAITeacher:
    """Any number of endpoints, each with its own limits.

    Every endpoint puts as many slots into one queue as it takes requests at a time; a request takes the next slot.
    So a cluster fills evenly, and one that is slow gets less. An endpoint that fails again and again rests; its slots
    come back when the rest is over, and the others do its work.
    """

    def __init__(self, recipe: TeacherRecipe) -> None:
        self.recipe = recipe
        self.endpoints = [Endpoint(one, recipe) for one in recipe.endpoints]
        self.slots: asyncio.Queue[Endpoint] = asyncio.Queue()
        most = max(one.in_flight for one in recipe.endpoints)
        for turn in range(most):
            for endpoint in self.endpoints:
                if turn < endpoint.recipe.in_flight:
                    self.slots.put_nowait(endpoint)
        self.failing_since: float | None = None
        self.replied = False
        self.refused = 0

    async def ask(self, request: Request) -> Reply:
        """Send until there is a reply, `tries` times at most."""
        tries = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(Again),
            stop=tenacity.stop_after_attempt(self.recipe.tries),
            wait=_wait,
            reraise=True,
        )
        try:
            return await tries(self._try, request)
        except Again as error:
            raise NoReply(str(error)) from error

    async def _try(self, request: Request) -> Reply:
        endpoint = await self._take()
        try:
            reply = await endpoint.send(request)
        except Again as error:
            self._impatient(error)
            raise
        except NoReply as error:
            self.refused += 1
            if self.refused >= REFUSED:
                raise TeacherError(f"{self.refused} requests in a row were refused. The last one: {error}") from error
            raise
        finally:
            self.slots.put_nowait(endpoint)
        self.failing_since, self.refused, self.replied = None, 0, True
        return reply

    async def _take(self) -> Endpoint:
        """The next slot whose endpoint does not rest; those that do come back by themselves."""
        while True:
            endpoint = await self.slots.get()
            wait = endpoint.free_in()
            if not wait:
                return endpoint
            asyncio.get_running_loop().call_later(wait, self.slots.put_nowait, endpoint)

    def _impatient(self, error: Again) -> None:
        now = time.monotonic()
        self.failing_since = self.failing_since or now
        patience = self.recipe.patience if self.replied or error.alive else min(NEVER, self.recipe.patience)
        if now - self.failing_since > patience:
            raise TeacherError(
                f"no reply for {patience:g} s from any of {len(self.endpoints)} endpoints. "
                f"The last error: {error}. What was labelled is kept; run the same command again."
            ) from error

    async def close(self) -> None:
        for endpoint in self.endpoints:
            await endpoint.client.close()


def _wait(state: tenacity.RetryCallState) -> float:
    """What the server asked for, else longer and longer, with jitter."""
    error = state.outcome and state.outcome.exception()
    after = error.after if isinstance(error, Again) else None
    return BACKOFF(state) if after is None else after
