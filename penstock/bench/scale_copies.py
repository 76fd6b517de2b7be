"""The measurements of `penstock bench scale` of copies of hot prefixes: what they do for the reads of one hot prefix,
for the busiest node, and for the hits after a node was lost; each with and without, over paced links of nodes of this
process."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from penstock.core.keys import KEY_BYTES, BlockKey
from penstock.core.new_block import NewBlock, prefix_position
from penstock.core.pool.policy import PoolPolicy
from penstock.core.pool.runs import begins_run
from penstock.io.memory import aligned_buffer
from penstock.pool.api import PoolError
from penstock.pool.local.local_pool import LocalPool
from penstock.pool.members.memory import MemoryMember
from penstock.pool.net.connect import open_union
from penstock.pool.net.node import PoolNode
from penstock.pool.union.union_pool import UnionPool
from penstock.report import Report

POOLS = {8: "striped", 20: "owners"}  # nodes: how a pool of so many places blocks
SHARE = 0.4
BLOCK_BYTES = 32 << 10
PACE_BYTES_PER_S = 20e6
NODE_BYTES = 16 << 20
STAGING_BYTES = 4 << 20
HOT_PREFIXES, HOT_BLOCKS = 4, 32
PREFIXES, PREFIX_BLOCKS = 48, 8
POPULARITY = 1.2  # exponent: of the prefixes, the n-th is read in proportion to n ** -POPULARITY
READERS = 4
WARM_READS = 6  # of a prefix, that make it hot
SETTLED_S, QUICK_SETTLED_S, SETTLED_S_MAX = 8.0, 1.0, 60.0  # nothing was copied for so long
TIMEOUT_S = 60.0
Step = Callable[[str], None]


@dataclass(slots=True)
class _Found:
    """What one pool gave."""

    hot_bytes_per_s: float
    hottest_over_mean: float
    hits_kept: float


@dataclass(slots=True)
class _Nodes:
    """Nodes of this process with paced links, and a client of them."""

    pools: list[LocalPool] = field(default_factory=list)
    nodes: list[PoolNode] = field(default_factory=list)
    client: UnionPool = field(init=False)


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
    with _pool(nodes, share) as made:
        client = made.client
        hot = [_hot_keys(chance) for _ in range(HOT_PREFIXES)]
        cold = [[chance.randbytes(KEY_BYTES) for _ in range(PREFIX_BLOCKS)] for _ in range(PREFIXES)]
        for keys in (*hot, *cold):
            _store(client, keys)
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


def _kept(made: _Nodes, hot: Sequence[Sequence[BlockKey]]) -> float:
    """The share of some prefixes that is read after the node where the first one's last block was found has ended."""
    hit = made.client.lookup(hot[0], TIMEOUT_S)[-1]
    assert hit is not None, "it was read"
    next(node for node in made.nodes if hit.route[-1] == f"net@{node.place}").close(5.0)
    read = 0
    for keys in hot:
        hits = made.client.lookup(keys, TIMEOUT_S)
        kept = next((at for at, hit in enumerate(hits) if hit is None), len(keys))
        read += sum(_read(made.client, keys[:kept])) if kept else 0
    return read / sum(map(len, hot))


def _sent(made: _Nodes) -> list[int]:
    return [sum(member.read_bytes for member in pool.stat(1.0).members) for pool in made.pools]


@contextlib.contextmanager
def _pool(nodes: int, share: float) -> Iterator[_Nodes]:
    made = _Nodes()
    with contextlib.ExitStack() as undo:
        for number in range(nodes):
            members = [MemoryMember("memory:0", NODE_BYTES)]
            pool = LocalPool(members, [1e9], PoolPolicy(copies_share=share))
            undo.callback(pool.close, 5.0)
            node = PoolNode(pool, "127.0.0.1", 0, f"node{number}", PACE_BYTES_PER_S, STAGING_BYTES)
            undo.callback(node.close, 5.0)
            made.pools.append(pool)
            made.nodes.append(node)
        places, weights = [node.place for node in made.nodes], [PACE_BYTES_PER_S] * nodes
        made.client = open_union(None, places, weights, follow_bandwidth=False)
        undo.callback(made.client.close, 5.0)
        yield made


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


def _store(client: UnionPool, keys: Sequence[BlockKey]) -> None:
    parents = [bytes(KEY_BYTES), *keys]
    blocks = [
        NewBlock(key, parent, BLOCK_BYTES, prefix_position(keys[0], at))
        for at, (key, parent) in enumerate(zip(keys, parents, strict=False))
    ]
    memory = aligned_buffer(BLOCK_BYTES)
    _wait(lambda done: client.write_many(blocks, [memory] * len(blocks), TIMEOUT_S, done), len(blocks))


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
                if None in client.lookup(keys, TIMEOUT_S) or not all(_read(client, keys)):
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


def _read(client: UnionPool, keys: Sequence[BlockKey]) -> list[bool]:
    """Whether each block was read."""
    memory = aligned_buffer(BLOCK_BYTES * len(keys))
    views = [memory[at * BLOCK_BYTES : (at + 1) * BLOCK_BYTES] for at in range(len(keys))]
    return _ends(lambda done: client.read_many(keys, BLOCK_BYTES, views, TIMEOUT_S, done))


def _ends(begin: Callable[[Callable[[list[PoolError | None]], None]], None]) -> list[bool]:
    """Whether each block of a span ended well. Raises TimeoutError."""
    ended, results = threading.Event(), list[PoolError | None]()

    def done(errors: list[PoolError | None]) -> None:
        results.extend(errors)
        ended.set()

    begin(done)
    if not ended.wait(2 * TIMEOUT_S):
        raise TimeoutError("a span did not end")
    return [error is None for error in results]


def _wait(begin: Callable[[Callable[[list[PoolError | None]], None]], None], blocks: int) -> None:
    if _ends(begin) != [True] * blocks:
        raise PoolError("full", "a block was not stored")
