"""The measurements of `penstock bench scale` of copies of hot prefixes: what they do for the reads of one hot prefix,
for the busiest node, and for the hits after a node was lost; each with and without, over paced links of nodes of this
process."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from penstock.bench.scale_paced import BLOCK_BYTES, TIMEOUT_S, PacedPool, buffers, paced_pool, read, store
from penstock.core.keys import KEY_BYTES, BlockKey
from penstock.core.pool.policy import PoolPolicy
from penstock.core.pool.runs import begins_run
from penstock.pool.api import PoolError
from penstock.pool.union.union_pool import UnionPool
from penstock.report import Report

POOLS = {8: "striped", 20: "owners"}  # nodes: how a pool of so many places blocks
SHARE = 0.4
PACE_BYTES_PER_S = 20e6
NODE_BYTES = 16 << 20
HOT_PREFIXES, HOT_BLOCKS = 4, 32
PREFIXES, PREFIX_BLOCKS = 48, 8
POPULARITY = 1.2  # exponent: of the prefixes, the n-th is read in proportion to n ** -POPULARITY
READERS = 4
WARM_READS = 6  # of a prefix, that make it hot
SETTLED_S, QUICK_SETTLED_S, SETTLED_S_MAX = 8.0, 1.0, 60.0  # nothing was copied for so long
Step = Callable[[str], None]


@dataclass(slots=True)
class _Found:
    """What one pool gave."""

    hot_bytes_per_s: float
    hottest_over_mean: float
    hits_kept: float


def measure_copies(report: Report, quick: bool, step: Step) -> None:
    """Add each figure with and without (`..._off`) copies. Raises OSError, PoolError, TimeoutError."""
    reads, draws = (8, 40) if quick else (40, 400)
    for nodes, placed in POOLS.items():
        found = {}
        for share in (0.0, SHARE):
            step(f"a hot prefix is read from {nodes} nodes, {'with' if share else 'without'} copies")
            found[share] = _measure(nodes, share, reads, draws, QUICK_SETTLED_S if quick else SETTLED_S)
        name, on, off = f"copies_{placed}", found[SHARE], found[0.0]
        report.figure(f"{name}_hot_read_ratio", on.hot_bytes_per_s / off.hot_bytes_per_s)
        for end, one in (("", on), ("_off", off)):
            report.figure(f"{name}_hottest_over_mean{end}", one.hottest_over_mean)
            report.figure(f"{name}_hits_kept{end}", one.hits_kept)


def _measure(nodes: int, share: float, reads: int, draws: int, settled_s: float) -> _Found:
    chance = random.Random(7)
    with paced_pool(nodes, NODE_BYTES, PACE_BYTES_PER_S, PoolPolicy(copies_share=share)) as made:
        client = made.client
        hot = [_hot_keys(chance) for _ in range(HOT_PREFIXES)]
        cold = [[chance.randbytes(KEY_BYTES) for _ in range(PREFIX_BLOCKS)] for _ in range(PREFIXES)]
        for keys in (*hot, *cold):
            store(client, keys)
        _read_together(client, hot * WARM_READS)
        _settle(client, share, SETTLED_S_MAX, HOT_PREFIXES * HOT_BLOCKS)
        begin_s = time.perf_counter()
        _read_together(client, hot[:1] * reads)
        rate = reads * HOT_BLOCKS * BLOCK_BYTES / (time.perf_counter() - begin_s)
        drawn = chance.choices(cold, [(at + 1) ** -POPULARITY for at in range(PREFIXES)], k=draws)
        _read_together(client, drawn)
        _settle(client, share, settled_s)
        before = _sent(made)
        _read_together(client, drawn)
        sent = [after - so_far for after, so_far in zip(_sent(made), before, strict=True)]
        return _Found(rate, max(sent) * nodes / sum(sent), _kept(made, hot))


def _hot_keys(chance: random.Random) -> list[BlockKey]:
    """Keys of a prefix that is one run."""
    keys: list[BlockKey] = []
    while len(keys) < HOT_BLOCKS:
        key = chance.randbytes(KEY_BYTES)
        if not begins_run(key):
            keys.append(key)
    return keys


def _kept(made: PacedPool, hot: Sequence[Sequence[BlockKey]]) -> float:
    """The share of some prefixes that is read after the node where the first one's last block was found has ended."""
    hit = made.client.lookup(hot[0], TIMEOUT_S)[-1]
    assert hit is not None, "it was read"
    next(node for node in made.nodes if hit.route[-1] == f"net@{node.place}").close(5.0)
    kept_blocks = 0
    for keys in hot:
        hits = made.client.lookup(keys, TIMEOUT_S)
        kept = next((at for at, hit in enumerate(hits) if hit is None), len(keys))
        kept_blocks += read(made.client, keys[:kept], buffers(kept)).count(None) if kept else 0
    return kept_blocks / sum(map(len, hot))


def _sent(made: PacedPool) -> list[int]:
    return [sum(member.read_bytes for member in pool.stat(1.0).members) for pool in made.pools]


def _settle(client: UnionPool, share: float, settled_s: float, blocks: int | None = None) -> None:
    """Wait until so many blocks were copied; without a number, until no further one was for `settled_s`."""
    until_s, since_s, before = time.monotonic() + SETTLED_S_MAX, time.monotonic(), -1
    while share and time.monotonic() < until_s:
        copied = client.stat(TIMEOUT_S).copied_blocks
        if copied != before:
            before, since_s = copied, time.monotonic()
        if copied >= blocks if blocks is not None else time.monotonic() - since_s >= settled_s:
            return
        time.sleep(0.1)


def _read_together(client: UnionPool, prefixes: Sequence[Sequence[BlockKey]]) -> None:
    """READERS threads read these prefixes in turn. Raises the first error."""
    left = list(reversed(prefixes))
    lock = threading.Lock()
    failed: list[BaseException] = []

    def run() -> None:
        while not failed:
            with lock:
                if not left:
                    return
                keys = left.pop()
            try:
                if None in client.lookup(keys, TIMEOUT_S) or any(read(client, keys, buffers(len(keys)))):
                    raise PoolError("missing", "a block that was written was not read")
            except (PoolError, TimeoutError) as error:
                failed.append(error)

    threads = [threading.Thread(target=run) for _ in range(READERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
