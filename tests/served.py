"""A live server in a thread, with a tiny model that has learnt to write traces."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from conftest import own_traces, save_base, tiny_recipe
from memreason import pipeline
from memreason.core.stages import EvalRecipe
from memreason.finetune.checkpoint import Checkpoint
from memreason.generate.decode import decode
from memreason.serve.app import Service, make_app
from memreason.serve.guard import Guard, policy
from memreason.serve.live import Live
from memreason.serve.run import listen, make_server, run

PAGE = "<!doctype html><title>page</title><script>1</script><style>p{}</style>"
KNOWN = own_traces(8)
SETTINGS = EvalRecipe(max_new_tokens=80, batch_size=8)


def fluent_run(folder: Path) -> Path:
    """A run that has learnt to write traces."""
    return pipeline.train(tiny_recipe(folder, save_base(folder / "base"), **{"train.max_steps": 150}))


@dataclass
class Served:
    """A running server, and the answers that its model gives without it."""

    port: int
    live: Live
    corrections: Path
    server: uvicorn.Server
    thread: threading.Thread

    def post(self, path: str, body: Any, **headers: str) -> tuple[int, dict[str, str], bytes]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.send("POST", path, data, **{"content_type": "application/json", **headers})

    def send(self, method: str, path: str, data: bytes = b"", **headers: str) -> tuple[int, dict[str, str], bytes]:
        wire = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        wire.request(method, path, data, {name.replace("_", "-"): value for name, value in headers.items()})
        found = wire.getresponse()
        read = found.read()
        wire.close()
        return found.status, {name.lower(): value for name, value in found.getheaders()}, read

    def events(self, path: str, body: Any) -> list[dict[str, Any]]:
        status, _, read = self.post(path, body)
        assert status == 200, read
        return [json.loads(line) for line in read.splitlines()]


@contextmanager
def serving(
    checkpoint: Checkpoint,
    folder: Path,
    *,
    page: str = PAGE,
    limit: int = 16,
    grace: float = 30.0,
    engine: Any = decode,
    **more: Any,
) -> Iterator[Served]:
    live = Live(checkpoint.model, checkpoint.codec, SETTINGS, limit=limit, engine=engine)
    known = {trace.question.id: trace for trace in KNOWN}
    service = Service(live, page, folder / "corrections.jsonl", known=known, traces=[{"id": "x"}], **more)
    listener, port = listen("127.0.0.1", 0)
    server = make_server(Guard(make_app(service), "127.0.0.1", port, policy(page)), live, grace=grace)
    thread = threading.Thread(target=run, args=(server, live, listener))
    thread.start()
    try:
        yield Served(port, live, service.corrections, server, thread)
    finally:
        server.should_exit = True
        thread.join()
        assert not live.thread.is_alive()
