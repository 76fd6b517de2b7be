"""What moves bytes between a client's memory and a pool node's without the node's processor: by NIXL
(`pool.net.nixl_agent`) or by plain RDMA verbs (`pool.net.verbs_agent`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, get_args

from penstock.io.device_memory import DeviceMemory

RdmaTransport = Literal["nixl", "verbs"]
RDMA_TRANSPORTS: tuple[RdmaTransport, ...] = get_args(RdmaTransport)  # each needs the extra of its name

Operation = Literal["READ", "WRITE"]
Span = tuple[int, int, int]  # local address, the peer's address, bytes
Access = Literal["local", "read", "write"]  # nothing for peers; they may read; they may read and write


class OneSidedTransfer(Protocol):
    """A transfer that has begun. Bytes may arrive until `ended` is True or raises."""

    def ended(self) -> bool:
        """Whether all bytes have arrived. Raises PoolError("network") when the transfer failed: none arrive then."""


class OneSidedAgent(Protocol):
    """One agent. Any thread may call."""

    @property
    def kind(self) -> RdmaTransport:
        """The transport's name in greetings."""

    @property
    def transport(self) -> str:
        """What carries the bytes, for people."""

    @property
    def numa_node(self) -> int | None:
        """Where memory that its devices fill lies best; None: anywhere."""

    @property
    def peers_of_connection(self) -> bool:
        """Whether a node forgets a client with the connection that attached it."""

    def register(self, memory: memoryview | DeviceMemory, access: Access = "read") -> Any:
        """Register memory for transfers; returns the registration. `access`: what peers may do with it at least. Raises
        PoolError("device"), as where the process may not lock so much memory, or the cards cannot reach the device's.
        """

    def deregister(self, registration: Any) -> None:
        """Undo `register`; a failure is logged."""

    def metadata(self) -> bytes:
        """What every client needs to read the memory that is registered now."""

    def request(self) -> bytes:
        """At a client: what a node needs to `accept` it. Raises PoolError("network")."""

    def accept(self, request: bytes) -> tuple[bytes, Callable[[], bool]]:
        """At a node: what this client alone needs, and what ends its transfers: it returns whether nothing that the
        client reads or writes travels any more. Raises PoolError."""

    def add_peer(self, metadata: bytes, accepted: bytes = b"") -> Any:
        """At a client: the node that answered the latest `request` with these. Raises PoolError("network")."""

    def remove_peer(self, peer: Any) -> None:
        """Forget a node; no transfer of it may be open."""

    def begin(
        self, operation: Operation, peer: Any, spans: Sequence[Span], local: DeviceMemory | None = None
    ) -> OneSidedTransfer:
        """Begin to read parts of a node's registered memory into registered memory, or to write them from it. All local
        addresses are the host's, or of `local`. Raises PoolError("network")."""

    def close(self) -> None:
        """Release its devices; it has no peer and no registered memory any more."""
