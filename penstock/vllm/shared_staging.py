"""Staging memory (L2) that an engine's workers map too, and the pool as used with it."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence

from penstock.core.keys import BlockKey
from penstock.core.layout import STAGING_ALIGNMENT_BYTES
from penstock.engine.executors import Staging
from penstock.io.numa import bind_memory
from penstock.pool.api import Lease
from penstock.pool.wrapped import WrappedPool

log = logging.getLogger(__name__)

SPARE_SLOTS = 4  # replace slots whose memory a device still holds
BINDINGS_MAX = 4096  # each is a mapping of its own for the kernel, which allows 65,530


def bind_parts(memory: memoryview, slot_bytes: int, parts: Sequence[tuple[int, int]]) -> None:
    """Let each worker's parts of fresh staging memory lie on the memory node of its device. `parts` are the node (-1:
    unknown) and the size of each worker's part of a slot, one behind the other."""
    for node, begin, end in node_ranges(len(memory), slot_bytes, parts):
        note = bind_memory(memory[begin:end], node, strict=False)
        if note is not None:
            log.warning("staging memory: %s; it lies where the kernel puts it", note)
            return


def node_ranges(size_bytes: int, slot_bytes: int, parts: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """Memory node, first byte and end of what `bind_parts` binds, in whole pages: all at once where the devices are
    attached to one node; nothing where that would take more than BINDINGS_MAX ranges."""
    nodes = {node for node, _ in parts}
    if len(nodes) == 1:
        (node,) = nodes
        return [] if node < 0 else [(node, 0, size_bytes)]
    ends = [0, *itertools.accumulate(size for _, size in parts)]
    cuts = [-(-end // STAGING_ALIGNMENT_BYTES) * STAGING_ALIGNMENT_BYTES for end in ends]
    runs: list[list[int]] = []  # neighbours on one node together
    for (node, _), begin, end in zip(parts, cuts, cuts[1:], strict=False):
        if runs and runs[-1][0] == node:
            runs[-1][2] = end
        else:
            runs.append([node, begin, end])
    runs = [run for run in runs if run[0] >= 0 and run[1] < run[2]]
    slots = range(0, size_bytes, slot_bytes)
    if len(slots) * len(runs) > BINDINGS_MAX:
        return []
    return [(node, slot + begin, slot + end) for slot in slots for node, begin, end in runs]


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
