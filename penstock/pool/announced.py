"""A pool whose blocks are announced: what is written, found or gone becomes KV events (`pool.kv_events`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from penstock.core.keys import BlockKey
from penstock.core.new_block import NewBlock
from penstock.pool.api import Done, DoneMany, Pool, PoolError, ReadCheck
from penstock.pool.callbacks import call_done
from penstock.pool.kv_events import CPU, STORAGE, KvEventLog
from penstock.pool.spans import call_done_many
from penstock.pool.wrapped import WrappedPool

_GONE = ("missing", "checksum", "mac")  # reasons after which a block is not found any more


class AnnouncedPool(WrappedPool):
    """Contract: `pool.api.Pool`. Blocks on memory of this process are announced as CPU, all others as STORAGE. What
    leaves a member of this process is removed at once; what leaves another node, when it is looked up next. Hits are
    announced by whoever looked them up, and knows their tokens (`KvEventLog.found`)."""

    def __init__(self, inner: Pool, events: KvEventLog) -> None:
        """Takes the pool over."""
        super().__init__(inner)
        self.events = events
        local: Any = inner if hasattr(inner, "watch") else getattr(inner, "own", None)
        if local is not None:
            local.watch(events.gone)
        self._local = local

    def read(
        self,
        key: BlockKey,
        size_bytes: int,
        into: memoryview,
        timeout_s: float,
        done: Done,
        check: ReadCheck | None = None,
    ) -> None:
        """Read a block; one that is not there, or not as it should be, is gone."""

        def ended(error: PoolError | None) -> None:
            if error is not None and error.reason in _GONE:
                self.events.gone(key)
            call_done(done, error)

        super().read(key, size_bytes, into, timeout_s, ended, check)

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

        def ended(errors: list[PoolError | None]) -> None:
            for key, error in zip(keys, errors, strict=True):
                if error is not None and error.reason in _GONE:
                    self.events.gone(key)
            call_done_many(done, errors)

        self._inner.read_many(keys, size_bytes, intos, timeout_s, ended, checks)

    def write(self, block: NewBlock, data: memoryview, timeout_s: float, done: Done) -> None:
        """Write a block; once it is there it is announced."""

        def ended(error: PoolError | None) -> None:
            self._stored(block, error)
            call_done(done, error)

        super().write(block, data, timeout_s, ended)

    def write_many(
        self, blocks: Sequence[NewBlock], datas: Sequence[memoryview], timeout_s: float, done: DoneMany
    ) -> None:
        """As `write` of each block, written together."""

        def ended(errors: list[PoolError | None]) -> None:
            for block, error in zip(blocks, errors, strict=True):
                self._stored(block, error)
            call_done_many(done, errors)

        self._inner.write_many(blocks, datas, timeout_s, ended)

    def _stored(self, block: NewBlock, error: PoolError | None) -> None:
        if error is None:
            kind = self._local.kind_of(block.key) if self._local is not None else None
            self.events.stored(block, CPU if kind == "memory" else STORAGE)

    def evict(self, keys: Sequence[BlockKey]) -> int:
        """Drop blocks; all of them count as gone, and are announced again where one stayed and is found."""
        for key in keys:
            self.events.gone(key)
        return super().evict(keys)
