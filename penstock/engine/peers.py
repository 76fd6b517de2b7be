"""The interface of decode engines for a prefill engine: it reads blocks through them, and sends blocks to them."""

from __future__ import annotations

from typing import Protocol

from penstock.core.new_block import NewBlock
from penstock.pool.api import Done

RELAY_LINK = "relay@"  # blocks on a route whose last link begins so are read through a decode engine


def relay_link(address: str) -> str:
    """Name of the link from the relay of a decode engine at "HOST:PORT"."""
    return f"{RELAY_LINK}{address}"


class Peers(Protocol):
    """Relays by their address "HOST:PORT". Threading and `done` as in `pool.api`."""

    def allocate(self, size_bytes: int) -> memoryview:
        """Page-aligned staging memory; called once."""

    def read(self, address: str, key: bytes, size_bytes: int, into: memoryview, timeout_s: float, done: Done) -> None:
        """Read a block through the decode engine at `address` into `into`."""

    def hand_over(self, address: str, block: NewBlock, data: memoryview, timeout_s: float, done: Done) -> None:
        """Send a block of `block.size_bytes`; `data` must stay unchanged until `done`."""
