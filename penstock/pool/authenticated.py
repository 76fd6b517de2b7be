"""A pool wrapper for engines with a pool key: every write gets a MAC, and a read passes only with a valid MAC."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from penstock.core.keys import BlockKey
from penstock.core.new_block import NewBlock
from penstock.pool.api import Done, DoneMany, Lease, Pool, PoolError, ReadCheck, check_write
from penstock.pool.callbacks import call_done, call_soon, callback_worker
from penstock.pool.losses import note_error
from penstock.pool.mac import PoolKey, check_of
from penstock.pool.spans import all_failed, call_done_many
from penstock.pool.wrapped import WrappedPool
from penstock.process.guarded_thread import GuardedWorker, WorkerClosedError

NO_POOL_KEY = (
    "there is no pool key (pool_key_file): whoever can write to the pool's nodes, slabs or connections decides what KV "
    "this engine computes with"
)
WRITES_WAITING_MAX = 1024  # blocks; an engine's window of saves is far smaller


class _CheckedRead:
    """The check of one read, and whether the pool called it: a block that came by a path that does not call the check
    is refused (MAC-3)."""

    __slots__ = ("_check", "_passed")

    def __init__(self, check: ReadCheck) -> None:
        self._check = check
        self._passed = False

    def __call__(self, data: memoryview, checksum: int, mac: bytes) -> PoolError | None:
        error = self._check(data, checksum, mac)
        self._passed = error is None
        return error

    def outcome(self, key: BlockKey, error: PoolError | None) -> PoolError | None:
        if error is None and not self._passed:
            return PoolError("mac", f"block {key.hex()} came by a path that verifies no MAC")
        return error


class AuthenticatedPool(WrappedPool):
    """Contract: `pool.api.Pool`. MACs of writes are computed on a thread of this class; MACs of reads are verified
    where the wrapped pool verifies its blocks."""

    def __init__(self, inner: Pool, pool_key: PoolKey) -> None:
        """Owns `inner` from now on, and closes it."""
        super().__init__(inner)
        self._pool_key = pool_key
        self._writes = GuardedWorker("penstock-mac", WRITES_WAITING_MAX)
        self._callbacks = callback_worker()

    def read(
        self,
        key: BlockKey,
        size_bytes: int,
        into: memoryview,
        timeout_s: float,
        done: Done,
        check: ReadCheck | None = None,
    ) -> None:
        """As `Pool.read`; a `check` replaces this pool's own, for callers that also store the MAC."""
        checked = _CheckedRead(check or check_of(self._pool_key, key))
        super().read(
            key, size_bytes, into, timeout_s, lambda error: call_done(done, checked.outcome(key, error)), checked
        )

    def read_many(
        self,
        keys: Sequence[BlockKey],
        size_bytes: int,
        intos: Sequence[memoryview],
        timeout_s: float,
        done: DoneMany,
        checks: Sequence[ReadCheck | None] | None = None,
    ) -> None:
        """As `read` of each block, read together."""
        given = checks or [None] * len(keys)
        checked = [_CheckedRead(check or check_of(self._pool_key, key)) for key, check in zip(keys, given, strict=True)]

        def ended(errors: list[PoolError | None]) -> None:
            outcomes = zip(checked, keys, errors, strict=True)
            call_done_many(done, [one.outcome(key, error) for one, key, error in outcomes])

        self._inner.read_many(keys, size_bytes, intos, timeout_s, ended, checked)

    def lease(self, key: BlockKey) -> Lease | None:
        """A block that this process wrote is leased without a check; one that was moved into memory from an SSD is
        verified first. None when it does not pass; `read` then reports why."""
        lease = super().lease(key)
        if lease is None or lease.written_here or self._pool_key.verifies(key, lease.view, lease.mac):
            return lease
        lease.release()
        return None

    def write(self, block: NewBlock, data: memoryview, timeout_s: float, done: Done) -> None:
        """Compute the block's MAC, then write the block, both within `timeout_s`."""
        self.write_many([block], [data], timeout_s, lambda errors: done(errors[0]))

    def write_many(
        self, blocks: Sequence[NewBlock], datas: Sequence[memoryview], timeout_s: float, done: DoneMany
    ) -> None:
        """Compute the blocks' MACs, then write the blocks together, all within `timeout_s`."""
        until_s = time.monotonic() + timeout_s
        fail = all_failed(done, len(blocks))

        def failed(error: Exception) -> None:
            reason = "closed" if isinstance(error, WorkerClosedError) else "dropped"
            call_done(fail, PoolError(reason, f"the block was not written: {error!r}"))

        def write() -> None:
            error = next(filter(None, map(check_write, blocks, datas)), None)
            left_s = until_s - time.monotonic()
            if error is None and left_s <= 0:
                error = PoolError("deadline", "the deadline passed before the block's turn to be written")
                note_error("store", "the pool", error)
            if error is not None:
                call_done(fail, error)
                return
            signed = [
                replace(block, mac=self._pool_key.mac(block.key, data[: block.size_bytes]))
                for block, data in zip(blocks, datas, strict=True)
            ]
            self._write(signed, datas, until_s - time.monotonic(), done)

        if not self._writes.put(write, failed):
            error = PoolError("dropped", f"{WRITES_WAITING_MAX} writes wait already, or the pool is closing")
            note_error("store", "the pool", error)
            call_soon(self._callbacks, fail, error)

    def _write(self, blocks: Sequence[NewBlock], datas: Sequence[memoryview], timeout_s: float, done: DoneMany) -> None:
        if len(blocks) == 1:
            self._inner.write(blocks[0], datas[0], timeout_s, lambda error: done([error]))
        else:
            self._inner.write_many(blocks, datas, timeout_s, done)

    def close(self, timeout_s: float) -> None:
        """End the writes that wait for their MAC, then close the wrapped pool, within about `timeout_s`."""
        until_s = time.monotonic() + timeout_s
        self._writes.close(timeout_s / 2)
        super().close(max(0.1, until_s - time.monotonic()))
        self._callbacks.close(max(0.1, until_s - time.monotonic()))


def authenticated(pool: Pool, pool_key: PoolKey | None) -> Pool:
    """The pool with MACs under this key; the pool itself without one."""
    return AuthenticatedPool(pool, pool_key) if pool_key is not None else pool
