"""The storage pool with a meter on what is read from it: the storage NIC of this host, as this engine sees it."""

from __future__ import annotations

from collections.abc import Sequence

from penstock.cluster.link_meter import LinkMeter
from penstock.core.keys import BlockKey
from penstock.core.new_block import NewBlock
from penstock.pool.api import Done, Lease, Located, Pool, PoolError, PoolStat


class MeteredPool:
    """Contract: `pool.api.Pool`. Closes the pool behind it."""

    def __init__(self, storage: Pool, meter: LinkMeter) -> None:
        self._storage = storage
        self._meter = meter

    @property
    def up(self) -> bool:
        """Whether the storage can be reached."""
        return bool(getattr(self._storage, "up", True))

    def register(self, buffer: memoryview) -> None:
        self._storage.register(buffer)

    def lookup(self, keys: Sequence[BlockKey], timeout_s: float) -> list[Located | None]:
        return self._storage.lookup(keys, timeout_s)

    def read(self, key: BlockKey, size_bytes: int, into: memoryview, timeout_s: float, done: Done) -> None:
        def ended(error: PoolError | None) -> None:
            self._meter.end(size_bytes if error is None else 0)
            done(error)

        self._meter.begin()
        self._storage.read(key, size_bytes, into, timeout_s, ended)

    def lease(self, key: BlockKey) -> Lease | None:
        return self._storage.lease(key)

    def host_buffers(self) -> list[memoryview]:
        return self._storage.host_buffers()

    def write(self, block: NewBlock, data: memoryview, timeout_s: float, done: Done) -> None:
        self._storage.write(block, data, timeout_s, done)

    def evict(self, keys: Sequence[BlockKey]) -> int:
        return self._storage.evict(keys)

    def stat(self, timeout_s: float) -> PoolStat:
        return self._storage.stat(timeout_s)

    def close(self, timeout_s: float) -> None:
        self._storage.close(timeout_s)
