"""The storage pool with a meter on what is read from it: the storage NIC of this host, as this engine sees it."""

from __future__ import annotations

from penstock.cluster.link_meter import LinkMeter
from penstock.core.keys import BlockKey
from penstock.pool.api import Done, Pool, ReadCheck
from penstock.pool.wrapped import WrappedPool


class MeteredPool(WrappedPool):
    """The pool behind it, each read metered."""

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
        """Read from the pool behind; bytes and time are noted."""
        super().read(key, size_bytes, into, timeout_s, self._meter.metered(size_bytes, done), check)
