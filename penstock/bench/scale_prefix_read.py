"""The measurements of `penstock bench scale` of one long prefix that is read from all its nodes at once, over paced
links of nodes of this process: against the node that has most of it, and how much that is."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import median

from penstock.bench.scale_paced import BLOCK_BYTES, TIMEOUT_S, buffers, paced_pool, raise_first, read, store
from penstock.core.keys import KEY_BYTES, BlockKey
from penstock.pool.union.union_pool import UnionPool
from penstock.report import Report

POOLS = {8: "striped", 20: "owners"}  # nodes: how a pool of so many places blocks
PACE_BYTES_PER_S = 5e6
NODE_BYTES = 64 << 20  # of which what is written takes memory
BLOCKS, READS = 2048, 5
GOAL = 1.05
Step = Callable[[str], None]


def measure_prefix_reads(report: Report, quick: bool, step: Step) -> None:
    """Add the figures of both kinds of pools. Raises OSError, PoolError, TimeoutError."""
    blocks, reads = (256, 1) if quick else (BLOCKS, READS)
    for nodes, placed in POOLS.items():
        step(f"a prefix is read from {nodes} nodes")
        with paced_pool(nodes, NODE_BYTES, PACE_BYTES_PER_S) as made:
            client = made.client
            keys = _stored(client, blocks)
            held = Counter(hit.route[-1] for hit in client.lookup(keys, TIMEOUT_S) if hit is not None)
            took_s = median(_read_s(client, keys) for _ in range(reads))
        fullest_s = max(held.values()) * BLOCK_BYTES / PACE_BYTES_PER_S
        report.figure(f"prefix_{placed}_read_over_fullest", took_s / fullest_s, GOAL)
        report.figure(f"prefix_{placed}_fullest_over_mean", max(held.values()) * nodes / blocks)
    report.notes.append("prefix_*: one prefix over paced links; its read time over that of the node with most of it")


def _stored(client: UnionPool, blocks: int) -> list[BlockKey]:
    """The keys of a prefix that was written."""
    chance = random.Random(7)
    keys = [chance.randbytes(KEY_BYTES) for _ in range(blocks)]
    store(client, keys)
    return keys


def _read_s(client: UnionPool, keys: Sequence[BlockKey]) -> float:
    """Seconds to read all blocks, asked for at once."""
    intos = buffers(len(keys))
    begin_s = time.perf_counter()
    raise_first(read(client, keys, intos))
    return time.perf_counter() - begin_s
