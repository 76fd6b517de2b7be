"""A block that somebody has in hand: its key, its place, its tenant, and the inputs of its eviction value."""

from __future__ import annotations

from dataclasses import dataclass

from penstock.core.keys import BlockKey
from penstock.core.layout import staging_bytes


@dataclass(slots=True, eq=False, weakref_slot=True)
class Block:
    """One block and its extent. `position`: its number in its prefix, from which its member follows. `tenant`: tag of
    its owner. `rebuild_s`: seconds to compute it again. `uses`: how often it was written or looked up. `mac`: the MAC
    that its writer stored with it (`pool.mac`). `written_here`: this process wrote it, since it started. `row`: its row
    in the table while it is present, else -1; `uses` and `account` are then the row's, at the time it was taken up."""

    key: BlockKey
    parent: BlockKey
    member: int
    offset: int
    size_bytes: int
    position: int
    checksum: int = 0
    tenant: bytes = b""
    rebuild_s: float = 0.0
    uses: int = 1
    account: bytes = b""  # the quota account that is charged with its bytes
    pins: int = 0
    mac: bytes = b""
    written_here: bool = False
    row: int = -1

    @property
    def extent_bytes(self) -> int:
        """Bytes that the block takes on its member: its size, rounded up to the alignment of reads and writes."""
        return staging_bytes(self.size_bytes)
