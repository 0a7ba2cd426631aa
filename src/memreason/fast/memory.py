"""The C allocator, told to keep what a step frees for the next step."""

from __future__ import annotations

import ctypes
import sys

__all__ = ["keep_freed_memory"]

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
