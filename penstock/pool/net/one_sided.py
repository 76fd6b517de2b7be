"""One-sided reads: one end reads the other's memory, which only says where a block lies.

Only reads are one-sided, and who reads verifies the block's checksum, seeded with its key. So memory that was reused
meanwhile, or a peer that is gone, is a failed read; nobody can ever write into memory that is not its own.
"""

from __future__ import annotations

from typing import Literal, Protocol, get_args

RelayTransport = Literal["tcp", "shared-memory", "nixl"]
RELAY_TRANSPORTS: tuple[RelayTransport, ...] = get_args(RelayTransport)


class RemoteMemory(Protocol):
    """Memory of a peer."""

    def read(self, offset: int, into: memoryview, timeout_s: float) -> None:
        """Fill `into`, which lies in memory of `Mover.allocate`. Raises PoolError. What a network card is already
        moving cannot be cut off: the call then ends late, but never before the last byte."""

    def close(self) -> None:
        """Let go of the peer's memory; it must not be read afterwards."""


class Mover(Protocol):
    """A way to read a peer's memory. Methods but `RemoteMemory.read` may be called from any thread."""

    @property
    def kind(self) -> RelayTransport:
        """The name of the transport in configurations."""

    def allocate(self, size_bytes: int) -> memoryview:
        """Page-aligned memory that peers may read, and that `RemoteMemory.read` may fill."""

    def export(self, memory: memoryview) -> bytes:
        """What a peer needs to read memory of `allocate`."""

    def attach(self, description: bytes) -> RemoteMemory:
        """Raises PoolError("network") when this host cannot read that memory."""

    def close(self) -> None:
        """Release all memory of `allocate`, which nobody may read any more."""
