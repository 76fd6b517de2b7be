"""A pinned block: it is neither evicted nor moved until it is released."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from penstock.core.keys import BlockKey
from penstock.pool.api import Done
from penstock.pool.block import Block
from penstock.pool.node_backend import StoredBlock

if TYPE_CHECKING:
    from penstock.pool.local.local_pool import LocalPool


class _Pinnable(StoredBlock, Protocol):
    @property
    def written_here(self) -> bool: ...


B = TypeVar("B", bound=_Pinnable)
View = TypeVar("View", memoryview, memoryview | None)


class PinnedBlock(Generic[B, View]):
    """`view` is the block's bytes in place, which must not be changed (`pool.api.Lease`); None where it must be loaded.
    `key`, `checksum` and `mac` are those that it was stored with."""

    __slots__ = ("_unpin", "block", "view")

    def __init__(self, block: B, view: View, unpin: Callable[[B], None]) -> None:
        """`unpin` undoes the pin."""
        self.block = block
        self.view: View = view
        self._unpin: Callable[[B], None] | None = unpin

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

    @property
    def written_here(self) -> bool:
        """Whether this process wrote its bytes, or verified them already."""
        return self.block.written_here

    def release(self) -> None:
        """Undo the pin; later calls do nothing. The view must not be used any more."""
        unpin, self._unpin = self._unpin, None
        if unpin is not None:
            unpin(self.block)


class OpenBlock(PinnedBlock[Block, memoryview | None]):
    """A pinned block that can also be loaded, for a node to send (`pool.node_backend.OpenedBlock`)."""

    __slots__ = ("_pool",)
    remote = False

    def __init__(self, pool: LocalPool, block: Block, view: memoryview | None) -> None:
        super().__init__(block, view, pool.unpin)
        self._pool = pool

    def load(self, into: memoryview, timeout_s: float, done: Done) -> None:
        """Copy the block into `into` without verifying it. A device error drops the block."""
        assert self._unpin is not None, "the block was released"
        self._pool.load(self, into, timeout_s, done)

    def note_read(self) -> None:
        """Count a block that was read in place."""
        if self._unpin is not None:
            self._pool.note_read(self)
