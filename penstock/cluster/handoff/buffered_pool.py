"""The pool of a decode engine: its decode buffer first, then the storage pool."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from penstock.cluster.handoff.buffer import DecodeBuffer
from penstock.cluster.handoff.relay import BUFFER_LINK
from penstock.core.keys import BlockKey
from penstock.pool.api import Lease, Located, Pool, PoolError
from penstock.pool.losses import count_loss
from penstock.pool.wrapped import WrappedPool
from penstock.process.rate_limited_log import RateLimitedLog

log = logging.getLogger(__name__)
rare = RateLimitedLog(log)


class BufferedPool(WrappedPool):
    """Blocks in the buffer are leased in place; all other calls, writes included, go to the storage pool."""

    def __init__(self, buffer: DecodeBuffer, storage: Pool) -> None:
        super().__init__(storage)
        self._buffer = buffer

    def lookup(self, keys: Sequence[BlockKey], timeout_s: float) -> list[Located | None]:
        """As `Pool.lookup`. When the storage pool does not answer and the buffer has some of the blocks, the others are
        misses."""
        here = self._buffer.has(keys)
        found: list[Located | None] = [Located(self._buffer.block_bytes, (BUFFER_LINK,)) if h else None for h in here]
        absent = [index for index, h in enumerate(here) if not h]
        if not absent:
            return found
        try:
            stored = super().lookup([keys[index] for index in absent], timeout_s)
        except PoolError as error:
            if len(absent) == len(keys):
                raise
            count_loss("decode_lookups")
            rare.warning("lookup", "%d blocks count as misses, the pool did not answer: %s", len(absent), error)
            return found
        for index, located in zip(absent, stored, strict=True):
            found[index] = located
        return found

    def lease(self, key: BlockKey) -> Lease | None:
        """The block in the buffer's memory, else in a memory member of the storage pool."""
        return self._buffer.hold(key) or super().lease(key)

    def host_buffers(self) -> list[memoryview]:
        """The buffer's memory, and the buffers of the storage pool."""
        return [self._buffer.memory, *super().host_buffers()]
