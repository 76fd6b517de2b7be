"""Opens the transport for one-sided reads; each transport is imported only when it is chosen."""

from __future__ import annotations

from penstock.pool.net.one_sided import Mover, RelayTransport


def open_mover(kind: RelayTransport) -> Mover | None:
    """None for "tcp", where blocks travel in messages. Raises ConfigError where the transport is not installed."""
    if kind == "shared-memory":
        from penstock.pool.net.shared_memory import SharedMemoryMover

        return SharedMemoryMover()
    if kind == "nixl":
        from penstock.pool.net.nixl_mover import NixlMover

        return NixlMover()
    return None
