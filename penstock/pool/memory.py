"""A pool member in host memory: one page-aligned mapping, copied into and out of by one worker thread."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable

import numpy as np

from penstock.core.keys import BlockKey
from penstock.core.layout import STAGING_ALIGNMENT_BYTES
from penstock.io.memory import aligned_buffer
from penstock.pool.api import PoolError
from penstock.pool.checksum import block_checksum
from penstock.pool.table import Block
from penstock.pool.work import Work, WorkQueue
from penstock.units import format_bytes

log = logging.getLogger(__name__)

LOADS_MAX = 4096
STORES_MAX = 256


def copy_bytes(into: memoryview, data: memoryview) -> None:
    """Copy equal lengths without holding the GIL."""
    np.copyto(np.frombuffer(into, np.uint8), np.frombuffer(data, np.uint8))


class MemoryMember:
    """Host memory as a member of the pool."""

    kind = "memory"
    barrier = 0
    refuses_stores = None

    def __init__(self, name: str, capacity_bytes: int) -> None:
        """Raises ValueError for less than one page, OSError when the memory cannot be had."""
        capacity_bytes -= capacity_bytes % STAGING_ALIGNMENT_BYTES
        if capacity_bytes < STAGING_ALIGNMENT_BYTES:
            raise ValueError(f"memory member {name}: the size must be at least {STAGING_ALIGNMENT_BYTES} bytes")
        self.name = name
        self.capacity_bytes = capacity_bytes
        self.start_offset = 0
        try:
            self.memory = aligned_buffer(capacity_bytes)
        except OSError as error:
            raise OSError(f"memory member {name}: {format_bytes(capacity_bytes)} cannot be had: {error}") from error
        self.notes: list[str] = []
        self.read_bytes = self.written_bytes = self.errors = 0
        self._queue = WorkQueue(LOADS_MAX, STORES_MAX)
        self._thread = threading.Thread(target=self._run, name=f"penstock-{name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def put(self, work: Work) -> PoolError | None:
        return self._queue.put(work)

    def view(self, block: Block) -> memoryview:
        """The block in place."""
        return self.memory[block.offset : block.offset + block.size_bytes]

    def register(self, buffer: memoryview) -> None:
        """Nothing: copies need no registration."""

    def rows(self) -> list[tuple[Block, int]]:
        """Blocks that survived a restart: none."""
        return []

    def forget(self, blocks: Iterable[Block]) -> None:
        """Nothing is durable here."""

    def record(self, block: Block, use: int) -> None:
        """Nothing is durable here."""

    def used(self, uses: Iterable[tuple[BlockKey, int]]) -> None:
        """Nothing is durable here."""

    def measure_bytes_per_s(self, budget_s: float) -> float:
        """Bandwidth of copies out of this member, over at most `budget_s`."""
        piece = min(self.capacity_bytes, 4 << 20)
        span = min(self.capacity_bytes, 64 << 20) // piece * piece  # more than the processor's caches hold
        target = aligned_buffer(piece)
        for warm in (True, False):
            begin_s, moved = time.perf_counter(), 0
            for at in range(0, span, piece):
                source = self.memory[at : at + piece]
                copy_bytes(source, target) if warm else copy_bytes(target, source)
                moved += piece
                if time.perf_counter() - begin_s > budget_s / 2:
                    break
            span = moved
        return moved / max(time.perf_counter() - begin_s, 1e-9)

    def close(self, timeout_s: float) -> None:
        """End what waits as "closed" and stop the worker."""
        self._queue.close()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while not self._queue.closed:
            for late in self._queue.expired():
                late.finish(late, PoolError("deadline", f"waited too long for {self.name}"))
            work = self._queue.take_load() or self._queue.take_store(0)
            if work is None:
                self._queue.wait()
            elif work.deadline_s <= time.monotonic():
                work.finish(work, PoolError("deadline", f"waited too long for {self.name}"))
            else:
                self._do(work)
        for rest in self._queue.drain():
            rest.finish(rest, PoolError("closed", "the pool is closing"))

    def _do(self, work: Work) -> None:
        block, error = work.block, None
        size = block.size_bytes
        try:
            if work.kind == "load":
                copy_bytes(work.buffer[:size], self.view(block))
                self.read_bytes += size
            else:
                copy_bytes(self.view(block), work.buffer[:size])
                block.checksum = block_checksum(block.key, self.view(block))
                self.written_bytes += size
        except (ValueError, TypeError) as problem:  # a buffer that is too short or read-only
            error = PoolError("layout", f"the buffer does not fit the block: {problem}")
        work.finish(work, error)
