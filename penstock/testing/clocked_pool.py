"""A pool whose reads and writes of staging memory are accesses by the host, for tests of the order of work."""

from __future__ import annotations

from collections.abc import Callable

from penstock.core.keys import BlockKey
from penstock.core.new_block import NewBlock
from penstock.io.memory import address_of
from penstock.pool.api import Done, Pool, PoolError, ReadCheck
from penstock.pool.wrapped import WrappedPool
from penstock.testing.device_clock import DeviceClock


class ClockedPool(WrappedPool):
    """Contract: `pool.api.Pool`. Each read and write is an access when it begins and one when it ends, by the thread
    that begins or ends it. Nothing is leased, so that every block goes through staging memory."""

    def __init__(
        self, inner: Pool, clock: DeviceClock, seen_at: Callable[[int], int] = lambda address: address
    ) -> None:
        """`seen_at`: where the device sees memory that the pool sees at an address."""
        super().__init__(inner)
        self._clock = clock
        self._seen_at = seen_at

    def read(
        self,
        key: BlockKey,
        size_bytes: int,
        into: memoryview,
        timeout_s: float,
        done: Done,
        check: ReadCheck | None = None,
    ) -> None:
        """Read a block from the pool behind."""

        def begin(end: Done) -> None:
            self._inner.read(key, size_bytes, into, timeout_s, end, check)

        self._move("reading a block", into, False, done, begin)

    def write(self, block: NewBlock, data: memoryview, timeout_s: float, done: Done) -> None:
        """Write a block to the pool behind."""
        self._move("saving a block", data, True, done, lambda end: self._inner.write(block, data, timeout_s, end))

    def lease(self, key: BlockKey) -> None:
        """None: see the class."""
        return None

    def _move(self, what: str, memory: memoryview, reads: bool, done: Done, begin: Callable[[Done], None]) -> None:
        known, address = self._clock.known(), self._seen_at(address_of(memory))
        where = [(address, address + memory.nbytes)]

        def touch() -> None:
            self._clock.host_access(what, where if reads else (), () if reads else where)

        def ended(error: PoolError | None) -> None:
            self._clock.learn(known)
            touch()
            done(error)

        touch()
        begin(ended)
