"""A block as the pool keeps it: its names, where it lies, whose it is, and what it is worth."""

from __future__ import annotations

from dataclasses import dataclass

from penstock.core.keys import BlockKey
from penstock.core.layout import staging_bytes


@dataclass(slots=True, eq=False)
class Block:
    """One block and its extent. `position` is its place in the spread of its prefix over the members, `tenant` whose it
    is, `rebuild_s` what computing it again takes, `uses` how often it was written or looked up, `mac` what its writer
    put beside it (`pool.mac`). `written_here`: by this process, since it started."""

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
    account: bytes = b""  # which quota its bytes count against
    pins: int = 0
    mac: bytes = b""
    written_here: bool = False

    @property
    def extent_bytes(self) -> int:
        """Bytes that the block takes on its member: its size, rounded up to the alignment of reads and writes."""
        return staging_bytes(self.size_bytes)
