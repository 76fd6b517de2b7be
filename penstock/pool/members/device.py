"""A pool member on any block engine: driven by one worker thread, with a durable table beside it."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal

from penstock.core.bandwidth import BusyMeter
from penstock.core.keys import BlockKey
from penstock.core.layout import STAGING_ALIGNMENT_BYTES, staging_bytes
from penstock.io.api import BlockEngine, IoCompletion, IoOp
from penstock.io.paced import PacedEngine
from penstock.pool.api import Done, PoolError
from penstock.pool.block import Block
from penstock.pool.checksum import block_checksum
from penstock.pool.members.free_pieces import MEASURE_BYTES, FreePieces
from penstock.pool.members.header import HEADER_BYTES, pack_header, refuse_foreign_file
from penstock.pool.members.journal import Journal
from penstock.pool.members.member import TakeUses
from penstock.pool.members.pairing import default_table, folders_of, refuse_dangling_link
from penstock.pool.members.probe import Probe
from penstock.pool.members.stored_rows import StoredRows, ends_of
from penstock.pool.members.work import EXPIRY_CHECK_S, Work, WorkQueue, finish_work
from penstock.private_file import open_stored
from penstock.process.guarded_thread import GuardedThread

log = logging.getLogger(__name__)

LOADS_MAX = 4096
STORES_MAX = 256
LOADS_TOGETHER = 8  # given to the engine at once: few system calls, and the device does not wait for all of them
POLL_S = 0.01  # `put` and commits end a poll early
CONSECUTIVE_ERRORS_MAX = 3
LOCK_WAIT_S = 1.0  # of a killed process, whose lock the kernel releases only with its io_uring
JOURNAL_CLOSE_S = 10.0  # for the last commit, even when less time is left
STUCK_S = 10.0  # an operation that takes longer fences the member


class DeviceMember:
    """A slab file, block device or drive as a member of the pool. The engine belongs to the worker thread once `start`
    was called; the journal's thread uses its `sync`."""

    durable = True

    def __init__(self, name: str, where: str, engine: BlockEngine, journal: Journal) -> None:
        self.name = name
        self.kind = engine.name
        self.where = where
        self.capacity_bytes = engine.capacity_bytes
        self.start_offset = HEADER_BYTES
        self.notes = [*engine.notes, *journal.notes]
        self.read_bytes = self.written_bytes = self.errors = 0
        self.fenced: str | None = None
        self._engine = engine
        self._journal = journal
        self._queue = WorkQueue(LOADS_MAX, STORES_MAX)
        self._stores_in_flight = 0
        self._stores_depth = max(1, engine.depth // 4)
        self._submitted: dict[Work, float] = {}
        self._in_a_row = 0
        self._polling = False
        self._measured: FreePieces | None = None
        self._meter = BusyMeter(busy_from=2, failed_time=True)
        self._probe = Probe(pack_header(journal.identity))
        self._to_register: list[memoryview] = []
        self._completions: deque[IoCompletion] = deque()  # of the last poll, not processed yet
        self._thread = GuardedThread(
            f"penstock-{name}", self._run, failed=self._broke, restarts=True, kind="penstock-device-member"
        )
        self._close_deadline_s = 0.0
        journal.on_commit = self._wake
        journal.on_their_way = lambda: self._stores_in_flight + self._queue.lengths()[1]

    @property
    def barrier(self) -> int:
        """The journal's sequence number that a store into an extent reserved now must wait for."""
        return self._journal.sequence

    @property
    def refuses_stores(self) -> str | None:
        """Why nothing can be stored here at present; None when it can."""
        return self.fenced or self._journal.failed

    def on_lost(self, lost: Callable[[Block], None]) -> None:
        """Set the callback for a stored block whose row could not be committed (called on the journal's thread)."""
        self._journal.on_lost = lost

    def start(self) -> None:
        """Start the worker thread, which owns the engine from now on."""
        self._measured = None
        self._journal.let_go()
        self._thread.start()

    def put(self, work: Work) -> PoolError | None:
        """Queue an operation; returns at once. The error says why it was not accepted, and its end is then not
        called."""
        refused = self.refuses_stores if work.kind == "store" else self.fenced
        if refused:
            return PoolError("device", refused)
        error = self._queue.put(work)
        if error is None and self._polling:
            self._engine.wake()
        return error

    def queued(self) -> tuple[int, int]:
        """Loads and stores that wait in front of the device."""
        return self._queue.lengths()

    def observed(self) -> tuple[int, float]:
        """Bytes read, and the time it took, while at least two reads were in the device; both cumulative."""
        return self._meter.observed(time.monotonic())

    def register(self, buffer: memoryview) -> None:
        """Pin the buffer for the engine; done by the worker before its next operation."""
        self._to_register.append(buffer)
        self._wake()

    def rows(self) -> StoredRows:
        """The rows of blocks that survived a restart; before `start`."""
        return self._journal.rows()

    def forget(self, keys: Iterable[BlockKey]) -> None:
        """Delete the rows of blocks that left the table; a row that is not committed yet is never written."""
        self._journal.forget(keys)

    def record(self, block: Block, use: float, done: Done, deadline_s: float) -> None:
        """Commit the row of a stored block that is in the table: `done` is called once, with None when it is
        durable."""
        self._journal.record(block, use, done, deadline_s)

    def confirm(self, block: Block, done: Done, deadline_s: float) -> bool:
        """Call `done` once a block in the table is durable; False, without a call, when it is durable already."""
        return self._journal.confirm(block, done, deadline_s)

    def on_flush(self, take_uses: TakeUses) -> None:
        """Set what gives the uses of blocks (called on the journal's thread), to be committed with their rows."""
        self._journal.take_uses = take_uses

    def measure(self, direction: Literal["read", "write"], block_bytes: int, budget_s: float) -> float:
        """Bytes per second of blocks of `block_bytes` over about `budget_s`, in free space only; before `start`. Reads
        read what was written before, because a device answers reads of never-written space without
        using its medium; where no space is free, they read the blocks that are present.

        Raises PoolError ("full": no free space to write to; "device").
        """
        piece = staging_bytes(block_bytes)
        free = self._free_range(piece)
        if direction == "read" and free[1] < piece:
            everything = (self.start_offset, self.capacity_bytes - self.start_offset)
            return FreePieces(self._engine, self.name, everything, min(piece, everything[1])).move("read", budget_s)
        if self._measured is None or self._measured.piece_bytes != piece:
            self._measured = FreePieces(self._engine, self.name, free, piece)
            if direction == "read":
                self._measured.move("write", budget_s / 2)
        return self._measured.move(direction, budget_s)

    def _free_range(self, piece: int) -> tuple[int, int]:
        """The first free `(offset, length)` of `MEASURE_BYTES`, else the longest one."""
        best, at = (0, 0), self.start_offset
        rows = self.rows()
        extents = sorted(zip(rows["offset"].tolist(), ends_of(rows).tolist(), strict=True))
        for offset, end in (*extents, (self.capacity_bytes, self.capacity_bytes)):
            if offset - at > best[1]:
                best = (at, offset - at)
            if best[1] >= max(MEASURE_BYTES, piece):
                break
            at = max(at, end)
        return best

    def close(self, timeout_s: float) -> None:
        """End what waits with "closed", wait for the device, commit the table."""
        self._close_deadline_s = time.monotonic() + timeout_s
        self._queue.close()
        self._wake()
        self._thread.join(timeout_s + 1.0)
        if not self._thread.alive:
            self._end_rest()
        if not self._journal.close(max(JOURNAL_CLOSE_S, self._close_deadline_s - time.monotonic())):
            return  # the journal still uses the engine
        try:
            self._engine.close(max(0.0, self._close_deadline_s - time.monotonic()))
        except TimeoutError as error:
            log.error("%s: %s; its buffers must not be used again", self.name, error)

    # --- the worker ---

    def _wake(self) -> None:
        self._queue.kick()
        if self._polling:
            self._engine.wake()

    def _run(self) -> None:
        """Called again after it raised, with the member fenced: operations in flight must still be collected."""
        self._polling = False
        while not self._queue.closed:
            self._step()
        while self._submitted and time.monotonic() < self._close_deadline_s:
            self._collect(POLL_S)
        self._end_rest()

    def _broke(self, error: Exception) -> None:
        """The loop raised. Queued work ends with that error; operations in flight end when the device answers."""
        self._fence(f"failed: {error!r}")
        for work in self._queue.drain():
            finish_work(work, PoolError("device", self.fenced or f"{self.name} failed"))

    def _end_rest(self) -> None:
        rest, self._submitted = [*self._queue.drain(), *self._submitted], {}
        for work in rest:
            finish_work(work, PoolError("closed", "the pool is closing"))

    def _step(self) -> None:
        while self._to_register:
            self._register(self._to_register.pop())
        for late in self._queue.expired():
            finish_work(late, PoolError("deadline", f"waited too long for {self.name}"))
        for one in self._queue.displaced():
            finish_work(one, PoolError("dropped", f"displaced: others have less work queued for {self.name}"))
        self._journal.expire()
        if self._journal.failed:
            for store in self._queue.drain("store"):
                finish_work(store, PoolError("device", self._journal.failed or "rows could not be committed"))
        if self.fenced:
            self._try_again()
        full = self._submit_waiting()
        if not self._submitted:
            self._queue.wait(EXPIRY_CHECK_S if self._journal.waiting else 1.0)
            return
        self._polling = not full  # from here on `put` wakes the engine
        self._collect(POLL_S if full or not self._can_submit() else 0.0)
        self._polling = False
        self._check_stuck()

    def _register(self, buffer: memoryview) -> None:
        """Register a buffer with the engine; when that fails, the buffer is used all the same (contract: `io.api`)."""
        try:
            self._engine.register(buffer)
        except OSError as error:
            log.warning("%s: a buffer of %d bytes could not be registered: %s", self.name, len(buffer), error)

    def _can_submit(self) -> bool:
        more_stores = self._stores_in_flight < self._stores_depth
        return bool(self._to_register) or self._queue.ready(self._journal.committed, more_stores)

    def _submit_waiting(self) -> bool:
        """Submit queued work to the engine, loads first; True when the engine has no room for more."""
        while (room := self._engine.depth - len(self._submitted)) > 0:
            works = self._queue.take_loads(min(room, LOADS_TOGETHER))
            if not works and self._stores_in_flight < self._stores_depth:
                store = self._queue.take_store(self._journal.committed)
                works = [store] if store is not None else []
            if not works:
                return False
            self._submit(works)
        return True

    def _submit(self, works: Sequence[Work]) -> None:
        """Submit work together; what cannot be submitted ends. After an exception all of it has ended."""
        now_s = time.monotonic()
        left = list(works)  # neither in the engine nor ended
        try:
            ops: list[IoOp] = []
            for work in works:
                op = self._op(work, now_s)
                if isinstance(op, IoOp):
                    ops.append(op)
                else:
                    left.remove(work)
                    finish_work(work, op)
            if ops:
                self._submit_ops(ops, left, now_s)
        except Exception as error:
            for work in left:
                finish_work(work, PoolError("device", f"{work.kind} on {self.name}: {error!r}"))
            raise

    def _op(self, work: Work, now_s: float) -> IoOp | PoolError:
        """The engine's operation for this work, or why there is none."""
        if self.fenced and not self._probe.owns(work):
            return PoolError("device", self.fenced)
        if work.deadline_s <= now_s:
            return PoolError("deadline", f"waited too long for {self.name}")
        block = work.block
        try:
            data = work.buffer[: block.extent_bytes]
            if work.kind == "store":
                block.checksum = block_checksum(block.key, work.buffer[: block.size_bytes])
            if len(data) != block.extent_bytes:
                raise ValueError(f"the buffer has {len(data)} bytes, the extent {block.extent_bytes}")
        except (ValueError, TypeError) as error:
            return PoolError("layout", str(error))
        return IoOp("read" if work.kind == "load" else "write", block.offset, data, work)

    def _submit_ops(self, ops: Sequence[IoOp], left: list[Work], now_s: float) -> None:
        """Submit operations; removes from `left` the work of those that the engine has, and of those that ended."""
        try:
            self._engine.submit(ops)
        except (ValueError, TypeError) as error:
            if len(ops) > 1:  # none was submitted: the engine does not say which is wrong
                for op in ops:
                    self._submit_ops([op], left, now_s)
                return
            left.remove(ops[0].tag)
            finish_work(ops[0].tag, PoolError("layout", str(error)))
            return
        except OSError as error:
            for op in ops:
                left.remove(op.tag)
                self._failed(op.tag, error)
            return
        for op in ops:
            left.remove(op.tag)
            self._submitted[op.tag] = now_s
            if op.kind == "write":
                self._stores_in_flight += 1
            else:
                self._meter.started(now_s)

    def _collect(self, timeout_s: float) -> None:
        completions = self._engine.poll(timeout_s)
        reads = [c for c in completions if c.tag.kind == "load"]
        moved = sum(c.tag.block.extent_bytes for c in reads if c.error is None)
        self._meter.ended(len(reads), moved, time.monotonic())
        self.read_bytes += moved
        self._completions.extend(completions)
        while self._completions:
            completion = self._completions.popleft()
            try:
                self._completed(completion.tag, completion.error)
            except Exception as error:
                finish_work(completion.tag, PoolError("device", f"{self.name} failed: {error!r}"))
                raise

    def _completed(self, work: Work, error: OSError | None) -> None:
        del self._submitted[work]
        self._stores_in_flight -= work.kind == "store"
        if error is not None:
            self._failed(work, error)
            return
        self._in_a_row = 0
        if work.kind == "store":
            self.written_bytes += work.block.extent_bytes
        finish_work(work, None)

    def _failed(self, work: Work, error: OSError) -> None:
        self.errors += 1
        self._in_a_row += 1
        if self._in_a_row >= CONSECUTIVE_ERRORS_MAX:
            self._fence(f"failed {self._in_a_row} times in a row, last with: {error}")
        finish_work(work, PoolError("device", f"{work.kind} on {self.name}: {error}"))

    def _check_stuck(self) -> None:
        if self._is_stuck():
            self._fence(f"has not answered for {STUCK_S:.0f} s")

    def _is_stuck(self) -> bool:
        return bool(self._submitted) and time.monotonic() - next(iter(self._submitted.values())) > STUCK_S

    def _fence(self, why: str) -> None:
        if self.fenced is None:
            self.fenced = f"{self.name} ({self.where}) {why}"
            self._probe.fenced(time.monotonic())
            log.error("%s; it is not used until it answers again", self.fenced)

    def _try_again(self) -> None:
        """Read the first page from time to time; a device that returns the right one is used again."""
        now_s = time.monotonic()
        if self._probe.answered and not self._is_stuck():
            self._probe.unfenced(now_s)
            self._in_a_row = 0
            self.fenced = None
            log.warning("%s answers again and is used again", self.name)
        elif self._probe.due(now_s) and len(self._submitted) < self._engine.depth:
            self._submit([self._probe.work(now_s)])


def open_device_member(
    name: str,
    where: str,
    engine: BlockEngine,
    table: Path,
    data_bytes: int | None = None,
    folders: Sequence[Path] = (),
) -> DeviceMember:
    """A member on an open engine, with the blocks that it holds. It owns the engine; on failure the engine is closed.
    `table`, `data_bytes` and `folders` as in `pairing.open_pair`.

    Raises OSError (not a slab, other format, its table missing or not permitted, device error) with place and reason.
    """
    try:
        return DeviceMember(name, where, engine, Journal(where, table, engine, data_bytes, folders))
    except BaseException:
        with contextlib.suppress(TimeoutError):
            engine.close(1.0)
        raise


def open_slab_member(
    name: str,
    path: Path,
    capacity_bytes: int,
    table: Path | None,
    depth: int,
    pace_bytes_per_s: float | None = None,
) -> DeviceMember:
    """Open a slab file or block device with the blocks it holds. The table lies beside it (`PATH.db`) unless `table`
    says otherwise; one that was made for another name of the slab is found by its id. `pace_bytes_per_s` emulates a
    slower device.

    Raises OSError (in use, no permission, disk full, not a slab, other format) or ValueError with path and reason.
    """
    capacity_bytes -= capacity_bytes % STAGING_ALIGNMENT_BYTES
    if capacity_bytes < 2 * HEADER_BYTES:
        raise ValueError(f"slab {path}: the size must be at least {2 * HEADER_BYTES} bytes")
    refuse_dangling_link(path)
    refuse_foreign_file(path)
    data_bytes = _data_bytes(path)
    engine = open_engine_patiently(path, capacity_bytes, depth)
    paced = PacedEngine(engine, pace_bytes_per_s) if pace_bytes_per_s else engine
    expected = table or default_table(path)
    member = open_device_member(name, str(path), paced, expected, data_bytes, folders_of(path))
    if table is None and path.is_block_device():
        member.notes.append(
            f"the table {expected} is gone after a reboot, and {path} refused then; name a state folder"
        )
    return member


def _data_bytes(path: Path) -> int:
    """Length in bytes of a slab before it is opened; 0 where there is none."""
    if not os.path.exists(path):
        return 0
    with open_stored(path) as slab:
        return slab.seek(0, os.SEEK_END)


def open_engine_patiently(path: Path, capacity_bytes: int, depth: int, claims_space: bool = True) -> BlockEngine:
    """As `open_engine`, but waits up to LOCK_WAIT_S for the lock of a process that was killed."""
    from penstock.io.open import open_engine

    return patiently(lambda: open_engine(path, capacity_bytes, depth, claims_space=claims_space))


def patiently(open_it: Callable[[], BlockEngine]) -> BlockEngine:
    """The engine that `open_it` opens; tried again for LOCK_WAIT_S while the device is in use (BlockingIOError)."""
    patience_s = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            return open_it()
        except BlockingIOError:
            if time.monotonic() > patience_s:
                raise
            time.sleep(0.02)
