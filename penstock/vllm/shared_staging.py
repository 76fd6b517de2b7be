"""Staging memory (L2) that an engine's workers map too, and the pool as used with it."""

from __future__ import annotations

import logging

from penstock.core.keys import BlockKey
from penstock.engine.executors import Staging
from penstock.pool.api import Lease
from penstock.pool.wrapped import WrappedPool

log = logging.getLogger(__name__)

SPARE_SLOTS = 4  # replace slots whose memory a device still holds


class LeaselessPool(WrappedPool):
    """A pool that never lends blocks in place: workers in other processes could not see them."""

    def lease(self, key: BlockKey) -> Lease | None:
        """Always None: every block is read into staging memory."""
        return None


class SharedStaging(Staging):
    """Slots in memory that workers map too. A slot whose memory a device still holds moves to a spare one; without a
    free spare it is out of use."""

    def __init__(self, memory: memoryview, slot_bytes: int, slots: int) -> None:
        """`memory` has `slots + SPARE_SLOTS` slots."""
        super().__init__(memory, slot_bytes)
        self._all, self._slot_size = memory, slot_bytes
        self._places = list(range(slots))
        self._spares = list(range(slots, slots + SPARE_SLOTS))
        self._dead: dict[int, memoryview] = {}

    def place(self, slot: int) -> int | None:
        """Index of the slot's memory; None: out of use."""
        return None if slot in self._dead else self._places[slot]

    def slot(self, slot: int) -> memoryview:
        """The slot's current memory."""
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
