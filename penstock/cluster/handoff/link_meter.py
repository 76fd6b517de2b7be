"""`core.bandwidth.LinkSpeed` on the clock, for any thread, and a pool whose reads are metered."""

from __future__ import annotations

import threading
import time

from penstock.core.bandwidth import LinkSpeed
from penstock.core.keys import BlockKey
from penstock.pool.api import Done, Pool, PoolError, ReadCheck
from penstock.pool.wrapped import WrappedPool


class LinkMeter:
    """Fed with the beginning and the end of each transfer; any thread."""

    def __init__(self, given_bytes_per_s: float = 0.0) -> None:
        """See `LinkSpeed`."""
        self._lock = threading.Lock()
        self._speed = LinkSpeed(given_bytes_per_s, time.monotonic())

    def metered(self, size_bytes: int, done: Done) -> Done:
        """`done` of a transfer that begins now."""

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
        """One ends; 0 bytes when it failed."""
        with self._lock:
            self._speed.ended(moved_bytes, time.monotonic())

    @property
    def load_bytes_per_s(self) -> float:
        """What the link carried lately, idle times included."""
        with self._lock:
            return self._speed.load_bytes_per_s(time.monotonic())

    @property
    def bytes_per_s(self) -> float:
        """How fast it is while it is busy."""
        with self._lock:
            return self._speed.bytes_per_s(time.monotonic())


class MeteredPool(WrappedPool):
    """The pool behind it, each read metered: the storage NIC of this host, as this engine sees it."""

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
        """As the pool behind it; its time and bytes count for the meter."""
        super().read(key, size_bytes, into, timeout_s, self._meter.metered(size_bytes, done), check)
