"""The Ray that questions are shared out on: a cluster's (RAY_ADDRESS), or one of our own on this machine."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from memreason.core.errors import EngineError

__all__ = ["connected", "reason", "share_of"]

STORE = 2**28  # bytes for rows on their way: 20,000 fit, and Ray puts more on the disk
PATIENCE = 10  # seconds that a cluster's head may take to answer


def connected(workers: int) -> Any:
    """Ray, connected: to the cluster at RAY_ADDRESS, or to one of our own on this machine, which ends with us.

    A Ray that the calling program is connected to already is used as it is.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent to anyone
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # its C++ parts write past every logger, ...
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise EngineError("eval.ray needs Ray: pip install 'memreason[ray]'") from error
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS", "")
        _check_address(address)
        how: dict[str, Any] = {"address": address or "local", "log_to_driver": False, "logging_level": logging.ERROR}
        if not address:
            how |= {"num_cpus": max(workers, os.cpu_count() or 1), "include_dashboard": False}
            how["object_store_memory"] = STORE
        try:
            with _muted():
                ray.init(**how)
        except Exception as error:  # Ray raises this very class for what goes wrong at its start
            where, remedy = "Ray does not start here", ""
            if address:
                where, remedy = f"RAY_ADDRESS={address}", ". RAY_AUTH_TOKEN must be the cluster's, if it has one"
            raise EngineError(f"{where}: {reason(error)}{remedy}") from error
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what goes wrong is raised
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    return ray


@contextmanager
def _muted() -> Iterator[None]:
    """... and say that they will be silent."""
    kept = os.dup(2)
    with Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _check_address(address: str) -> None:
    """Ray itself tries for minutes, and ends the process."""
    if address.startswith("ray://"):
        raise EngineError(
            f"RAY_ADDRESS={address}: not through Ray Client; run on a machine of the cluster, as HOST:6379"
        )
    host, _, port = address.rpartition(":")
    if port.isdigit():
        try:
            socket.create_connection((host, int(port)), PATIENCE).close()
        except OSError as error:
            raise EngineError(f"RAY_ADDRESS={address}: no cluster answers there ({error.strerror or error})") from error


def share_of(nodes: Sequence[dict[str, Any]], wanted: int) -> tuple[dict[str, int], int]:
    """What of the cluster a worker gets, and for how many there is room: a GPU each, if there are any, else as many
    CPUs as let all of them have a place."""
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    gpus, cpus = ([int(one.get(name, 0)) for one in alive] for name in ("GPU", "CPU"))
    if any(gpus):
        return {"num_gpus": 1}, sum(gpus)
    places = {each: sum(count // each for count in cpus) for each in range(1, max([1, *cpus]) + 1)}
    each = max((each for each, count in places.items() if count >= wanted), default=1)
    return {"num_cpus": each}, places[each]


def reason(error: BaseException) -> str:
    """The last line that says something: Ray's messages begin with a remote traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[-1].rstrip(".")
