"""A pinned block: it is neither evicted nor moved until it is released."""

from __future__ import annotations

from typing import TYPE_CHECKING

from penstock.core.keys import BlockKey
from penstock.pool.api import Done

if TYPE_CHECKING:
    from penstock.pool.block import Block
    from penstock.pool.local import LocalPool


class OpenBlock:
    """A pinned block (`pool.served.OpenedBlock`). `view` is its bytes in place, for memory members."""

    __slots__ = ("_pool", "block", "member_name", "view")
    far = False

    def __init__(self, pool: LocalPool, block: Block, member_name: str, view: memoryview | None) -> None:
        self._pool: LocalPool | None = pool
        self.block = block
        self.member_name = member_name
        self.view = view

    @property
    def key(self) -> BlockKey:
        """The block's key."""
        return self.block.key

    @property
    def checksum(self) -> int:
        """The checksum that it was stored with."""
        return self.block.checksum

    @property
    def mac(self) -> bytes:
        """The MAC that it was stored with; empty when it has none."""
        return self.block.mac

    def load(self, into: memoryview, timeout_s: float, done: Done) -> None:
        """Copy the block into `into` without verifying it. A device error drops the block."""
        assert self._pool is not None, "the block was released"
        self._pool.load(self, into, timeout_s, done)

    def note_read(self) -> None:
        """Count a block that was read in place."""
        if self._pool is not None:
            self._pool.note_read(self)

    def release(self) -> None:
        """Undo the pin; later calls do nothing. The view must not be used any more."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.unpin(self.block)


class MemoryLease:
    """A block of a memory member in place (`pool.api.Lease`). Its bytes must not be changed."""

    __slots__ = ("_opened", "_view")

    def __init__(self, opened: OpenBlock, view: memoryview) -> None:
        self._opened = opened
        self._view = view

    @property
    def view(self) -> memoryview:
        """The block's bytes in the member's memory, valid until `release`."""
        return self._view

    @property
    def checksum(self) -> int:
        """The checksum that the block was stored with."""
        return self._opened.checksum

    @property
    def mac(self) -> bytes:
        """The MAC that the block was stored with; empty when it has none."""
        return self._opened.mac

    @property
    def written_here(self) -> bool:
        """Whether this process wrote its bytes, or verified them already."""
        return self._opened.block.written_here

    def release(self) -> None:
        """Unpin the block."""
        self._opened.release()
