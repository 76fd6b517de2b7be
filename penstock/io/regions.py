"""Registered memory: finds the slot of the kernel's table for an address."""

from __future__ import annotations

import bisect


class Regions:
    """Address ranges that do not overlap, each with its slot in the kernel's table."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._slots: list[int] = []
        self._last = (0, 0, -1)  # start, end and slot of the range found last

    def add(self, start: int, end: int, slot: int) -> None:
        """Add a range that overlaps no present one."""
        at = bisect.bisect(self._starts, start)
        self._starts.insert(at, start)
        self._ends.insert(at, end)
        self._slots.insert(at, slot)

    def find(self, address: int) -> tuple[int, int]:
        """`(slot, bytes from address to the region's end)`; outside of all regions slot -1, with the bytes to the next
        one."""
        start, end, slot = self._last
        if start <= address < end:
            return slot, end - address
        at = bisect.bisect_right(self._starts, address) - 1
        if at >= 0 and address < self._ends[at]:
            self._last = self._starts[at], self._ends[at], self._slots[at]
            return self._slots[at], self._ends[at] - address
        following = self._starts[at + 1] if at + 1 < len(self._starts) else 1 << 63
        return -1, following - address

    def clear(self) -> None:
        """Remove all ranges."""
        self._starts.clear()
        self._ends.clear()
        self._slots.clear()
        self._last = (0, 0, -1)

    def __len__(self) -> int:
        return len(self._starts)
