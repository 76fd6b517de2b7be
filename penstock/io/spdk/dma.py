"""Memory for direct access by a drive: registered with SPDK in 2 MiB chunks, once per process for all engines."""

from __future__ import annotations

import threading
from pathlib import Path

from penstock.io.spdk.library import SpdkLibrary

CHUNK_BYTES = 2 << 20


class Registrations:
    """Chunks registered with one shim, with the number of engines that use each. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._uses: dict[int, int] = {}

    def add(self, library: SpdkLibrary, chunks: set[int]) -> set[int]:
        """Register `chunks` (addresses); returns those that are registered now."""
        taken = set()
        with self._lock:
            for chunk in chunks:
                uses = self._uses.get(chunk, 0)
                if uses == 0 and library.memory_register(chunk, CHUNK_BYTES) != 0:
                    continue
                self._uses[chunk] = uses + 1
                taken.add(chunk)
        return taken

    def remove(self, library: SpdkLibrary, chunks: set[int]) -> None:
        """An engine no longer uses these chunks; unused ones are unregistered."""
        with self._lock:
            for chunk in chunks:
                self._uses[chunk] -= 1
                if self._uses[chunk] == 0:
                    del self._uses[chunk]
                    library.memory_unregister(chunk, CHUNK_BYTES)


registrations = Registrations()


def chunks_inside(address: int, length: int) -> set[int]:
    """Addresses of the whole chunks of `[address, address + length)`."""
    first = -(-address // CHUNK_BYTES) * CHUNK_BYTES
    return set(range(first, (address + length) // CHUNK_BYTES * CHUNK_BYTES, CHUNK_BYTES))


def chunks_touched(address: int, length: int) -> range:
    """Addresses of the chunks that overlap `[address, address + length)`."""
    return range(address // CHUNK_BYTES * CHUNK_BYTES, address + length, CHUNK_BYTES)


def lies_in_huge_pages(address: int, length: int) -> bool:
    """Whether all of it is hugetlb memory, whose pages never move."""
    at, end, huge = address, address + length, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split(maxsplit=1)[0]
        if "-" in head and not head.endswith(":"):
            start, stop = (int(part, 16) for part in head.split("-"))
            huge = start <= at < stop
        elif huge and head == "VmFlags:":
            if " ht" not in line:
                return False
            at = stop
            if at >= end:
                return True
    return False
