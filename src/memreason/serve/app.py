"""The application: the page, streams of traces as they grow, corrections that are kept."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock
from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request as Asked
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from memreason.core.errors import ModelError
from memreason.core.files import append_jsonl
from memreason.core.trace import MEMORY, Question, Step, Trace, question_id
from memreason.generate.recall import Search
from memreason.serve.bodies import Ask, Continue, Correct, Facts, problems_of, question_of, steps_of
from memreason.serve.live import Live, Request

__all__ = ["Service", "make_app"]

Some = TypeVar("Some", bound=BaseModel)


@dataclass(frozen=True)
class Service:
    """What the application answers from. `known` holds labelled traces by question id (of task, text and choices)."""

    live: Live
    page: str
    corrections: Path
    task: str = ""
    traces: Sequence[Mapping[str, Any]] = ()
    known: Mapping[str, Trace] = field(default_factory=dict)
    search: Search | None = None

    def question(self, body: Ask) -> Question:
        """The known question that this is, or a new one."""
        asked = question_of(body, self.task)
        return self.known[asked.id].question if asked.id in self.known else asked


def make_app(service: Service) -> Starlette:
    """The routes. Nothing here looks at Host, Origin or lengths of bodies: Guard does."""
    posts = {"/ask": _ask, "/continue": _continue, "/corrections": _correct, "/facts": _facts}
    routes = [Route("/", _page), Route("/traces", _traces)]
    routes += [Route(path, function, methods=["POST"]) for path, function in posts.items()]
    app = Starlette(routes=routes, exception_handlers={HTTPException: _refusal})  # type: ignore[dict-item]
    app.state.service = service
    return app


async def _refusal(_: Asked, error: HTTPException) -> Response:
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


async def _page(asked: Asked) -> Response:
    return HTMLResponse(asked.app.state.service.page)


async def _traces(asked: Asked) -> Response:
    return JSONResponse(list(asked.app.state.service.traces))


async def _read(asked: Asked, kind: type[Some]) -> Some:
    try:
        return kind.model_validate_json(await asked.body())
    except ValidationError as error:
        status, reason = problems_of(error)
        raise HTTPException(status, reason) from error


async def _ask(asked: Asked) -> Response:
    body = await _read(asked, Ask)
    return _answered(asked, asked.app.state.service.question(body), None)


async def _continue(asked: Asked) -> Response:
    body = await _read(asked, Continue)
    return _answered(asked, asked.app.state.service.question(body), steps_of(body.steps))


def _answered(asked: Asked, question: Question, steps: Sequence[Step] | None) -> Response:
    """The stream of a question's answer, or of what comes behind given steps."""
    live: Live = asked.app.state.service.live
    try:
        request = live.request(question, steps)
    except ModelError as error:
        raise HTTPException(422, f"steps: {error}") from error
    if request.row.limit < 1:
        raise HTTPException(422, "question: too long for the model, no room is left for an answer")
    woken, loop = asyncio.Event(), asyncio.get_running_loop()

    def wake() -> None:
        loop.call_soon_threadsafe(woken.set)

    if not live.put(request, wake):
        reason = "the server is stopping" if live.closing else "too many questions are open; ask again later"
        raise HTTPException(503, reason, {"Retry-After": str(live.retry_after())})
    return _Stream(live, request, woken)


class _Stream(StreamingResponse):
    """Lines of JSON, each the trace so far. However it ends, the request is left."""

    def __init__(self, live: Live, request: Request, woken: asyncio.Event) -> None:
        super().__init__(_grown(request, woken), media_type="application/x-ndjson")
        self.live, self.request = live, request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.live.leave(self.request)


async def _grown(request: Request, woken: asyncio.Event) -> AsyncIterator[str]:
    told = (-1, -1)
    while True:
        woken.clear()
        if request.ended or request.mark() != told:
            told = request.mark()
            event = request.so_far()
            yield json.dumps(event, ensure_ascii=False) + "\n"
            if event["done"]:
                return
        await woken.wait()


async def _correct(asked: Asked) -> Response:
    """Keep a trace as a line of corrections.jsonl, labelled: its answer is gold."""
    service: Service = asked.app.state.service
    body = await _read(asked, Correct)
    steps = steps_of(body.steps)
    try:
        service.live.codec.step_ids(steps)  # kinds that the scheme has
    except ModelError as error:
        raise HTTPException(422, f"steps: {error}") from error
    question = replace(service.question(body), answer=body.answer)
    line = Trace(question, steps, meta={"by": "correction"}).to_json()
    await run_in_threadpool(_keep, service.corrections, line)
    return JSONResponse({"kept": service.corrections.name, "id": question.id}, 201)


def _keep(path: Path, line: Mapping[str, Any]) -> None:
    with FileLock(f"{path}.lock"):  # another server of this run may write there too
        append_jsonl(path, [line])


async def _facts(asked: Asked) -> Response:
    """The known memory lines of a question, and what a search finds in place of a line, where there is one."""
    service: Service = asked.app.state.service
    body = await _read(asked, Facts)
    question = service.question(body)
    known = service.known.get(question_id(service.task, question.text, question.choices))
    gold = [step.text for step in known.of_kind(MEMORY)] if known else []
    found = await run_in_threadpool(service.search, [(question, body.line)]) if service.search else []
    retrieved = [{"id": one[0], "text": one[1]} for one in found if one]
    return JSONResponse({"gold": gold, "answer": known.question.answer if known else None, "retrieved": retrieved})
