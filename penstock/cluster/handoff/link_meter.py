"""`core.bandwidth.LinkSpeed` with a real clock and a lock, and a pool wrapper that meters reads."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from penstock.core.bandwidth import LinkSpeed
from penstock.core.keys import BlockKey
from penstock.pool.api import Done, DoneMany, Pool, PoolError, ReadCheck
from penstock.pool.wrapped import WrappedPool


class LinkMeter:
    """Measures a link from the begin and end of each transfer. Any thread may call."""

    def __init__(self, given_bytes_per_s: float = 0.0) -> None:
        """See `LinkSpeed`."""
        self._lock = threading.Lock()
        self._speed = LinkSpeed(given_bytes_per_s, time.monotonic())

    def metered(self, size_bytes: int, done: Done) -> Done:
        """Begin a transfer; returns a `done` that ends it and calls the given one."""

        def ended(error: PoolError | None) -> None:
            self.end(size_bytes if error is None else 0)
            done(error)

        self.begin()
        return ended

    def begin(self) -> None:
        """A transfer begins."""
        with self._lock:
            self._speed.started(time.monotonic())

    def end(self, moved_bytes: int) -> None:
        """A transfer ends; 0 bytes when it failed."""
        with self._lock:
            self._speed.ended(moved_bytes, time.monotonic())

    @property
    def load_bytes_per_s(self) -> float:
        """Recent load in bytes per second, idle times included."""
        with self._lock:
            return self._speed.load_bytes_per_s(time.monotonic())

    @property
    def bytes_per_s(self) -> float:
        """Recent bandwidth in bytes per second while the link was busy."""
        with self._lock:
            return self._speed.bytes_per_s(time.monotonic())


class MeteredPool(WrappedPool):
    """A wrapper that meters each read: this engine's measurement of the host's storage NIC."""

    def __init__(self, storage: Pool, meter: LinkMeter) -> None:
        super().__init__(storage)
        self._meter = meter

    def read(
        self,
        key: BlockKey,
        size_bytes: int,
        into: memoryview,
        timeout_s: float,
        done: Done,
        check: ReadCheck | None = None,
    ) -> None:
        """As `Pool.read`; its time and bytes are metered."""
        super().read(key, size_bytes, into, timeout_s, self._meter.metered(size_bytes, done), check)

    def read_many(
        self,
        keys: Sequence[BlockKey],
        size_bytes: int,
        intos: Sequence[memoryview],
        timeout_s: float,
        done: DoneMany,
        checks: Sequence[ReadCheck | None] | None = None,
    ) -> None:
        """As `Pool.read_many`; the blocks' time and bytes are metered as those of one transfer."""

        def ended(errors: list[PoolError | None]) -> None:
            self._meter.end(size_bytes * errors.count(None))
            done(errors)

        self._meter.begin()
        self._inner.read_many(keys, size_bytes, intos, timeout_s, ended, checks)
