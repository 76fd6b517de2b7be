"""A pool member on a slab file or block device: a block engine driven by one worker thread, with a durable table."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from penstock.core.keys import BlockKey
from penstock.core.layout import STAGING_ALIGNMENT_BYTES
from penstock.io.api import BlockEngine, IoOp
from penstock.io.memory import aligned_buffer
from penstock.pool.api import PoolError
from penstock.pool.checksum import block_checksum
from penstock.pool.journal import HEADER_BYTES, Journal, read_header
from penstock.pool.table import Block
from penstock.pool.work import Work, WorkQueue

log = logging.getLogger(__name__)

LOADS_MAX = 4096
STORES_MAX = 256
POLL_S = 0.0005  # while operations are in flight and more may come; the engine has no way to be woken
POLL_FULL_S = 0.01  # while the engine is full
CONSECUTIVE_ERRORS_MAX = 3
LOCK_WAIT_S = 1.0  # the kernel drops the lock of a process that was killed only once its ring is torn down
STUCK_S = 10.0  # an operation that the device keeps longer fences the member


class SlabMember:
    """A slab as a member of the pool. The engine belongs to the worker thread once `start` was called."""

    def __init__(self, name: str, path: Path, engine: BlockEngine, journal: Journal) -> None:
        self.name = name
        self.kind = engine.name
        self.path = path
        self.capacity_bytes = engine.capacity_bytes
        self.start_offset = HEADER_BYTES
        self.notes = [*getattr(engine, "notes", []), *journal.notes]
        self.read_bytes = self.written_bytes = self.errors = 0
        self.fenced: str | None = None
        self._engine = engine
        self._journal = journal
        self._queue = WorkQueue(LOADS_MAX, STORES_MAX)
        self._stores_in_flight = 0
        self._stores_depth = max(1, engine.depth // 4)
        self._submitted: dict[Work, float] = {}
        self._in_a_row = 0
        self._to_register: list[memoryview] = []
        self._thread = threading.Thread(target=self._run, name=f"penstock-{name}", daemon=True)
        self._close_deadline_s = 0.0
        journal.on_commit = self._queue.kick

    @property
    def barrier(self) -> int:
        """What a store into an extent reserved now must wait for."""
        return self._journal.sequence

    @property
    def refuses_stores(self) -> str | None:
        """Why nothing can be stored here at present; None when it can."""
        return self.fenced or self._journal.failed

    def start(self) -> None:
        self._thread.start()

    def put(self, work: Work) -> PoolError | None:
        refused = self.refuses_stores if work.kind == "store" else self.fenced
        return PoolError("device", refused) if refused else self._queue.put(work)

    def register(self, buffer: memoryview) -> None:
        """Pin the buffer for the engine; done by the worker before its next operation."""
        self._to_register.append(buffer)
        self._queue.kick()

    def rows(self) -> list[tuple[Block, int]]:
        """Blocks that survived a restart, with their last use."""
        return self._journal.rows()

    def forget(self, blocks: Iterable[Block]) -> None:
        self._journal.forget(blocks)

    def record(self, block: Block, use: int) -> None:
        self._journal.record(block, use)

    def used(self, uses: Iterable[tuple[BlockKey, int]]) -> None:
        self._journal.used(uses)

    def spare(self) -> tuple[int, int] | None:
        """A free range `(offset, length)` to measure in; None when the slab is nearly full."""
        at = self.start_offset
        for offset, size in sorted((block.offset, block.extent_bytes) for block, _ in self.rows()):
            if offset - at >= 8 << 20:
                break
            at = max(at, offset + size)
        else:
            return (at, self.capacity_bytes - at) if self.capacity_bytes - at >= 8 << 20 else None
        return at, offset - at

    def measure_bytes_per_s(self, budget_s: float, spare: tuple[int, int] | None = None) -> float:
        """Read bandwidth over at most about `budget_s`; before `start`. `spare` is a free `(offset, length)` that is
        written first, because a device answers reads of never-written space without touching its medium."""
        piece = 2 << 20
        begin_at, length = spare or (HEADER_BYTES, self.capacity_bytes - HEADER_BYTES)
        count = min(16, length // piece)
        if count == 0:
            return 1.0e9
        memory = aligned_buffer(count * piece)
        pieces = [(begin_at + i * piece, memory[i * piece : (i + 1) * piece]) for i in range(count)]
        if spare:
            self._time_pieces("write", pieces, budget_s / 2)
        moved, elapsed_s = self._time_pieces("read", pieces, budget_s / 2)
        return max(moved, 1) / max(elapsed_s, 1e-9)

    def _time_pieces(self, kind: str, pieces: list[tuple[int, memoryview]], budget_s: float) -> tuple[int, float]:
        begin_s = time.perf_counter()
        moved = 0
        depth = min(4, self._engine.depth)
        waiting = list(reversed(pieces))
        while waiting or self._engine.in_flight():
            while waiting and self._engine.in_flight() < depth:
                offset, view = waiting.pop()
                op = IoOp("write" if kind == "write" else "read", offset, view, len(view))
                self._engine.submit([op])
            for completion in self._engine.poll(1.0):
                moved += 0 if completion.error else completion.tag
            if time.perf_counter() - begin_s > budget_s:
                waiting.clear()
        return moved, time.perf_counter() - begin_s

    def close(self, timeout_s: float) -> None:
        """End what waits as "closed", wait for the device, commit the table."""
        self._close_deadline_s = time.monotonic() + timeout_s
        self._queue.close()
        if self._thread.is_alive():
            self._thread.join(timeout_s + 1.0)
        try:
            self._engine.close(max(0.0, self._close_deadline_s - time.monotonic()))
        except TimeoutError as error:
            log.error("%s: %s; its buffers must not be used again", self.name, error)
        self._journal.close()

    def _run(self) -> None:
        try:
            while not self._queue.closed:
                self._step()
            while self._submitted and time.monotonic() < self._close_deadline_s:
                self._collect(POLL_FULL_S)
        except Exception:
            log.exception("worker of %s failed", self.name)
            self.fenced = f"the worker of {self.name} failed"
            self._queue.close()
        for rest in (*self._queue.drain(), *self._submitted):
            rest.finish(rest, PoolError("closed", "the pool is closing"))

    def _step(self) -> None:
        while self._to_register:
            self._engine.register(self._to_register.pop())
        for late in self._queue.expired():
            late.finish(late, PoolError("deadline", f"waited too long for {self.name}"))
        if self._journal.failed:
            for store in self._queue.drain("store"):
                store.finish(store, PoolError("device", self._journal.failed or "rows could not be committed"))
        full = self._submit_waiting()
        if self._submitted:
            self._collect(POLL_FULL_S if full else POLL_S)
            self._check_stuck()
        else:
            self._queue.wait()

    def _submit_waiting(self) -> bool:
        """Hand work to the engine, loads first; True when the engine has no room for more."""
        while len(self._submitted) < self._engine.depth:
            work = self._queue.take_load()
            if work is None and self._stores_in_flight < self._stores_depth:
                work = self._queue.take_store(self._journal.committed)
            if work is None:
                return False
            self._submit(work)
        return True

    def _submit(self, work: Work) -> None:
        if self.fenced:
            work.finish(work, PoolError("device", self.fenced))
            return
        if work.deadline_s <= time.monotonic():
            work.finish(work, PoolError("deadline", f"waited too long for {self.name}"))
            return
        block = work.block
        try:
            if work.kind == "store":
                block.checksum = block_checksum(block.key, work.buffer[: block.size_bytes])
            op = IoOp("read" if work.kind == "load" else "write", block.offset, work.buffer[: block.extent_bytes], work)
            if len(op.buffer) != block.extent_bytes:
                raise ValueError(f"the buffer has {len(op.buffer)} bytes, the extent {block.extent_bytes}")
            self._engine.submit([op])
        except (ValueError, TypeError) as error:
            work.finish(work, PoolError("layout", str(error)))
            return
        except OSError as error:
            self._failed(work, error)
            return
        self._submitted[work] = time.monotonic()
        self._stores_in_flight += work.kind == "store"

    def _collect(self, timeout_s: float) -> None:
        for completion in self._engine.poll(timeout_s):
            work: Work = completion.tag
            del self._submitted[work]
            self._stores_in_flight -= work.kind == "store"
            if completion.error is not None:
                self._failed(work, completion.error)
                continue
            self._in_a_row = 0
            if work.kind == "load":
                self.read_bytes += work.block.extent_bytes
            else:
                self.written_bytes += work.block.extent_bytes
            work.finish(work, None)

    def _failed(self, work: Work, error: OSError) -> None:
        self.errors += 1
        self._in_a_row += 1
        if self._in_a_row >= CONSECUTIVE_ERRORS_MAX and self.fenced is None:
            self.fenced = f"{self.name} ({self.path}) failed {self._in_a_row} times in a row, last with: {error}"
            log.error("%s; it is not used any more", self.fenced)
        work.finish(work, PoolError("device", f"{work.kind} on {self.name}: {error}"))

    def _check_stuck(self) -> None:
        if self.fenced is None and self._submitted:
            oldest_s = next(iter(self._submitted.values()))
            if time.monotonic() - oldest_s > STUCK_S:
                self.fenced = f"{self.name} ({self.path}) has not answered for {STUCK_S:.0f} s"
                log.error("%s; it is not used any more", self.fenced)


def open_slab_member(name: str, path: Path, capacity_bytes: int, table: Path | None, depth: int) -> SlabMember:
    """Open a slab with the blocks it holds. The table lies beside the slab (`PATH.db`) unless `table` says otherwise.

    Raises OSError (in use, no permission, disk full, not a slab, other format) or ValueError with path and reason.
    """
    from penstock.io.open import open_engine

    capacity_bytes -= capacity_bytes % STAGING_ALIGNMENT_BYTES
    if capacity_bytes < 2 * HEADER_BYTES:
        raise ValueError(f"slab {path}: the size must be at least {2 * HEADER_BYTES} bytes")
    table = table or path.with_name(path.name + ".db")
    read_header(path)  # refuse foreign content before the engine gives the file its space
    slab_bytes = path.stat().st_size if path.is_file() else capacity_bytes if path.exists() else 0
    patience_s = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            engine = open_engine(path, capacity_bytes, depth)
            break
        except BlockingIOError:
            if time.monotonic() > patience_s:
                raise
            time.sleep(0.02)
    try:
        return SlabMember(name, path, engine, Journal(path, table, slab_bytes))
    except BaseException:
        with contextlib.suppress(TimeoutError):
            engine.close(1.0)
        raise
