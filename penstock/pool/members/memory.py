"""A pool member in host memory: one page-aligned mapping, copied into and out of by one worker thread."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import numpy as np

from penstock.core.keys import BlockKey
from penstock.core.layout import STAGING_ALIGNMENT_BYTES, staging_bytes
from penstock.io.memory import aligned_buffer
from penstock.io.numa import bind_memory, check_node, stay_on_node
from penstock.pacing import PaceClock
from penstock.pool.api import Done, PoolError
from penstock.pool.block import Block
from penstock.pool.checksum import block_checksum
from penstock.pool.members.member import TakeUses
from penstock.pool.members.stored_rows import StoredRows, packed
from penstock.pool.members.work import Work, WorkQueue, finish_work
from penstock.process.guarded_thread import GuardedThread, count_failure
from penstock.units import format_bytes

log = logging.getLogger(__name__)

LOADS_MAX = 4096
STORES_MAX = 256
MEASURE_BYTES = 64 << 20  # larger than the processor's caches
OBSERVED_BYTES_MIN = 128 << 10  # the time of a smaller load does not depend on its bytes
HELD_COPY_BYTES = 64 << 10
AT_ONCE_BYTES = 1 << 20  # of stores on their caller's thread
CATCH_UP_S = 0.005  # how much delay a paced copy that woke up late may catch up


def copy_bytes(into: memoryview, data: memoryview) -> None:
    """Copy equal lengths; without holding the GIL where the copy takes longer than to get it back."""
    if len(into) <= HELD_COPY_BYTES:
        into[:] = data
        return
    np.copyto(np.frombuffer(into, np.uint8), np.frombuffer(data, np.uint8))


class MemoryMember:
    """Host memory as a member of the pool."""

    kind = "memory"
    durable = False
    barrier = 0
    refuses_stores = None

    def __init__(
        self,
        name: str,
        capacity_bytes: int,
        numa_node: int | None = None,
        pace_bytes_per_s: float | None = None,
        clock: PaceClock | None = None,
    ) -> None:
        """`numa_node` binds memory and worker thread to a NUMA node. `pace_bytes_per_s` emulates slower memory, which
        then cannot be read in place; members that share a `clock` take turns.

        Raises ValueError for less than one page or an unknown NUMA node, OSError when the memory cannot be
        allocated."""
        capacity_bytes -= capacity_bytes % STAGING_ALIGNMENT_BYTES
        if capacity_bytes < STAGING_ALIGNMENT_BYTES:
            raise ValueError(f"memory member {name}: the size must be at least {STAGING_ALIGNMENT_BYTES} bytes")
        if numa_node is not None:
            try:
                check_node(numa_node, capacity_bytes)
            except ValueError as error:
                raise ValueError(f"memory member {name}: {error}") from None
        self.name = name
        self.capacity_bytes = capacity_bytes
        self.start_offset = 0
        try:
            self.memory = aligned_buffer(capacity_bytes)
        except OSError as error:
            raise OSError(
                f"memory member {name}: {format_bytes(capacity_bytes)} cannot be allocated: {error}"
            ) from error
        self.notes: list[str] = []
        self.numa_node = numa_node
        if numa_node is not None:
            self._bind(numa_node)
        self._pace_bytes_per_s = pace_bytes_per_s
        self._clock = clock or PaceClock()
        self._closing = threading.Event()
        self._touched = False
        self._observed = (0, 0.0)
        self._counting = threading.Lock()
        self.read_bytes = self.written_bytes = self.errors = 0
        self._queue = WorkQueue(LOADS_MAX, STORES_MAX)
        self._thread = GuardedThread(f"penstock-{name}", self._run, restarts=True, kind="penstock-memory-member")

    def start(self) -> None:
        """Start the worker thread."""
        self._thread.start()

    def put(self, work: Work) -> PoolError | None:
        """Queue a copy; returns at once. The error says why it was not accepted."""
        return self._queue.put(work)

    def store_at_once(self, stores: Sequence[tuple[Block, memoryview]]) -> list[PoolError | None] | None:
        """Copy small blocks in on this thread: that costs less than to queue them. None: they must be queued."""
        if self._pace_bytes_per_s or sum(block.size_bytes for block, _ in stores) > AT_ONCE_BYTES:
            return None
        return [self._stored(block, data) for block, data in stores]

    def queued(self) -> tuple[int, int]:
        """Loads and stores that wait."""
        return self._queue.lengths()

    def observed(self) -> tuple[int, float]:
        """Bytes of larger loads, and the time that copying them took; both cumulative."""
        return self._observed

    def view(self, block: Block) -> memoryview | None:
        """The block's bytes in place; None for paced memory, which must be read."""
        if self._pace_bytes_per_s:
            return None
        return self._bytes_of(block)

    def _bytes_of(self, block: Block) -> memoryview:
        return self.memory[block.offset : block.offset + block.size_bytes]

    def register(self, buffer: memoryview) -> None:
        """Do nothing: copies need no registration."""

    def rows(self) -> StoredRows:
        """Rows of blocks that survived a restart: none."""
        return packed([])

    def forget(self, keys: Iterable[BlockKey]) -> None:
        """Nothing is durable here."""

    def on_lost(self, lost: Callable[[Block], None]) -> None:
        """Nothing is durable here."""

    def record(self, block: Block, use: float, done: Done, deadline_s: float) -> None:
        """Nothing is durable here."""

    def confirm(self, block: Block, done: Done, deadline_s: float) -> bool:
        """Nothing is durable here."""
        return False

    def on_flush(self, take_uses: TakeUses) -> None:
        """Nothing is durable here."""

    def measure(self, direction: Literal["read", "write"], block_bytes: int, budget_s: float) -> float:
        """Bytes per second of copies of `block_bytes` out of this member or into it, over about `budget_s`; before
        `start`, when all of it is free."""
        piece = min(self.capacity_bytes, staging_bytes(block_bytes))
        span = max(1, min(self.capacity_bytes, MEASURE_BYTES) // piece) * piece
        if not self._touched:  # reads of memory never written all read one zero page
            self.memory[:span] = bytes(span)
            self._touched = True
        host = aligned_buffer(piece)
        copy_bytes(host, self.memory[:piece])
        begin_s = now_s = time.monotonic()
        moved = 0
        while now_s - begin_s < budget_s or moved == 0:
            here = self.memory[moved % span : moved % span + piece]
            copy_bytes(host, here) if direction == "read" else copy_bytes(here, host)
            self._take_turn(piece, now_s)
            moved += piece
            now_s = time.monotonic()
        return moved / max(now_s - begin_s, 1e-9)

    def close(self, timeout_s: float) -> None:
        """End what waits with "closed" and stop the worker."""
        self._closing.set()
        self._queue.close()
        self._thread.join(timeout_s)
        if not self._thread.alive:
            self._end_rest()

    def _bind(self, node: int) -> None:
        note = bind_memory(self.memory, node)
        if note:
            self.notes.append(f"{self.name}: {note}; it lies where the kernel puts it")

    def _run(self) -> None:
        if self.numa_node is not None and (note := stay_on_node(self.numa_node)):
            log.warning("%s: %s", self.name, note)
        while not self._queue.closed:
            for late in self._queue.expired():
                finish_work(late, PoolError("deadline", f"waited too long for {self.name}"))
            for one in self._queue.displaced():
                finish_work(one, PoolError("dropped", f"displaced: others have less work queued for {self.name}"))
            work = self._queue.take_load() or self._queue.take_store(0)
            if work is None:
                self._queue.wait()
            elif work.deadline_s <= time.monotonic():
                finish_work(work, PoolError("deadline", f"waited too long for {self.name}"))
            else:
                finish_work(work, self._outcome(work))
        self._end_rest()

    def _end_rest(self) -> None:
        for rest in self._queue.drain():
            finish_work(rest, PoolError("closed", "the pool is closing"))

    def _outcome(self, work: Work) -> PoolError | None:
        """Do the work; returns its error, also for an exception."""
        try:
            return self._do(work)
        except Exception as problem:
            self.errors += 1
            count_failure("penstock-memory-member")
            log.exception("a %s on %s failed", work.kind, self.name)
            return PoolError("device", f"{work.kind} on {self.name}: {problem!r}")

    def _do(self, work: Work) -> PoolError | None:
        block, error = work.block, None
        size = block.size_bytes
        begin_s = time.monotonic()
        if work.kind == "store":
            error = self._stored(block, work.buffer)
        else:
            try:
                copy_bytes(work.buffer[:size], self._bytes_of(block))
                self.read_bytes += size
            except (ValueError, TypeError) as problem:  # a buffer that is too short or read-only
                error = PoolError("layout", f"the buffer does not fit the block: {problem}")
        if error is None:
            self._take_turn(size, begin_s)
        if work.kind == "load" and error is None and size >= OBSERVED_BYTES_MIN:
            moved, busy_s = self._observed
            self._observed = (moved + size, busy_s + time.monotonic() - begin_s)
        return error

    def _stored(self, block: Block, data: memoryview) -> PoolError | None:
        """Copy a block in; returns its error."""
        here, size = self._bytes_of(block), block.size_bytes
        try:
            copy_bytes(here, data[:size])
            block.checksum = block_checksum(block.key, here)
        except (ValueError, TypeError) as problem:  # a buffer that is too short
            return PoolError("layout", f"the buffer does not fit the block: {problem}")
        with self._counting:
            self.written_bytes += size
        return None

    def _take_turn(self, size_bytes: int, begin_s: float) -> None:
        """Wait until paced memory would have finished a copy of `size_bytes` that began at `begin_s`."""
        if self._pace_bytes_per_s:
            due_s = self._clock.turn(size_bytes / self._pace_bytes_per_s, begin_s - CATCH_UP_S)
            self._closing.wait(max(0.0, due_s - time.monotonic()))
