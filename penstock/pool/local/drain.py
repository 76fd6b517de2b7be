"""Empties one member while the pool runs: copies its blocks to the free space of the others, then closes it.

DRAIN-1  Statement: Loads of requests go first: a copy starts when no load waits for the member, or after PATIENCE_S.
DRAIN-2  Statement: At most IN_FLIGHT_MAX blocks are being copied, in as many buffers.
DRAIN-3  Statement: A copy replaces its block only after its bytes matched the block's checksum and were stored. Until
         then, and for those who read it already, the block stays readable where it is.
DRAIN-4  Statement: A block for which there is no free space, or that cannot be read, is dropped.
Verification: tests/pool/local/test_pool_members.py.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from penstock.core.keys import BlockKey
from penstock.io.memory import aligned_buffer
from penstock.pool.api import PoolError
from penstock.pool.block import Block
from penstock.pool.checksum import block_checksum
from penstock.pool.local.table import Table
from penstock.pool.losses import note_loss
from penstock.pool.members.member import is_durable, queued
from penstock.pool.members.work import Work
from penstock.process.guarded_thread import GuardedThread, count_failure

if TYPE_CHECKING:
    from penstock.pool.local.local_pool import LocalPool

log = logging.getLogger(__name__)

IN_FLIGHT_MAX = 2
PATIENCE_S = 0.1
ROWS_AT_ONCE = 4096  # of the table, looked at while the lock is held
YIELD_S = 0.002  # between two looks at the queue of loads
MOVE_TIMEOUT_S = 10.0
READERS_WAIT_S = 30.0  # for the last readers of a member that is otherwise empty, and for the last rows
CLOSE_TIMEOUT_S = 10.0


@dataclass(slots=True)
class _Move:
    """One block being copied, in one of the buffers."""

    block: Block
    copy: Block
    buffer: memoryview
    ended: bool = False


class Drain:
    """One thread that empties one member. `ended` is called under the pool's lock once the member is gone."""

    def __init__(
        self,
        pool: LocalPool,
        table: Table,
        lock: threading.Lock,
        number: int,
        ended: Callable[[int], None],
    ) -> None:
        self.moved = self.dropped = 0
        self._pool = pool
        self._table = table
        self._lock = lock
        self._number = number
        self._member = pool.members[number]
        self._ended = ended
        self._events: queue.SimpleQueue[tuple[_Move, str, PoolError | None]] = queue.SimpleQueue()
        self._buffers = [memoryview(b"")] * IN_FLIGHT_MAX
        self._in_flight = 0
        self._unconfirmed: set[Block] = set()  # moved, their new rows not committed yet
        self._stopping = threading.Event()
        self._thread = GuardedThread(
            f"penstock-drain-{self._member.name}", self._run, restarts=True, kind="penstock-drain"
        )

    def start(self) -> None:
        """Start the thread that empties the member."""
        self._thread.start()

    def stop(self) -> None:
        """Begin no further copy."""
        self._stopping.set()
        self._thread.stop_restarting()

    def join(self, timeout_s: float) -> None:
        """Wait at most `timeout_s` for the thread to end."""
        self._thread.join(timeout_s)

    def _run(self) -> None:
        """Called again after it raised: a step that failed may succeed at the second attempt."""
        while self._in_flight:
            self._next_event()
        while not self._stopping.is_set() and self._pass():
            pass
        if not self._stopping.is_set():
            self._finish()

    def _pass(self) -> bool:
        """Move or drop every block that the member has now, the most valuable first; False when it had none."""
        blocks = self._blocks()
        for _, key in sorted(blocks, reverse=True):
            self._give_way()
            while self._in_flight == IN_FLIGHT_MAX:
                self._next_event()
            if self._stopping.is_set():
                break
            self._begin(key)
        while self._in_flight:
            self._next_event()
        with self._lock:
            writing = self._table.in_use(self._number) and self._table.writes_on(self._number)
        if not blocks and writing:
            self._stopping.wait(YIELD_S)
        return bool(blocks or writing)

    def _blocks(self) -> list[tuple[float, BlockKey]]:
        """Value and key of each block that the member has, read in parts: `_begin` notices those that were dropped
        meanwhile, and those that came are found by the next pass."""
        found: list[tuple[float, BlockKey]] = []
        for first in itertools.count(0, ROWS_AT_ONCE):
            with self._lock:
                some = self._table.keys_on(self._number, first, ROWS_AT_ONCE)
            if some is None:
                return found
            found += some
        raise AssertionError("the table has no end")

    def _give_way(self) -> None:
        patience_s = time.monotonic() + PATIENCE_S
        while queued(self._member)[0] and time.monotonic() < patience_s and not self._stopping.is_set():
            self._stopping.wait(YIELD_S)

    def _begin(self, key: BlockKey) -> None:
        """Start to copy a block; drop it when it cannot be copied."""
        with self._lock:
            block = self._table.holds(key, self._number)
            if block is None:
                return
            without = {n for n, member in enumerate(self._pool.members) if member.refuses_stores}
            copy = self._table.reserve_move(block, without)
            if copy is None:
                self._drop(block)
                return
            self._table.pin(block)
        try:
            move = _Move(block, copy, self._buffer(block.extent_bytes))
        except (OSError, MemoryError) as error:
            note_loss("drain", self._member.name, "no memory to move blocks of %s: %s", self._member.name, error)
            with self._lock:
                self._table.abandon_move(copy)
                if self._table.holds(block.key, self._number) is block:
                    self._drop(block)
                self._table.unpin(block)
            return
        self._in_flight += 1
        self._submit(move, "load")

    def _buffer(self, size_bytes: int) -> memoryview:
        """The largest free buffer, or, when that is too small, a new one that replaces the smallest. Raises OSError or
        MemoryError."""
        self._buffers.sort(key=len)
        if len(self._buffers[-1]) < size_bytes:
            self._buffers[0] = aligned_buffer(size_bytes)
            return self._buffers.pop(0)
        return self._buffers.pop()

    def _submit(self, move: _Move, kind: str) -> None:
        block = move.block if kind == "load" else move.copy
        member = self._pool.members[block.member]
        data = move.buffer[: block.extent_bytes]
        deadline_s = time.monotonic() + MOVE_TIMEOUT_S
        load = kind == "load"
        work = Work(
            "load" if load else "store",
            block,
            data,
            deadline_s,
            lambda _, error: self._events.put((move, kind, error)),
            after=0 if load else member.barrier,
        )
        error = member.put(work)
        if error is not None:
            self._events.put((move, kind, error))

    def _next_event(self) -> None:
        move, kind, error = self._events.get()
        try:
            self._moved(move, kind, error)
        except Exception as problem:
            count_failure("penstock-drain")
            log.exception("moving block %s off %s failed", move.block.key.hex(), self._member.name)
            if not move.ended:
                self._end(move, PoolError("device", repr(problem)))

    def _moved(self, move: _Move, kind: str, error: PoolError | None) -> None:
        block = move.block
        if error is None and kind == "load":
            if block_checksum(block.key, move.buffer[: block.size_bytes]) == block.checksum:
                self._submit(move, "store")
                return
            self._pool.discard(block.key, block.checksum)
            error = PoolError("checksum", f"block {block.key.hex()} does not match its checksum")
        self._end(move, error)

    def _end(self, move: _Move, error: PoolError | None) -> None:
        """End a move: the copy replaces the block, or the block is dropped."""
        block = move.block
        move.ended = True
        self._buffers.append(move.buffer)
        self._in_flight -= 1
        with self._lock:
            if error is None and self._table.commit_move(block, move.copy):
                self.moved += 1
                self._recorded(move)
            elif error is not None:
                self._table.abandon_move(move.copy)
                if self._table.holds(block.key, self._number) is block:
                    self._drop(block)
            self._table.unpin(block)

    def _recorded(self, move: _Move) -> None:
        """The copy is present: commit its row first, then delete the old row. The lock is held."""
        source, target = self._member, self._pool.members[move.copy.member]
        if is_durable(target):
            value = self._table.value(move.copy.key)
            deadline_s = time.monotonic() + MOVE_TIMEOUT_S
            self._unconfirmed.add(move.block)

            def durable(_: PoolError | None) -> None:
                source.forget([move.block.key])
                self._unconfirmed.discard(move.block)

            target.record(move.copy, value, durable, deadline_s)
        else:
            source.forget([move.block.key])

    def _drop(self, block: Block) -> None:
        self._table.drop(block)
        self._member.forget([block.key])
        self.dropped += 1

    def _finish(self) -> None:
        """Wait for the last readers and the last rows, close the member."""
        patience_s = time.monotonic() + READERS_WAIT_S
        while time.monotonic() < patience_s and not self._stopping.is_set():
            with self._lock:
                if not self._table.in_use(self._number) and not self._unconfirmed:
                    break
            self._stopping.wait(YIELD_S)
        self._member.close(CLOSE_TIMEOUT_S)
        with self._lock:
            if not self._stopping.is_set():
                self._table.remove_member(self._number)
                self._ended(self._number)
        level = logging.WARNING if self.dropped else logging.INFO
        log.log(level, "%s is drained: %d blocks moved, %d dropped", self._member.name, self.moved, self.dropped)
