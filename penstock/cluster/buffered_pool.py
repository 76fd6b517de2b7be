"""The pool as a decode engine sees it: its decode buffer first, then the storage pool."""

from __future__ import annotations

from collections.abc import Sequence

from penstock.cluster.buffer import DecodeBuffer
from penstock.cluster.relay import BUFFER_LINK
from penstock.core.keys import BlockKey
from penstock.core.new_block import NewBlock
from penstock.pool.api import Done, Lease, Located, Pool, PoolError, PoolStat


class BufferedPool:
    """Contract: `pool.api.Pool`. Blocks of the buffer are leased in place; everything else is the storage pool's, also
    what is written. Closes the storage pool."""

    def __init__(self, buffer: DecodeBuffer, storage: Pool) -> None:
        self._buffer = buffer
        self._storage = storage

    @property
    def up(self) -> bool:
        """Whether the storage behind the buffer can be reached."""
        return bool(getattr(self._storage, "up", True))

    def register(self, buffer: memoryview) -> None:
        self._storage.register(buffer)

    def lookup(self, keys: Sequence[BlockKey], timeout_s: float) -> list[Located | None]:
        """What the storage pool has is left out when it does not answer and the buffer has something."""
        here = self._buffer.has(keys)
        found: list[Located | None] = [Located(self._buffer.block_bytes, (BUFFER_LINK,)) if h else None for h in here]
        absent = [index for index, h in enumerate(here) if not h]
        if not absent:
            return found
        try:
            stored = self._storage.lookup([keys[index] for index in absent], timeout_s)
        except PoolError:
            if len(absent) == len(keys):
                raise
            return found
        for index, located in zip(absent, stored, strict=True):
            found[index] = located
        return found

    def read(self, key: BlockKey, size_bytes: int, into: memoryview, timeout_s: float, done: Done) -> None:
        self._storage.read(key, size_bytes, into, timeout_s, done)

    def lease(self, key: BlockKey) -> Lease | None:
        return self._buffer.hold(key) or self._storage.lease(key)

    def host_buffers(self) -> list[memoryview]:
        return [self._buffer.memory, *self._storage.host_buffers()]

    def write(self, block: NewBlock, data: memoryview, timeout_s: float, done: Done) -> None:
        self._storage.write(block, data, timeout_s, done)

    def evict(self, keys: Sequence[BlockKey]) -> int:
        return self._storage.evict(keys)

    def stat(self, timeout_s: float) -> PoolStat:
        return self._storage.stat(timeout_s)

    def close(self, timeout_s: float) -> None:
        self._storage.close(timeout_s)
