"""A pool that notes the spans in which its blocks are read and written."""

from __future__ import annotations

from collections.abc import Sequence

from penstock.core.keys import BlockKey
from penstock.core.new_block import NewBlock
from penstock.pool.api import DoneMany, Pool, ReadCheck
from penstock.pool.wrapped import WrappedPool


class SpanPool(WrappedPool):
    """Notes how many blocks each read and write has."""

    def __init__(self, inner: Pool) -> None:
        super().__init__(inner)
        self.reads: list[int] = []
        self.writes: list[int] = []

    def read_many(
        self,
        keys: Sequence[BlockKey],
        size_bytes: int,
        intos: Sequence[memoryview],
        timeout_s: float,
        done: DoneMany,
        checks: Sequence[ReadCheck | None] | None = None,
    ) -> None:
        self.reads.append(len(keys))
        self._inner.read_many(keys, size_bytes, intos, timeout_s, done, checks)

    def write_many(
        self, blocks: Sequence[NewBlock], datas: Sequence[memoryview], timeout_s: float, done: DoneMany
    ) -> None:
        self.writes.append(len(blocks))
        self._inner.write_many(blocks, datas, timeout_s, done)
