"""A teacher by script, for tests and for trying things out: deterministic, obedient, and misbehaving on order.

`python -m memreason.label.scripted --port 8000` serves it; in a test: `with serving(ScriptedTeacher()) as base_url`.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import re
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from aiohttp import web

from memreason.core.labelling import TeacherRecipe
from memreason.label.endpoint import NoReply, reply_of
from memreason.label.request import Reply, Request

__all__ = ["TROUBLES", "ScriptedTeacher", "serving"]

Body = dict[str, Any]
Answer = tuple[int, Body]  # HTTP status, JSON
GOLD = re.compile(r"The right answer is (.+?)(?: \(.*\))?\. (?:Write|Plan)", re.DOTALL)
NUMBERED = re.compile(r"^\d+\. (.+)$", re.MULTILINE)


def obedient(body: Body) -> Any:
    """What a good teacher would reply to our prompts: told apart by the JSON that their system message asks for."""
    system, user = (next(m["content"] for m in body["messages"] if m["role"] == role) for role in ("system", "user"))
    if '{"facts"' in system:
        facts = NUMBERED.findall(user)
        return {"facts": [{"number": n, "text": f"The register holds: {q}"} for n, q in enumerate(facts, 1)]}
    if '{"why"' in system:
        return {"why": "The register holds nothing of the kind.", "line": 1, "verdict": "memory"}
    if '{"kinds"' in system:
        lines = NUMBERED.findall(user)
        return {"kinds": [("memory", "reason")[n % 2] for n in range(len(lines))]}
    question = body["messages"][-1 if '{"steps"' not in system else 1]["content"].split("\n")[0]
    topic = question.removeprefix("Question: ").rstrip("?")
    lines = [f"The first register lists {topic}.", f"The second register lists {topic} too.", f"So {topic} is known."]
    if '{"steps"' not in system:
        return f"Memory: {lines[0]}\nMemory: {lines[1]}\nReason: {lines[2]}\nThe answer is: True"
    gold = GOLD.search(user)
    steps = [{"kind": kind, "text": line} for kind, line in zip(("memory", "memory", "reason"), lines, strict=True)]
    return {"steps": steps, "answer": gold[1] if gold else "True"}


def _completion(content: str | None, body: Body, finish: str = "stop", refusal: str | None = None) -> Body:
    asked = sum(len(message["content"]) for message in body["messages"]) // 4
    message = {"role": "assistant", "content": content, "refusal": refusal}
    return {
        "id": "scripted",
        "object": "chat.completion",
        "created": 0,
        "model": body.get("model", ""),
        "choices": [{"index": 0, "finish_reason": finish, "message": message}],
        "usage": {"prompt_tokens": asked, "completion_tokens": len(content or "") // 4},
    }


def _changed(change: Callable[[Any], Any]) -> Callable[[Any, Body], Answer]:
    """A reply whose JSON is well formed and wrong."""
    return lambda found, body: (200, _completion(json.dumps(change(found)), body))


def _error(status: int, message: str, code: str | None = None) -> Callable[[Any, Body], Answer]:
    return lambda found, body: (status, {"error": {"message": message, "code": code}})


def _spoilt(found: Any, **change: Any) -> Any:
    """The first step changed, or the first fact, or the first kind."""
    if "kinds" in found:
        return {"kinds": [change.get("kind", "memory"), *found["kinds"][1:]]}
    name = "facts" if "facts" in found else "steps"
    return {**found, name: [{**found[name][0], **change}, *found[name][1:]]}


def _said(found: Any) -> str:
    return found if isinstance(found, str) else json.dumps(found)


TROUBLES: dict[str, Callable[[Any, Body], Answer]] = {
    "400": _error(400, "response_format is not supported here"),
    "401": _error(401, "Incorrect API key provided"),
    "429": _error(429, "slow down"),
    "500": _error(500, "internal error"),
    "quota": _error(429, "You exceeded your current quota", "insufficient_quota"),
    "cut": lambda found, body: (0, _completion(_said(found), body)),  # the connection ends amid the reply
    "slow": lambda found, body: (200, _completion(_said(found), body)),
    "bad_json": lambda found, body: (200, _completion("Here are the steps that you asked for.", body)),
    "broken_json": lambda found, body: (200, _completion("```json\n" + _said(found)[:-1] + ",\n```", body)),
    "null": lambda found, body: (200, _completion(None, body)),
    "truncated": lambda found, body: (200, _completion(_said(found)[:40], body, "length")),
    "refusal": lambda found, body: (200, _completion(None, body, "stop", "I can't help with that.")),
    "wrong_kind": _changed(lambda found: _spoilt(found, kind="opinion")),
    "gives_away": _changed(lambda found: _spoilt(found, text="So the answer is clear.")),
    "two_lines": _changed(lambda found: _spoilt(found, text="One line.\nAnother line.")),
    "wrong_answer": _changed(lambda found: {**found, "answer": "none of these"}),
    "one_kind": _changed(lambda found: {**found, "steps": [s for s in found["steps"] if s["kind"] == "reason"]}),
}


class ScriptedTeacher:
    """Replies as `answer` says, except where it misbehaves: `script` names what the next requests meet ("ok" is
    none), `shares` how often a trouble strikes, once for each body. Every reply takes `seconds`.

    `asked` counts requests by body, `paid` those that were replied to with a completion; `bodies` are the last ones.
    """

    def __init__(
        self,
        *,
        script: Sequence[str] = (),
        shares: Mapping[str, float] | None = None,
        seconds: float = 0.0,
        slow_seconds: float = 1.0,
        retry_after: float | None = None,
        key: str | None = None,
        json_schema: bool = True,
        answer: Callable[[Body], Any] = obedient,
    ) -> None:
        self.script, self.shares, self.seconds, self.slow_seconds = list(script), shares or {}, seconds, slow_seconds
        self.retry_after, self.key, self.json_schema, self.answer = retry_after, key, json_schema, answer
        self.asked: Counter[str] = Counter()
        self.paid: Counter[str] = Counter()
        self.bodies: deque[Body] = deque(maxlen=100)
        self.lock = threading.Lock()

    def reply(self, body: Body) -> tuple[Answer, float]:
        """((status, JSON), seconds that it takes)."""
        messages = json.dumps([body["messages"], body.get("model")], sort_keys=True)
        name = hashlib.sha256(messages.encode()).hexdigest()
        schema = (body.get("response_format") or {}).get("type") == "json_schema"
        with self.lock:
            trouble = "400" if schema and not self.json_schema else self._trouble(name)
            self.asked[name] += 1
            found = self.answer(body)
            status, made = TROUBLES[trouble](found, body) if trouble != "ok" else (200, _completion(_said(found), body))
            self.paid[name] += status == 200
            self.bodies.append(body)
        return (status, made), self.slow_seconds if trouble == "slow" else self.seconds

    def _trouble(self, name: str) -> str:
        if self.script:
            return self.script.pop(0)
        if self.asked[name]:
            return "ok"
        drawn = int(name[:8], 16) / 16**8
        for trouble, share in self.shares.items():
            if drawn < share:
                return trouble
            drawn -= share
        return "ok"

    async def ask(self, request: Request) -> Reply:
        """As a Teacher of its own, with no server between."""
        (status, made), _ = self.reply(request.body(TeacherRecipe()))
        if status != 200:
            raise NoReply(f"HTTP {status}")
        return reply_of(made)

    async def close(self) -> None:
        return None


class _Server:
    """The HTTP side of a scripted teacher."""

    def __init__(self, teacher: ScriptedTeacher) -> None:
        self.teacher = teacher

    async def complete(self, request: web.Request) -> web.StreamResponse:
        said = request.headers.get("Authorization")
        if self.teacher.key and said != f"Bearer {self.teacher.key}":  # careless servers send it back
            return web.json_response({"error": {"message": f"Incorrect API key provided: {said}"}}, status=401)
        (status, made), seconds = self.teacher.reply(await request.json())
        await asyncio.sleep(seconds)
        if not status:
            return await _cut(request, json.dumps(made).encode())
        after = self.teacher.retry_after if status == 429 else None
        headers = {} if after is None else {"Retry-After": f"{after:g}"}
        return web.json_response(made, status=status, headers=headers)

    async def counts(self, _: web.Request) -> web.Response:
        """Completions in all, and the most that one body got."""
        paid = self.teacher.paid
        return web.json_response({"paid": paid.total(), "most": max(paid.values(), default=0)})


async def _cut(request: web.Request, data: bytes) -> web.StreamResponse:
    """Half of a reply, then the connection ends."""
    response = web.StreamResponse(headers={"Content-Length": str(len(data))})
    await response.prepare(request)
    await response.write(data[: len(data) // 2])
    if request.transport is not None:
        request.transport.close()
    return response


@contextmanager
def serving(teacher: ScriptedTeacher, port: int = 0) -> Iterator[str]:
    """Serve on loopback, in a thread, for the time of the block; gives the base URL."""
    server, loop = _Server(teacher), asyncio.new_event_loop()
    routes = [web.post("/v1/chat/completions", server.complete), web.get("/counts", server.counts)]
    app = web.Application()
    app.add_routes(routes)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)

    async def start() -> int:
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", port)
        await site.start()
        return int(runner.addresses[0][1])

    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{asyncio.run_coroutine_threadsafe(start(), loop).result()}/v1"
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve the scripted teacher on loopback.")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--seconds", type=float, default=0.0, help="that every reply takes")
    parser.add_argument("--trouble", nargs=2, action="append", default=[], metavar=("NAME", "SHARE"))
    given = parser.parse_args()
    shares = {name: float(share) for name, share in given.trouble}
    with serving(ScriptedTeacher(shares=shares, seconds=given.seconds), given.port) as base_url:
        print(base_url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
