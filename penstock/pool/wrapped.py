"""Base class of pool wrappers: every call that a wrapper does not change goes to the wrapped pool."""

from __future__ import annotations

from collections.abc import Sequence

from penstock.core.keys import BlockKey
from penstock.core.new_block import NewBlock
from penstock.pool.api import Done, DoneMany, Lease, Located, Pool, PoolStat, ReadCheck
from penstock.pool.block_size import expect_blocks
from penstock.pool.device_twin import DeviceTwin
from penstock.pool.spans import read_each, write_each


class WrappedPool:
    """Contract: `pool.api.Pool`. Owns the wrapped pool, and closes it."""

    def __init__(self, inner: Pool) -> None:
        self._inner = inner

    @property
    def up(self) -> bool:
        """Whether the wrapped pool can be reached."""
        return bool(getattr(self._inner, "up", True))

    def expect_blocks(self, block_bytes: int) -> list[str]:
        """Prepare for blocks of this size in bytes; notes for the log."""
        return expect_blocks(self._inner, block_bytes)

    def register(self, buffer: memoryview, twin: DeviceTwin | None = None) -> None:
        """Announce staging memory to the wrapped pool."""
        self._inner.register(buffer, twin)

    def lookup(self, keys: Sequence[BlockKey], timeout_s: float) -> list[Located | None]:
        """Look blocks up in the wrapped pool."""
        return self._inner.lookup(keys, timeout_s)

    def read(
        self,
        key: BlockKey,
        size_bytes: int,
        into: memoryview,
        timeout_s: float,
        done: Done,
        check: ReadCheck | None = None,
    ) -> None:
        """Read a block from the wrapped pool."""
        self._inner.read(key, size_bytes, into, timeout_s, done, check)

    def read_many(
        self,
        keys: Sequence[BlockKey],
        size_bytes: int,
        intos: Sequence[memoryview],
        timeout_s: float,
        done: DoneMany,
        checks: Sequence[ReadCheck | None] | None = None,
    ) -> None:
        """Read blocks of the wrapped pool together; a wrapper that changes `read`, and not this, reads each by it."""
        if type(self).read is WrappedPool.read:
            self._inner.read_many(keys, size_bytes, intos, timeout_s, done, checks)
        else:
            read_each(self, keys, size_bytes, intos, timeout_s, done, checks)

    def lease(self, key: BlockKey) -> Lease | None:
        """Pin a block of the wrapped pool."""
        return self._inner.lease(key)

    def host_buffers(self) -> list[memoryview]:
        """Buffers of the wrapped pool."""
        return self._inner.host_buffers()

    def write(self, block: NewBlock, data: memoryview, timeout_s: float, done: Done) -> None:
        """Write a block to the wrapped pool."""
        self._inner.write(block, data, timeout_s, done)

    def write_many(
        self, blocks: Sequence[NewBlock], datas: Sequence[memoryview], timeout_s: float, done: DoneMany
    ) -> None:
        """Write blocks to the wrapped pool together; a wrapper that changes `write`, and not this, writes each by
        it."""
        if type(self).write is WrappedPool.write:
            self._inner.write_many(blocks, datas, timeout_s, done)
        else:
            write_each(self, blocks, datas, timeout_s, done)

    def evict(self, keys: Sequence[BlockKey]) -> int:
        """Drop blocks of the wrapped pool; how many were dropped."""
        return self._inner.evict(keys)

    def stat(self, timeout_s: float) -> PoolStat:
        """State of the wrapped pool."""
        return self._inner.stat(timeout_s)

    def close(self, timeout_s: float) -> None:
        """Close the wrapped pool."""
        self._inner.close(timeout_s)
