"""Staging memory (L2) that the workers of an engine map too, and the pool as seen from it."""

from __future__ import annotations

import logging

from penstock.core.keys import BlockKey
from penstock.engine.executors import Staging
from penstock.pool.api import Lease
from penstock.pool.wrapped import WrappedPool

log = logging.getLogger(__name__)

SPARE_SLOTS = 4  # stand in for slots whose memory a device still holds


class Unleased(WrappedPool):
    """The pool without blocks in place: workers of other processes cannot see them."""

    def lease(self, key: BlockKey) -> Lease | None:
        """None: every block is read into staging memory."""
        return None


class SharedStaging(Staging):
    """Slots in memory that workers map too, so a slot whose memory a device still holds moves to a spare one; when
    there is none left, it is out of use."""

    def __init__(self, memory: memoryview, slot_bytes: int, slots: int) -> None:
        """`memory` is of `slots + SPARE_SLOTS` slots."""
        super().__init__(memory, slot_bytes)
        self._all, self._slot_size = memory, slot_bytes
        self._places = list(range(slots))
        self._spares = list(range(slots, slots + SPARE_SLOTS))
        self._dead: dict[int, memoryview] = {}

    def place(self, slot: int) -> int | None:
        """Where in the memory the slot is; None: out of use."""
        return None if slot in self._dead else self._places[slot]

    def slot(self, slot: int) -> memoryview:
        """Memory of a slot, where it is now."""
        if slot in self._dead:
            return self._dead[slot]
        begin = self._places[slot] * self._slot_size
        return self._all[begin : begin + self._slot_size]

    def replace(self, slot: int) -> None:
        """Give a slot other memory, because a device may still write to the old one."""
        if self._spares:
            self._places[slot] = self._spares.pop()
            return
        log.error("a device never ended a transfer and all %d spare slots are used; one slot is lost", SPARE_SLOTS)
        self._dead[slot] = memoryview(bytearray(self._slot_size))
