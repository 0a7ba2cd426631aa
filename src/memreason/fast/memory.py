"""Memory of this process: kept by the C allocator from step to step, and measured."""

from __future__ import annotations

import ctypes
import resource
import sys

import torch

__all__ = ["keep_freed_memory", "peak_memory"]

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # mallopt(3)
LARGEST = 32 * 2**20  # glibc takes no higher M_MMAP_THRESHOLD


def keep_freed_memory() -> bool:
    """Whether glibc's malloc was told so. Elsewhere nothing happens.

    By default each tensor of more than a few hundred KB is mapped when made and unmapped when freed, and the kernel
    fills every page of it with zeros again: a quarter of an eager training step.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    return bool(mallopt and mallopt(M_TRIM_THRESHOLD, 2**31 - 1) and mallopt(M_MMAP_THRESHOLD, LARGEST))


def peak_memory() -> int:
    """Bytes that this process held at most so far: of the GPU if there is one, else of the machine."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
