"""What stands before every request: no web page elsewhere can drive the server, and no body can be too long."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import ipaddress
import re
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["Guard", "own_host", "policy"]

LONGEST_BODY = 64 * 1024
BODY_SECONDS = 10.0  # within which a body must have come
FIXED = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}
INLINED = re.compile(r"<(script|style)\b([^>]*)>(.*?)</\1>", re.DOTALL)


def policy(page: str) -> str:
    """The Content-Security-Policy under which this page's own inlined scripts and styles run, and nothing else."""
    allowed: dict[str, list[str]] = {"script": [], "style": []}
    for name, attributes, text in INLINED.findall(page):
        if "application/json" not in attributes:
            digest = hashlib.sha256(text.replace("\r\n", "\n").encode()).digest()
            allowed[name].append(f"'sha256-{base64.b64encode(digest).decode()}'")
    sources = [f"{name}-src {' '.join(hashes) or chr(39) + 'none' + chr(39)}" for name, hashes in allowed.items()]
    closed = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    return "; ".join([closed, "connect-src 'self'", "img-src data:", *sources])


def own_host(header: str, bound: str, port: int) -> bool:
    """Whether a Host header names this server.

    Bound to every address it is reached under names that nobody told it. An address written in digits is then as
    good as a known name: to send one, a page elsewhere would have to come from there (no name can be rebound to it).
    """
    parts = urlsplit(f"//{header}")
    try:
        name, named_port = parts.hostname or "", parts.port or 80
    except ValueError:
        return False
    if named_port != port or parts.username is not None:
        return False
    if name in ("localhost", bound.lower().strip("[]")):
        return True
    if not _everywhere(bound):
        return _is_address(bound) and _is_address(name) and ipaddress.ip_address(name) == ipaddress.ip_address(bound)
    return _is_address(name) or name == socket.gethostname().lower()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _everywhere(bound: str) -> bool:
    return _is_address(bound) and ipaddress.ip_address(bound).is_unspecified


class Guard:
    """ASGI middleware: Host, Origin, kind and length of bodies; security headers on every answer. Reads the body
    whole before the application sees the request."""

    def __init__(self, app: ASGIApp, host: str, port: int, csp: str) -> None:
        self.app, self.host, self.port = app, host, port
        self.headers = {**FIXED, "content-security-policy": csp}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return None

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self.headers)
            await send(message)

        headers, found = Headers(scope=scope), b""
        status, reason = next(self._refusals(scope, headers), (0, ""))
        if not status and scope["method"] == "POST":
            status, reason, found = await _body(receive)
        if status:
            return await JSONResponse({"error": reason}, status, {"connection": "close"})(scope, receive, guarded)
        return await self.app(scope, _replayed(found, receive), guarded)

    def _refusals(self, scope: Scope, headers: Headers) -> Iterator[tuple[int, str]]:
        """Status and reason of everything that is wrong with the head of a request."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if len(headers.getlist("host")) != 1 or not own_host(host, self.host, self.port):
            yield 403, f"Host {host!r} is not this server"
        if origin is not None and origin != f"http://{host}":
            yield 403, f"Origin {origin!r}: pages of other sites may not ask here"
        if scope["method"] == "POST":
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                yield 415, f"Content-Type must be application/json, got {kind or 'none'!r}"
            if int(headers.get("content-length", "0")) > LONGEST_BODY:
                yield 413, f"the body is longer than {LONGEST_BODY} bytes"


async def _body(receive: Receive) -> tuple[int, str, bytes]:
    """Status and reason if it must be refused (0: not), and the body."""
    body = b""
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message = await receive()
                body += message.get("body", b"")
                if len(body) > LONGEST_BODY:
                    return 413, f"the body is longer than {LONGEST_BODY} bytes", b""
                if not message.get("more_body", False):  # also where the client has gone
                    return 0, "", body
    except TimeoutError:
        return 408, f"the body did not come within {BODY_SECONDS:.0f} s", b""


def _replayed(body: bytes, receive: Receive) -> Receive:
    """The body that was read already, then what the client does."""
    given = False

    async def once_more() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return once_more
