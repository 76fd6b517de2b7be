"""What a pool node needs of the pool it serves, beyond `pool.api`: blocks that the reader at the far end verifies."""

from __future__ import annotations

from typing import Protocol

from penstock.core.keys import BlockKey
from penstock.pool.api import Done, Pool, PoolError


class StoredBlock(Protocol):
    """What goes with a block's bytes to who asked for it."""

    @property
    def key(self) -> BlockKey:
        """The block's key."""

    @property
    def checksum(self) -> int:
        """The checksum that it was stored with."""

    @property
    def mac(self) -> bytes:
        """The MAC that it was stored with; empty when it has none."""


class OpenedBlock(StoredBlock, Protocol):
    """A block that stays readable until `release`. `view` is its bytes in place, None when it must be loaded;
    `checksum` and `mac` are those it was stored with, known from the start or after `load`."""

    @property
    def remote(self) -> bool:
        """Whether another node has it."""

    @property
    def view(self) -> memoryview | None:
        """The block's bytes in place; None when it must be loaded."""

    def load(self, into: memoryview, timeout_s: float, done: Done) -> None:
        """Copy the block into `into`; who reads it verifies it."""

    def note_read(self) -> None:
        """Count a block that was read in place."""

    def release(self) -> None:
        """Unpin the block; nothing of it may be used afterwards."""


class NodeBackend(Pool, Protocol):
    """A pool as the node that serves it uses it: with blocks that are read without being verified here."""

    @property
    def node_id(self) -> bytes:
        """The id that its members of other nodes know this node by; empty when it has none and any id will do."""

    @property
    def own(self) -> NodeBackend | None:
        """The members of this node alone: what it answers other nodes from. None when it has none."""

    @property
    def read_bytes_per_s(self) -> float:
        """The bandwidths that its members' shares go by, added up."""

    @property
    def block_bytes_max(self) -> int:
        """The largest block that any of its members can hold."""

    def open_block(self, key: BlockKey, size_bytes: int) -> OpenedBlock | PoolError:
        """Hold a block of `size_bytes`, or say why it cannot be read."""

    def suspect(self, key: BlockKey, checksum: int, mac: bytes, refused: bool) -> None:
        """A reader says that the block with this checksum and MAC came damaged, or (`refused`) that it is whole, but
        was not written by who may. The reader's word alone drops nothing: damage is looked for here, and what is
        refused stays until it is written anew."""
