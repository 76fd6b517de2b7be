"""Stores blocks that have arrived in staging memory of a node: only those that arrived whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from penstock.core.new_block import NewBlock
from penstock.pool.api import PoolError
from penstock.pool.checksum import block_checksum
from penstock.pool.node_backend import NodeBackend


def store_whole(
    pool: NodeBackend,
    blocks: Sequence[NewBlock],
    views: Sequence[memoryview],
    checksums: Sequence[int],
    timeout_s: float,
    stored: Callable[[list[PoolError | None]], None],
) -> None:
    """Have `pool` store those of the blocks in `views` (each padded to the alignment) that match their checksums.
    `stored` is called once, with a result for each: "checksum" for a block that does not match."""
    sizes = [block.size_bytes for block in blocks]
    sums = [block_checksum(block.key, view[:size]) for block, view, size in zip(blocks, views, sizes, strict=True)]
    whole = [at for at, checksum in enumerate(checksums) if sums[at] == checksum]
    results: list[PoolError | None] = [
        PoolError("checksum", f"block {block.key.hex()} was damaged in transfer") for block in blocks
    ]

    def ended(errors: list[PoolError | None]) -> None:
        for at, error in zip(whole, errors, strict=True):
            results[at] = error
        stored(results)

    if whole:
        pool.write_many([blocks[at] for at in whole], [views[at] for at in whole], timeout_s, ended)
    else:
        stored(results)
