"""The measurements of `penstock bench scale` of one long prefix that is read from all its nodes at once, over paced
links of nodes of this process: against the node that has most of it, and how much that is."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from statistics import median

from penstock.core.keys import KEY_BYTES, BlockKey
from penstock.core.new_block import NewBlock, prefix_position
from penstock.io.memory import aligned_buffer
from penstock.pool.api import PoolError
from penstock.pool.local.local_pool import LocalPool
from penstock.pool.members.memory import MemoryMember
from penstock.pool.net.connect import open_union
from penstock.pool.net.node import PoolNode
from penstock.pool.union.union_pool import UnionPool
from penstock.report import Report

POOLS = {8: "striped", 20: "owners"}  # nodes: how a pool of so many places blocks
BLOCK_BYTES = 32 << 10
PACE_BYTES_PER_S = 5e6
NODE_BYTES = 64 << 20  # of which what is written takes memory
STAGING_BYTES = 4 << 20
BLOCKS, READS = 2048, 5
TIMEOUT_S = 60.0
GOAL = 1.05
Step = Callable[[str], None]


def measure_prefix_reads(report: Report, quick: bool, step: Step) -> None:
    """Add the figures of both kinds of pools. Raises OSError, PoolError, TimeoutError."""
    blocks, reads = (256, 1) if quick else (BLOCKS, READS)
    for nodes, placed in POOLS.items():
        step(f"a prefix is read from {nodes} nodes")
        with _client(nodes) as client:
            keys = _stored(client, blocks)
            held = Counter(hit.route[-1] for hit in client.lookup(keys, TIMEOUT_S) if hit is not None)
            took_s = median(_read_s(client, keys) for _ in range(reads))
        fullest_s = max(held.values()) * BLOCK_BYTES / PACE_BYTES_PER_S
        report.figure(f"prefix_{placed}_read_over_fullest", took_s / fullest_s, GOAL)
        report.figure(f"prefix_{placed}_fullest_over_mean", max(held.values()) * nodes / blocks)
    report.notes.append("prefix_*: one prefix over paced links; its read time over that of the node with most of it")


@contextlib.contextmanager
def _client(nodes: int) -> Iterator[UnionPool]:
    with contextlib.ExitStack() as undo:
        places = []
        for number in range(nodes):
            pool = LocalPool([MemoryMember("memory:0", NODE_BYTES)], [1e9])
            undo.callback(pool.close, 5.0)
            node = PoolNode(pool, "127.0.0.1", 0, f"node{number}", PACE_BYTES_PER_S, STAGING_BYTES)
            undo.callback(node.close, 5.0)
            places.append(node.place)
        client = open_union(None, places, [PACE_BYTES_PER_S] * nodes, follow_bandwidth=False)
        undo.callback(client.close, 5.0)
        yield client


def _stored(client: UnionPool, blocks: int) -> list[BlockKey]:
    """The keys of a prefix that was written."""
    chance = random.Random(7)
    keys = [chance.randbytes(KEY_BYTES) for _ in range(blocks)]
    parents = [bytes(KEY_BYTES), *keys]
    news = [
        NewBlock(key, parent, BLOCK_BYTES, prefix_position(keys[0], at))
        for at, (key, parent) in enumerate(zip(keys, parents, strict=False))
    ]
    memory = aligned_buffer(BLOCK_BYTES)
    for at in range(0, blocks, 64):
        some = news[at : at + 64]
        _wait(lambda done, some=some: client.write_many(some, [memory] * len(some), TIMEOUT_S, done))  # type: ignore[misc]
    return keys


def _read_s(client: UnionPool, keys: Sequence[BlockKey]) -> float:
    """Seconds to read all blocks, asked for at once."""
    memory = aligned_buffer(BLOCK_BYTES * len(keys))
    views = [memory[at * BLOCK_BYTES : (at + 1) * BLOCK_BYTES] for at in range(len(keys))]
    begin_s = time.perf_counter()
    _wait(lambda done: client.read_many(keys, BLOCK_BYTES, views, TIMEOUT_S, done))
    return time.perf_counter() - begin_s


def _wait(begin: Callable[[Callable[[list[PoolError | None]], None]], None]) -> None:
    """Raises the first error of a block, and TimeoutError."""
    ended, results = threading.Event(), list[PoolError | None]()

    def done(errors: list[PoolError | None]) -> None:
        results.extend(errors)
        ended.set()

    begin(done)
    if not ended.wait(2 * TIMEOUT_S):
        raise TimeoutError("a span did not end")
    failed = next((error for error in results if error is not None), None)
    if failed is not None:
        raise failed
