"""The durable half of a device member: commits one row for each block, after the block's bytes, many at a time.

JOURNAL-1  Statement: A row is committed after its block's bytes are on the device (`engine.sync`), so each row names
           complete data.
JOURNAL-2  Statement: An extent is written again only after the deletion of its old row is committed (`committed`).
JOURNAL-3  Statement: Rows are valid only together with the slab they were written for: both have one random id.
JOURNAL-4  Statement: A store is acknowledged after its row is committed; a block whose row cannot be committed is lost
           at once.
JOURNAL-5  Statement: A row that the table refuses (such as a number out of range) loses its own block, and no other
           block of its commit.
Verification: tests/pool/members/test_journal_rows.py, tests/pool/test_node_crash.py.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from penstock.core.keys import BlockKey
from penstock.io.api import BlockEngine
from penstock.pool.api import Done, PoolError
from penstock.pool.block import Block
from penstock.pool.callbacks import call_done
from penstock.pool.losses import note_loss
from penstock.pool.members.member import TakeUses
from penstock.pool.members.pairing import open_pair
from penstock.pool.members.stored_rows import Stored, StoredRows, Use
from penstock.process.guarded_thread import GuardedThread, count_failure

log = logging.getLogger(__name__)

INSERT_DELAY_S = 0.01  # how long rows wait for those of stores under way, to share one commit
USE_FLUSH_S = 10.0
USES_PER_COMMIT = 4096  # so that rows do not wait long for uses
RETRY_S = 1.0
EXPIRY_CHECK_S = 0.01


@dataclass(slots=True, eq=False)
class _Waiter:
    """A `done` callback that is called once: when the block is durable, or at its deadline."""

    key: BlockKey
    deadline_s: float
    done: Done


@dataclass(slots=True)
class _Batch:
    """The content of one commit."""

    inserts: dict[BlockKey, Stored] = field(default_factory=dict)
    deletes: set[BlockKey] = field(default_factory=set)
    uses: dict[BlockKey, Use] = field(default_factory=dict)
    waiters: dict[int, _Waiter] = field(default_factory=dict)
    sequence: int = 0


class Journal:
    """Rows of one slab. `record`, `confirm` and `forget` may be called from any thread and return at once; one
    thread commits in order. It uses only `sync` of the engine, once it is open."""

    def __init__(
        self,
        where: str,
        table: Path,
        engine: BlockEngine,
        data_bytes: int | None = None,
        folders: Sequence[Path] = (),
    ) -> None:
        """`table`, `data_bytes` and `folders` as in `pairing.open_pair`. The calling thread must own the engine during
        this call.

        Raises SlabRefused (wrong format, other content, no table) or OSError.
        """
        self.where = where
        self.on_commit: Callable[[], None] = lambda: None  # after each attempt to commit, on the journal's thread
        self.on_lost: Callable[[Block], None] = lambda block: None  # the block's row cannot be committed; same thread
        self.take_uses: TakeUses = lambda limit: ()  # uses of blocks, to be committed; same thread
        self.on_their_way: Callable[[], int] = lambda: 0  # count of stores whose rows will follow
        self._engine = engine
        self._changed = threading.Condition()
        self._next = _Batch()
        self._now = _Batch()  # being committed
        self._serial = 0
        self._sequence = 0  # of the last deletion requested
        self._committed = 0  # of the last deletion committed
        self._closing = False
        self._failed: str | None = None
        self._next_check_s = 0.0
        self._table, self.identity = open_pair(engine, where, table, data_bytes, folders)
        self.notes = self._table.notes
        self._thread = GuardedThread(
            f"penstock-journal-{Path(where).name}",
            self._commit_batches,
            failed=self._broke,
            restarts=True,
            kind="penstock-journal",
        )
        self._thread.start()

    @property
    def committed(self) -> int:
        """The highest sequence number whose rows are durable."""
        return self._committed

    @property
    def failed(self) -> str | None:
        """Why rows cannot be committed at present; None when they can."""
        return self._failed

    @property
    def sequence(self) -> int:
        """Number of the last deletion requested: a store into space freed so far waits until `committed` reaches it."""
        return self._sequence

    @property
    def waiting(self) -> bool:
        """Whether somebody waits for a commit."""
        return bool(self._next.waiters or self._now.waiters)

    def rows(self) -> StoredRows:
        """The rows of all blocks of the slab, before any change. Blocks beyond the engine's capacity are left out; they
        appear again when the slab is opened with more room."""
        assert self._table.opened is not None, "the rows were let go"
        return self._table.opened

    def let_go(self) -> None:
        """Nobody asks for `rows` any more."""
        self._table.opened = None

    def record(self, block: Block, use: float, done: Done, deadline_s: float) -> None:
        """The block's bytes are on the device: commit its row. `done` is called once, with None when it is durable."""
        with self._changed:
            self._next.inserts[block.key] = (block, use)
            self._wait(self._next, block.key, done, deadline_s)
            self._changed.notify()

    def confirm(self, block: Block, done: Done, deadline_s: float) -> bool:
        """Call `done` when the row of a present block is committed; False, without a call, when it is committed
        already."""
        with self._changed:
            for batch in (self._next, self._now):
                if batch.inserts.get(block.key, (None, 0.0))[0] is block:
                    self._wait(batch, block.key, done, deadline_s)
                    return True
        return False

    def forget(self, keys: Iterable[BlockKey]) -> None:
        """Delete rows; their extents may be written again once `committed` reaches the new `sequence`."""
        with self._changed:
            for key in keys:
                self._next.inserts.pop(key, None)
                self._next.deletes.add(key)
            self._sequence += 1
            self._changed.notify()

    def expire(self) -> None:
        """End waiters whose deadline has passed with "deadline"; checks every `EXPIRY_CHECK_S`. Called by the member's
        worker, so that a device that hangs in a sync blocks no waiter."""
        now_s = time.monotonic()
        if now_s < self._next_check_s or not self.waiting:
            return
        self._next_check_s = now_s + EXPIRY_CHECK_S
        late: list[_Waiter] = []
        with self._changed:
            for waiters in (self._next.waiters, self._now.waiters):
                for serial in [serial for serial, waiter in waiters.items() if waiter.deadline_s <= now_s]:
                    late.append(waiters.pop(serial))
        for waiter in late:
            call_done(waiter.done, PoolError("deadline", f"the row was not committed in time on {self.where}"))

    def close(self, timeout_s: float) -> bool:
        """Commit everything and close; False when the device does not answer in time: the engine is then still in
        use."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout_s)
        ended = not self._thread.alive
        if ended:
            self._table.close()
        else:
            log.error("journal of %s did not end within %.1f s", self.where, timeout_s)
        self._end(self._next, PoolError("closed", "the pool is closing"))
        self._end(self._now, PoolError("closed", "the pool is closing"))
        return ended

    def _wait(self, batch: _Batch, key: BlockKey, done: Done, deadline_s: float) -> None:
        self._serial += 1
        batch.waiters[self._serial] = _Waiter(key, deadline_s, done)

    def _broke(self, error: Exception) -> None:
        """The loop raised, and is called again: the rows being committed are lost, the deletions are not
        (JOURNAL-2)."""
        self._failed = f"the journal of {self.where} failed: {error!r}"
        with self._changed:
            self._next.deletes |= self._now.deletes
        for batch in (self._now, self._next):
            self._lose(batch, self._failed)

    def _commit_batches(self) -> None:
        next_flush_s, more = time.monotonic() + USE_FLUSH_S, False
        if self._failed is not None:  # this loop raised before: rows are accepted again after a commit that succeeds
            self._commit_until_closing(_Batch(sequence=self._committed))
        while True:
            with self._changed:
                if not (more or self._next.inserts or self._urgent()):
                    self._changed.wait(USE_FLUSH_S)
                if not self._urgent():
                    self._changed.wait_for(self._enough, INSERT_DELAY_S)
                closing = self._closing
                self._now, self._next = self._next, _Batch()
                self._now.sequence = self._sequence
            if closing or time.monotonic() >= next_flush_s:
                self._now.uses = {use[0]: use for use in self.take_uses(USES_PER_COMMIT)}
                if len(self._now.uses) < USES_PER_COMMIT:
                    next_flush_s = time.monotonic() + USE_FLUSH_S
            more = len(self._now.uses) == USES_PER_COMMIT
            self._commit_until_closing(self._now)
            if closing and not more:
                return

    def _urgent(self) -> bool:
        """Whether a commit should not wait for more rows; the lock is held."""
        return self._closing or self._sequence > self._committed

    def _enough(self) -> bool:
        """Whether to commit now: at least as many rows wait as stores are under way. The lock is held."""
        return self._urgent() or len(self._next.inserts) >= self.on_their_way()

    def _commit_until_closing(self, batch: _Batch) -> None:
        """Commit. When that fails (disk full, table locked, sync failed), log it, lose the rows, and try the deletions
        again until closing."""
        while True:
            try:
                self._commit(batch)
            except (sqlite3.Error, OSError) as error:
                text = f"rows of {self.where} cannot be committed: {error}"
                if self._failed is None:
                    log.error("%s; nothing is stored there meanwhile", text)
                self._failed = text
                self._lose(batch, text)
                self._call(self.on_commit)
                with self._changed:
                    if self._changed.wait_for(lambda: self._closing, RETRY_S):
                        return
            else:
                self._failed = None
                self._committed = batch.sequence
                self._end(batch, None)
                self._call(self.on_commit)
                return

    def _commit(self, batch: _Batch) -> None:
        if batch.inserts or self._failed:
            self._engine.sync()
        if batch.inserts or batch.deletes or batch.uses:
            refused = self._table.change(batch.deletes, batch.inserts.values(), batch.uses.values())
            for key, why in refused:
                self._refuse(batch, key, why)
        elif self._failed:  # nothing is left of what failed: rows are accepted again once the table takes writes
            self._table.try_to_write()

    def _refuse(self, batch: _Batch, key: BlockKey, why: str) -> None:
        """Lose one block of a batch, whose row the table refuses (JOURNAL-5)."""
        with self._changed:
            stored = batch.inserts.pop(key, None)
            batch.uses.pop(key, None)
            waiters = [n for n, waiter in batch.waiters.items() if waiter.key == key]
            refused = [batch.waiters.pop(n) for n in waiters]
        note_loss("row_refused", self.where, "the row of block %s on %s is refused: %s", key.hex(), self.where, why)
        if stored is not None:
            self._call(partial(self.on_lost, stored[0]))
        for waiter in refused:
            call_done(waiter.done, PoolError("device", f"the row of block {key.hex()} is refused: {why}"))

    def _call(self, call: Callable[[], None]) -> None:
        """Call a callback; an exception in it is logged and counted, and must not stop further commits."""
        try:
            call()
        except Exception:
            count_failure("penstock-journal")
            log.exception("a callback of the journal of %s raised", self.where)

    def _lose(self, batch: _Batch, why: str) -> None:
        """Drop the blocks first, then their rows, so that nobody is told that a lost block is durable."""
        with self._changed:
            lost = [block for block, _ in batch.inserts.values()]
        for block in lost:
            self._call(partial(self.on_lost, block))
        self._end(batch, PoolError("device", why))

    def _end(self, batch: _Batch, error: PoolError | None) -> None:
        """Call every waiter of this batch; those that are added later are called at the next attempt, or by `close`."""
        with self._changed:
            batch.inserts = {}
            waiters, batch.waiters = list(batch.waiters.values()), {}
        for waiter in waiters:
            call_done(waiter.done, error)
