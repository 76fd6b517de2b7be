"""Pool nodes of this process with paced links, and prefixes written to them and read from them by a client."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from penstock.core.keys import KEY_BYTES, BlockKey
from penstock.core.new_block import NewBlock, prefix_position
from penstock.core.pool.policy import PoolPolicy
from penstock.core.spans import SPAN_BLOCKS_MAX
from penstock.io.memory import aligned_buffer
from penstock.pool.api import PoolError
from penstock.pool.local.local_pool import LocalPool
from penstock.pool.members.memory import MemoryMember
from penstock.pool.net.connect import open_union
from penstock.pool.net.node import PoolNode
from penstock.pool.union.union_pool import UnionPool

BLOCK_BYTES = 32 << 10
STAGING_BYTES = 4 << 20
TIMEOUT_S = 60.0
Ended = Callable[[list[PoolError | None]], None]


@dataclass(slots=True)
class PacedPool:
    """Nodes, and a client of them."""

    pools: list[LocalPool] = field(default_factory=list)
    nodes: list[PoolNode] = field(default_factory=list)
    client: UnionPool = field(init=False)


@contextlib.contextmanager
def paced_pool(
    nodes: int, node_bytes: int, bytes_per_s: float, policy: PoolPolicy | None = None
) -> Iterator[PacedPool]:
    """So many nodes, each with `node_bytes` of memory and a link of `bytes_per_s`."""
    made = PacedPool()
    with contextlib.ExitStack() as undo:
        for number in range(nodes):
            pool = LocalPool([MemoryMember("memory:0", node_bytes)], [1e9], policy)
            undo.callback(pool.close, 5.0)
            node = PoolNode(pool, "127.0.0.1", 0, f"node{number}", bytes_per_s, STAGING_BYTES)
            undo.callback(node.close, 5.0)
            made.pools.append(pool)
            made.nodes.append(node)
        places, weights = [node.place for node in made.nodes], [bytes_per_s] * nodes
        made.client = open_union(None, places, weights, follow_bandwidth=False)
        undo.callback(made.client.close, 5.0)
        yield made


def store(client: UnionPool, keys: Sequence[BlockKey]) -> None:
    """Write a prefix of blocks with these keys. Raises the first PoolError, and TimeoutError."""
    parents = [bytes(KEY_BYTES), *keys]
    blocks = [
        NewBlock(key, parent, BLOCK_BYTES, prefix_position(keys[0], at))
        for at, (key, parent) in enumerate(zip(keys, parents, strict=False))
    ]
    memory = aligned_buffer(BLOCK_BYTES)
    for at in range(0, len(blocks), SPAN_BLOCKS_MAX):
        some = blocks[at : at + SPAN_BLOCKS_MAX]
        raise_first(_ends(partial(client.write_many, some, [memory] * len(some), TIMEOUT_S)))


def buffers(blocks: int) -> list[memoryview]:
    """Memory to read so many blocks into."""
    memory = aligned_buffer(BLOCK_BYTES * blocks)
    return [memory[at * BLOCK_BYTES : (at + 1) * BLOCK_BYTES] for at in range(blocks)]


def read(client: UnionPool, keys: Sequence[BlockKey], intos: Sequence[memoryview]) -> list[PoolError | None]:
    """Read blocks, asked for at once; an error or None for each. Raises TimeoutError."""
    return _ends(partial(client.read_many, keys, BLOCK_BYTES, intos, TIMEOUT_S))


def raise_first(errors: Sequence[PoolError | None]) -> None:
    """Raises the first of the errors, if there is one."""
    for error in filter(None, errors):
        raise error


def _ends(begin: Callable[[Ended], object]) -> list[PoolError | None]:
    """How each block of what is begun ended. Raises TimeoutError."""
    ended, results = threading.Event(), list[PoolError | None]()

    def done(errors: list[PoolError | None]) -> None:
        results.extend(errors)
        ended.set()

    begin(done)
    if not ended.wait(2 * TIMEOUT_S):
        raise TimeoutError("a span did not end")
    return results
