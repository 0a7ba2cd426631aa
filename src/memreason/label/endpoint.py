"""One OpenAI-compatible server: its client, its limits, the way it takes JSON, and when it rests."""

from __future__ import annotations

import logging
import os
import time
from typing import Any

import httpx2
import openai
from aiolimiter import AsyncLimiter

from memreason.core.errors import TeacherError
from memreason.core.labelling import EndpointRecipe, TeacherRecipe
from memreason.label.request import Reply, Request

__all__ = ["Again", "Endpoint", "NoReply", "chat_format", "reply_of"]

log = logging.getLogger(__name__)
OPENAI = "api.openai.com"
FAILURES = 5  # in a row, until an endpoint rests
LONGEST_REST = 30.0
WAYS = ("schema", "json", "text")


class Again(Exception):
    """No reply this time; another try may bring one. `after`: seconds to wait, where the server said so; `alive`: it
    is there, and asks to be left alone for a while."""

    def __init__(self, reason: str, after: float | None = None, *, alive: bool = False) -> None:
        super().__init__(reason)
        self.after, self.alive = after, alive


class NoReply(Exception):
    """No reply to this request, however often it is sent."""


class Endpoint:
    """Sends requests. Raises Again and NoReply for one request, TeacherError for what ends a run."""

    def __init__(self, recipe: EndpointRecipe, teacher: TeacherRecipe) -> None:
        self.recipe, self.teacher = recipe, teacher
        self.key = os.environ.get(recipe.key_env, "").strip()  # a file read into a variable ends in a line break
        if not self.key and OPENAI in recipe.base_url:
            raise TeacherError(f"{recipe.base_url}: no key. Put it into the environment: export {recipe.key_env}=...")
        self.client = openai.AsyncOpenAI(
            base_url=recipe.base_url,
            api_key=self.key or "none",
            max_retries=0,  # tries are counted one level up, where another endpoint may take over
            timeout=teacher.timeout,
            http_client=openai.DefaultAioHttpClient(  # half the time of the default one a request
                limits=httpx2.Limits(max_connections=recipe.in_flight, max_keepalive_connections=recipe.in_flight)
            ),
        )
        self.url = recipe.base_url.rstrip("/") + "/chat/completions"  # whole: joining it anew costs 3 % of a request
        self.ways: tuple[str, ...] = WAYS if teacher.structured == "auto" else (teacher.structured,)
        self.requests = _limiter(recipe.requests_per_minute, at_once=1)
        self.tokens = _limiter(recipe.tokens_per_minute, at_once=teacher.max_tokens * 2)
        self.completion = float(min(256, teacher.max_tokens))  # tokens of a reply, running mean
        self.failures, self.rests_until, self.probing = 0, 0.0, False

    def rest(self, seconds: float) -> None:
        self.rests_until = max(self.rests_until, time.monotonic() + seconds)

    def free_in(self) -> float:
        """Seconds until it may be asked; 0.0 if now. After a rest one request goes ahead to see if it is back."""
        left = self.rests_until - time.monotonic()
        if left > 0:
            return left
        if self.failures >= FAILURES:
            if self.probing:
                return 0.2
            self.probing = True
        return 0.0

    async def send(self, request: Request) -> Reply:
        await self._pass_limits(request)
        start = time.monotonic()
        try:
            found = await self._post(request)
        except openai.APIError as error:
            raise self._understood(error) from error
        except ValueError as error:
            raise self._failed(f"the reply is not JSON ({self.hide(error)})") from error
        finally:
            self.probing = False
        self.failures = 0
        reply = reply_of(found, time.monotonic() - start, self.recipe.base_url)
        self.completion += 0.05 * (reply.completion_tokens - self.completion)
        return reply

    async def _pass_limits(self, request: Request) -> None:
        if self.requests:
            await self.requests.acquire()
        if self.tokens:
            characters = sum(len(message["content"]) for message in request.messages)
            await self.tokens.acquire(min(self.tokens.max_rate, characters / 4 + self.completion))

    async def _post(self, request: Request) -> Any:
        """Ask for JSON in the strictest way that this server takes; it is found out once."""
        body, refused = request.body(self.teacher), None
        for way in self.ways if request.schema else ("text",):
            try:
                # client.post and not chat.completions.create, whose models take more time than the request itself
                found = await self.client.post(self.url, cast_to=object, body=body | chat_format(way, request))
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                refused = refused or error
                continue
            if request.schema:
                self.ways = self.ways[self.ways.index(way) :]
            return found
        assert refused is not None
        raise refused

    def _understood(self, error: openai.APIError) -> Exception:
        """What the SDK's error means for the run."""
        where, said = self.recipe.base_url, self.hide(error)
        if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
            status = f"HTTP {error.status_code}"
            return TeacherError(f"{where}: the key in {self.recipe.key_env} was refused ({status}). Mend it first.")
        if isinstance(error, openai.NotFoundError):
            return TeacherError(f"{where}: not found (HTTP 404), is {self.teacher.model!r} its model? It says: {said}")
        if isinstance(error, openai.RateLimitError):
            if error.code == "insufficient_quota":
                return TeacherError(f"{where}: the credit of this key is used up (HTTP 429). It says: {said}")
            after = _retry_after(error)
            self.rest(after or 1.0)
            return Again(f"{where}: too many requests (HTTP 429)", after, alive=True)
        if isinstance(error, openai.APIStatusError) and error.status_code < 500 and error.status_code not in (408, 409):
            return NoReply(f"{where}: HTTP {error.status_code}: {said}")
        return self._failed(said, _retry_after(error))

    def _failed(self, said: str, after: float | None = None) -> Again:
        self.failures += 1
        if self.failures >= FAILURES:
            if self.failures == FAILURES:
                log.warning("%s rests after %d failures in a row: %s", self.recipe.base_url, FAILURES, said)
            self.rest(min(LONGEST_REST, 2.0 ** (self.failures - FAILURES)))
        return Again(f"{self.recipe.base_url}: {said}", after)

    def hide(self, error: Exception) -> str:
        """An error's text, without the key: some servers send it back."""
        text = " ".join(str(error).split())
        if isinstance(error.__cause__, httpx2.ConnectTimeout | httpx2.ConnectError):
            text = f"no connection ({error.__cause__})"
        elif isinstance(error, openai.APITimeoutError):
            text = f"no reply in {self.teacher.timeout:g} s (if it is only slow: --teacher.timeout, --in-flight)"
        elif isinstance(error, openai.APIConnectionError):
            text = f"the connection broke ({error.__cause__ or text})"
        return (text.replace(self.key, "***") if self.key else text)[:300]


def _limiter(per_minute: int | None, at_once: float) -> AsyncLimiter | None:
    """Spread over the minute: a bucket of a whole one would let two minutes' worth through in the first."""
    if per_minute is None:
        return None
    bucket = min(per_minute, max(at_once, per_minute / 60))
    return AsyncLimiter(bucket, 60 * bucket / per_minute)


def chat_format(way: str, request: Request) -> dict[str, Any]:
    """How a body asks for JSON: by schema, as any JSON, or by the words of the prompt alone."""
    if way == "schema" and request.schema:
        schema = {"name": request.purpose, "strict": True, "schema": request.schema}
        return {"response_format": {"type": "json_schema", "json_schema": schema}}
    return {"response_format": {"type": "json_object"}} if way == "json" and request.schema else {}


def _retry_after(error: openai.APIError) -> float | None:
    response = getattr(error, "response", None)
    try:
        return max(0.0, float(response.headers["retry-after"])) if response is not None else None
    except (KeyError, ValueError):  # none, or a date
        return None


def reply_of(found: Any, seconds: float = 0.0, endpoint: str = "") -> Reply:
    """A chat completion as a Reply; whatever it lacks counts as not said."""
    choice = ((found.get("choices") or [None])[0] if isinstance(found, dict) else None) or {}
    message, usage = choice.get("message") or {}, (found.get("usage") if isinstance(found, dict) else None) or {}
    content = message.get("content")
    return Reply(
        content if isinstance(content, str) else None,
        str(choice.get("finish_reason") or ""),
        message.get("refusal"),
        int(usage.get("prompt_tokens") or 0),
        int(usage.get("completion_tokens") or 0),
        round(seconds, 3),
        endpoint,
    )
