"""Compares the size of blocks with what members and nodes can hold: once, when both are known, rather than at each
write."""

from __future__ import annotations

from penstock.pool.api import Pool


def expect_blocks(pool: Pool, block_bytes: int) -> list[str]:
    """Tell a pool how large the blocks are that it will get: one line, which is also logged, for each member or
    node that cannot hold one. A node that is reached later, or is another one by then, is compared then."""
    ask = getattr(pool, "expect_blocks", None)
    return list(ask(block_bytes)) if ask is not None else []
