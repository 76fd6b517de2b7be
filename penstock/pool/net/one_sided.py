"""One-sided reads between engines and relays: one side reads blocks from the other side's memory; messages only say
where a block lies.

Here only reads are one-sided, and the reader verifies the block's checksum, seeded with its key. So memory that was
reused meanwhile, or a peer that has ended, is only a failed read. No engine writes into another's memory; with NIXL,
whose registrations allow it, a peer that is attached could. Pool nodes are written one-sided too
(`pool.net.one_sided_writes`).
"""

from __future__ import annotations

from typing import Literal, Protocol, get_args

RelayTransport = Literal["tcp", "shared-memory", "nixl"]
RELAY_TRANSPORTS: tuple[RelayTransport, ...] = get_args(RelayTransport)


class RemoteMemory(Protocol):
    """Memory of a peer."""

    def read(self, offset: int, into: memoryview, timeout_s: float) -> None:
        """Fill `into`, which lies in memory of `Mover.allocate`. Raises PoolError. A transfer that a network card has
        begun cannot be stopped: the call then ends late, but never before the last byte."""

    def close(self) -> None:
        """Detach from the peer's memory; it must not be read afterwards."""


class Mover(Protocol):
    """A transport for reads of a peer's memory. All methods, except `RemoteMemory.read`, may be called from any
    thread."""

    @property
    def kind(self) -> RelayTransport:
        """The transport's name in configurations."""

    def allocate(self, size_bytes: int) -> memoryview:
        """Page-aligned memory that peers may read, and that `RemoteMemory.read` may fill."""

    def export(self, memory: memoryview) -> bytes:
        """A description of memory of `allocate`, with which a peer can read it."""

    def attach(self, description: bytes) -> RemoteMemory:
        """Attach memory that a peer exported. Raises PoolError("network") when this host cannot read it."""

    def close(self) -> None:
        """Release all memory of `allocate`; it must not be read any more."""
