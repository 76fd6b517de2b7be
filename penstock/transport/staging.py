"""Staging memory of a pool node: slots of any aligned length out of bounded arenas.

It begins with one arena. A block that is too large for it gets another one, as long as all together stay within
`limit_bytes`: what a node has to hold is known only when the first such block comes.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from penstock.core.layout import STAGING_ALIGNMENT_BYTES, staging_bytes
from penstock.io.memory import aligned_buffer
from penstock.pool.extents import ExtentAllocator
from penstock.pool.losses import note_loss
from penstock.units import format_bytes

log = logging.getLogger(__name__)

GROW_BLOCKS = 2  # a new arena holds this many of the blocks that it is made for


class _Arena:
    def __init__(self, capacity_bytes: int) -> None:
        self.memory = aligned_buffer(capacity_bytes)
        self.free = ExtentAllocator(0, capacity_bytes)


class Slot:
    """A part of staging memory; `view` is valid until `give`."""

    __slots__ = ("_arena", "_offset", "_staging", "view")

    def __init__(self, staging: Staging, arena: _Arena, offset: int, length: int) -> None:
        self._staging: Staging | None = staging
        self._arena, self._offset = arena, offset
        self.view = arena.memory[offset : offset + length]

    def give(self) -> None:
        """Return it; later calls do nothing."""
        staging, self._staging = self._staging, None
        if staging is not None:
            staging.take_back(self._arena, self._offset, len(self.view))


class Staging:
    """Arenas that many threads take slots from."""

    def __init__(
        self,
        capacity_bytes: int,
        limit_bytes: int | None = None,
        register: Callable[[memoryview], None] = lambda memory: None,
    ) -> None:
        """`limit_bytes` is what it may grow to (None: it does not grow); each arena is given to `register`. Raises
        OSError when the memory cannot be had."""
        capacity_bytes = staging_bytes(capacity_bytes)
        self.limit_bytes = max(capacity_bytes, limit_bytes or 0)
        self._register = register
        self._arenas = [_Arena(capacity_bytes)]
        self._changed = threading.Condition()
        self._growing = threading.Lock()
        self._closed = False
        register(self._arenas[0].memory)

    @property
    def capacity_bytes(self) -> int:
        """Of all arenas there are."""
        return sum(len(arena.memory) for arena in self._arenas)

    @property
    def free_bytes(self) -> int:
        return sum(arena.free.free_bytes for arena in self._arenas)

    def largest_bytes(self, shared: bool) -> int:
        """The largest block that a slot can hold, with the arenas there are and what they may still grow by."""
        arenas, total = self._arenas, self.capacity_bytes
        there = max(len(arena.memory) for arena in arenas)
        largest = max(min(there, total // 2) if shared else there, (self.limit_bytes - total) // GROW_BLOCKS)
        return largest - largest % STAGING_ALIGNMENT_BYTES

    def take(self, size_bytes: int, deadline_s: float, shared: bool = False) -> Slot | None:
        """A slot that holds `size_bytes`, padded to the alignment; None when there is none by the deadline, ever, or
        after `close`. With `shared`, half of all stays free for others."""
        length = staging_bytes(size_bytes)
        if not self._make_fit(length, shared):
            return None
        with self._changed:
            while not self._closed:
                slot = self._find(length, shared)
                if slot is not None:
                    return slot
                remaining_s = deadline_s - time.monotonic()
                if remaining_s <= 0 or not self._changed.wait(remaining_s):
                    return None
        return None

    def take_back(self, arena: _Arena, offset: int, length: int) -> None:
        """Called by `Slot.give`."""
        with self._changed:
            arena.free.give(offset, length)
            self._changed.notify_all()

    def close(self) -> None:
        """End every wait; slots that are out may still come back."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _find(self, length: int, shared: bool) -> Slot | None:
        if self.free_bytes < length + (self.capacity_bytes // 2 if shared else 0):
            return None
        for arena in self._arenas:
            if length <= len(arena.memory) and (offset := arena.free.take(length)) is not None:
                return Slot(self, arena, offset, length)
        return None

    def _fits(self, length: int, shared: bool) -> bool:
        capacity_bytes = self.capacity_bytes
        enough = length + (capacity_bytes // 2 if shared else 0) <= capacity_bytes
        return enough and any(length <= len(arena.memory) for arena in self._arenas)

    def _make_fit(self, length: int, shared: bool) -> bool:
        """Whether there can be a slot of this length, if need be in a new arena."""
        if self._fits(length, shared):
            return True
        with self._growing:
            if self._fits(length, shared):
                return True
            more_bytes = GROW_BLOCKS * length
            if self._closed or self.capacity_bytes + more_bytes > self.limit_bytes:
                return False
            try:
                arena = _Arena(more_bytes)
                self._register(arena.memory)
            except (OSError, MemoryError) as error:
                note_loss("staging", "grow", "no memory to stage blocks of %s: %s", format_bytes(length), error)
                return False
            with self._changed:
                self._arenas = [*self._arenas, arena]
                self._changed.notify_all()
            total = format_bytes(self.capacity_bytes)
            log.warning("staging memory grew to %s for blocks of %s", total, format_bytes(length))
            return True
