"""What a pool node needs of the pool it serves, beyond `pool.api`: blocks that the client verifies, not the node."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from penstock.core.keys import BlockKey
from penstock.pool.api import Done, Located, Pool, PoolError


@dataclass(frozen=True, slots=True)
class BlockOrigin:
    """What a block was written with, beside its bytes (`NewBlock`)."""

    parent: BlockKey
    tenant: bytes
    rebuild_s: float


class StoredBlock(Protocol):
    """What is sent to a client with a block's bytes."""

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
        """Whether the block lies on another node."""

    @property
    def view(self) -> memoryview | None:
        """The block's bytes in place; None when it must be loaded."""

    def load(self, into: memoryview, timeout_s: float, done: Done) -> None:
        """Copy the block into `into`; the reader verifies it."""

    def note_read(self) -> None:
        """Count a block that was read in place."""

    def release(self) -> None:
        """Unpin the block; nothing of it may be used afterwards."""


class NodeBackend(Pool, Protocol):
    """A pool as the node that serves it uses it: its blocks can be read without being verified here."""

    @property
    def node_id(self) -> bytes:
        """The id by which other nodes, as members of this pool, know this node; empty when it has none and any id will
        do."""

    @property
    def own(self) -> NodeBackend | None:
        """This node's own members only, from which it answers other nodes. None when it has none."""

    @property
    def read_bytes_per_s(self) -> float:
        """Sum of the members' read bandwidths, bytes per second; shares of new blocks follow from them."""

    @property
    def takes_copies(self) -> bool:
        """Whether clients may write copies of other nodes' blocks here (`core.pool.copies`)."""

    @property
    def block_bytes_max(self) -> int:
        """The largest block that any of its members can hold."""

    def locate(self, keys: bytes, timeout_s: float) -> Located | list[Located | None]:
        """As `lookup`, of keys that are concatenated, 16 bytes each and at least one; a single place where all blocks
        lie alike. Raises as `lookup`."""

    def open_block(self, key: BlockKey, size_bytes: int) -> OpenedBlock | PoolError:
        """Pin a block of `size_bytes`, or return why it cannot be read."""

    def open_blocks(self, keys: Sequence[BlockKey], size_bytes: int) -> list[OpenedBlock | PoolError]:
        """As `open_block` of each."""

    def origins(self, keys: Sequence[BlockKey]) -> list[BlockOrigin | None]:
        """What each of these blocks was written with; None for one that is not here, or lies on another node."""

    def suspect(self, key: BlockKey, checksum: int, mac: bytes, refused: bool) -> None:
        """A reader reports that the block with this checksum and MAC arrived damaged, or (`refused`) that it is whole,
        but its MAC is not valid. The report alone drops nothing: damage is verified here, and a refused block stays
        until it is written again."""
