"""Real servers on loopback, for long tests: Transformers' own, and vLLM's out of an environment of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

VLLM = Path(__file__).parent.parent / ".venv-vllm" / "bin"
# vLLM on a small machine: 1 GiB of keys and values, and nothing compiled.
SMALL = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
OFFLINE = {"HF_HUB_OFFLINE": "1"}


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextmanager
def serving(command: Sequence[str], port: int, seconds: float, **environment: str) -> Iterator[str]:
    """Start a server, wait until it is healthy, and end it."""
    path = Path(f"serve-{port}.log")
    with path.open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **OFFLINE, **environment})
        try:
            end = time.monotonic() + seconds
            while True:
                assert process.poll() is None and time.monotonic() < end, path.read_text()[-2000:]
                try:
                    if httpx2.get(f"http://localhost:{port}/health").status_code == 200:
                        break
                except httpx2.TransportError:
                    pass
                time.sleep(1)
            yield f"http://localhost:{port}/v1"
        finally:
            process.terminate()  # vLLM ends its own processes then
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def transformers_serve(model: str) -> Iterator[str]:
    """Transformers' own server; `make soak` installs what it needs beside the package."""
    port = free_port()
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", model, "--port", str(port)]
    with serving([*command, "--dtype", "float32"], port, 180) as url:
        yield url


@contextmanager
def vllm_serve(model: Path, dtype: str) -> Iterator[str]:
    port = free_port()
    small = ["--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "16", "--dtype", dtype]
    command = [str(VLLM / "vllm"), "serve", str(model), "--host", "127.0.0.1", "--port", str(port), *small]
    with serving([*command, "--served-model-name", "exported"], port, 600, **SMALL) as url:
        yield url


def needs_vllm() -> None:
    if not (VLLM / "vllm").is_file():
        pytest.skip("no vLLM: make .venv-vllm/.ready")
