"""Staging memory of a pool node: slots of any aligned length out of one bounded arena."""

from __future__ import annotations

import threading
import time

from penstock.core.layout import staging_bytes
from penstock.io.memory import aligned_buffer
from penstock.pool.extents import ExtentAllocator


class Staging:
    """An arena that many threads take slots from."""

    def __init__(self, capacity_bytes: int) -> None:
        capacity_bytes = staging_bytes(capacity_bytes)
        self.memory = aligned_buffer(capacity_bytes)
        self.capacity_bytes = capacity_bytes
        self._free = ExtentAllocator(0, capacity_bytes)
        self._changed = threading.Condition()
        self._closed = False

    def take(self, size_bytes: int, deadline_s: float, leave_bytes: int = 0) -> tuple[int, memoryview] | None:
        """A slot that holds `size_bytes`, padded to the alignment, and its handle; None when there is none by the
        deadline, ever, or after `close`. `leave_bytes` stay free for others."""
        length = staging_bytes(size_bytes)
        if length + leave_bytes > self.capacity_bytes:
            return None
        with self._changed:
            while not self._closed:
                offset = self._free.take(length) if self._free.free_bytes >= length + leave_bytes else None
                if offset is not None:
                    return offset, self.memory[offset : offset + length]
                remaining_s = deadline_s - time.monotonic()
                if remaining_s <= 0 or not self._changed.wait(remaining_s):
                    return None
        return None

    @property
    def free_bytes(self) -> int:
        return self._free.free_bytes

    def give(self, offset: int, size_bytes: int) -> None:
        """Return a slot."""
        with self._changed:
            self._free.give(offset, staging_bytes(size_bytes))
            self._changed.notify_all()

    def close(self) -> None:
        """End every wait; slots that are out may still come back."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
