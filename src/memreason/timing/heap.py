"""A processor's heap: how far it grows under tensors that live and die in a given order, holes included.

glibc keeps freed memory (`fast/memory.py`) and hands it out by best fit. PyTorch asks for tensors at multiples of 64
bytes, and until glibc 2.38 such a request fits into a free piece alone that is 96 bytes longer than it. So a tensor
finds the place of an earlier one of its size again as long as the ends that both were cut from lie there still; where
something small and lasting was put on them, that place is lost for its size, and the heap grows.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

from memreason.fast.memory import LARGEST

__all__ = ["Lives", "heap_peak"]

Lives = Sequence[tuple[int, int]]  # a tensor's number and its bytes where it is made, -1 where it is freed
SPARE = 96  # bytes beyond its size that a request looks for
LOST = 20  # of so many requests one loses its end: the one number that was set (docs/performance.md)
ALIGNED = 1024  # bytes from where it matters


def heap_peak(passes: Sequence[Lives]) -> int:
    """Bytes that are held at most when these passes follow each other, each freeing in the end what it still holds."""
    heap, peak = _Heap(), 0
    for lives in passes:
        for tensor, size in lives:
            if size < 0:
                heap.free(tensor)
            else:
                heap.allocate(tensor, size)
                peak = max(peak, heap.top + heap.mapped)
        for tensor in list(heap.held):
            heap.free(tensor)
    return peak


class _Heap:
    """Pieces of memory from address 0 up to `top`: held ones, and free ones that never touch each other or `top`. The
    largest tensors are `mapped` apart."""

    def __init__(self) -> None:
        self.top = self.mapped = self.requests = 0
        self.held: dict[int, tuple[int | None, int]] = {}  # by tensor: address (None: apart) and size
        self.by_size: list[tuple[int, int]] = []  # size and address of what is free
        self.size_at: dict[int, int] = {}
        self.start_of: dict[int, int] = {}  # by where it ends

    def allocate(self, tensor: int, size: int) -> None:
        if size >= LARGEST:
            self.mapped += size
            self.held[tensor] = None, size
            return
        size = -(-(size + 8) // 16) * 16  # with its header
        spare = SPARE if size >= ALIGNED else 0
        address = self._take(size + spare)
        self.held[tensor] = address, size
        self.requests += bool(spare)
        if spare and self.requests % LOST:
            self._put(address + size, spare)

    def free(self, tensor: int) -> None:
        address, size = self.held.pop(tensor)
        if address is None:
            self.mapped -= size
        else:
            self._put(address, size)

    def _take(self, size: int) -> int:
        """The smallest free piece that is large enough, or the end of the heap."""
        place = bisect_left(self.by_size, (size, -1))
        if place == len(self.by_size):
            self.top += size
            return self.top - size
        found, address = self.by_size[place]
        self._forget(found, address)
        if found > size:
            self._put(address + size, found - size)
        return address

    def _put(self, address: int, size: int) -> None:
        """Free a piece, together with free ones that it touches."""
        if address in self.start_of:
            before = self.start_of[address]
            size += self.size_at[before]
            self._forget(self.size_at[before], before)
            address = before
        if address + size in self.size_at:
            after = self.size_at[address + size]
            self._forget(after, address + size)
            size += after
        if address + size == self.top:
            self.top = address
            return
        self.size_at[address], self.start_of[address + size] = size, address
        insort(self.by_size, (size, address))

    def _forget(self, size: int, address: int) -> None:
        del self.by_size[bisect_left(self.by_size, (size, address))]
        del self.size_at[address], self.start_of[address + size]
