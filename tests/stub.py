"""Servers on loopback that tests write a few lines of: a handler that replies in JSON, and its port."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

__all__ = ["Replies", "listening"]


class Replies(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def reply(self, status: int, body: Any, headers: Mapping[str, str] = {}) -> None:
        """Bytes go as they are, anything else as JSON."""
        read = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        usual = {"Content-Type": "application/json", "Content-Length": str(len(read))}
        for name, value in {**usual, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(read)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def listening(handler: type[Replies]) -> Iterator[int]:
    """The port of a server, as long as it is needed."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield http.server_port
        http.shutdown()
