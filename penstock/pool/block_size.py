"""Compares the block size with what members and nodes can hold: once, when both are known, not at each write."""

from __future__ import annotations

from penstock.pool.api import Pool


def expect_blocks(pool: Pool, block_bytes: int) -> list[str]:
    """Announce to a pool the size of the blocks that it will get. Returns, and logs, one line for each member or node
    that cannot hold such a block. A node that is reached later is checked then."""
    ask = getattr(pool, "expect_blocks", None)
    return list(ask(block_bytes)) if ask is not None else []
