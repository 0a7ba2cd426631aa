"""A server that finishes what runs: SIGTERM and Ctrl-C close the door, streams end as they would have."""

from __future__ import annotations

import ipaddress
import os
import socket
import time
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from memreason.core.errors import RecipeError
from memreason.serve.live import Live

__all__ = ["address", "is_loopback", "listen", "make_server", "run"]

GRACE = 30.0  # seconds that open requests have to end after a signal
AFTER = 2.0  # and after that


def listen(host: str, port: int) -> tuple[socket.socket, int]:
    """A listening socket and its port (a free one for 0). Raises RecipeError where that cannot be had."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        found = socket.create_server((host, port), family=family, backlog=128)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        problem = (
            f"--host {host} --port {port}: cannot listen there ({reason}). Give another one; --port 0 takes any free."
        )
        raise RecipeError(problem, "serve") from error
    return found, int(found.getsockname()[1])


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def address(host: str, port: int) -> str:
    """Where the page opens."""
    anywhere = {"0.0.0.0": "localhost", "::": "localhost"}.get(host, host)
    return f"http://[{anywhere}]:{port}/" if ":" in anywhere else f"http://{anywhere}:{port}/"


class _Server(uvicorn.Server):
    """Uvicorn, that leaves only when nothing is open any more; a second signal does not wait."""

    def __init__(self, config: uvicorn.Config, live: Live, grace: float) -> None:
        super().__init__(config)
        self.live, self.grace, self.signalled = live, grace, 0.0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.signalled:
            self.should_exit = self.force_exit = True
        self.signalled = self.signalled or time.monotonic()

    async def on_tick(self, counter: int) -> bool:
        if self.signalled:
            self.live.close()  # not in the handler: the thread that it interrupts may hold the lock
            if not self.live.open or time.monotonic() - self.signalled > self.grace:
                return True
        return await super().on_tick(counter)


def make_server(app: ASGIApp, live: Live, *, grace: float = GRACE) -> uvicorn.Server:
    """A server that at a signal answers 503 to what is new, gives open requests `grace` seconds, then leaves."""
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        ws="none",
        lifespan="off",
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=int(AFTER),
    )
    return _Server(config, live, grace)


def run(server: uvicorn.Server, live: Live, listener: socket.socket) -> None:
    """Serve until a signal comes and what was open has ended."""
    try:
        server.run(sockets=[listener])
    finally:
        live.drop()
        live.thread.join(AFTER if server.force_exit else GRACE)
        if live.thread.is_alive():  # in the middle of a pass: an orderly exit would abort in torch's own threads
            os._exit(1)
