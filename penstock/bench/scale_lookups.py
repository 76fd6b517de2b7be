"""The lookups of `penstock bench scale`: of a prefix that lies on many nodes, and at one node alone."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from penstock.bench.process_cpu import cpu_s
from penstock.bench.processes import pool_process
from penstock.bench.scale_bare import BareNodes, bare_nodes_process
from penstock.bench.scale_blocks import BLOCK_TOKENS, MEMORY_BYTES, TIMEOUT_S, prefix, store, without_collector
from penstock.bench.scale_nodes import Nodes
from penstock.core.keys import KEY_BYTES, BlockKey
from penstock.core.pool.runs import FIRST_PARTS
from penstock.pool.api import Located, Pool, PoolError
from penstock.pool.net import wire
from penstock.pool.net.connect import connect_pool, open_union

BEGINNING_BLOCKS, OWN_BLOCKS = 2, 2  # of short prompts
FIRST_LOOKUPS = 5  # of clients that have just connected
PAUSE_S = 0.4  # a node's connection has no thread any more


@dataclass(frozen=True, slots=True)
class Lookups:
    """Of a lookup of a prefix that lies on many nodes: milliseconds, the median; CPU milliseconds of this process, and
    of it and the nodes', the mean; and how many nodes it asks. `two_rounds_ms`: by a client that never saw the prefix;
    `half_there_ms`: of a prefix whose second half is nowhere. `bare_*`: of its bytes alone."""

    took_ms: float
    client_cpu_ms: float
    cpu_ms: float
    asked: int
    two_rounds_ms: float
    half_there_ms: float
    bare_ms: float
    bare_cpu_ms: float


def lookup_ms(nodes: int, blocks: int, lookups: int, apart: bool = True) -> Lookups:
    """Measure lookups of a prefix of `blocks` blocks on `nodes` nodes, which have a process each (`apart`), or are in
    one."""
    size = 4096
    with contextlib.ExitStack() as undo:
        process = undo.enter_context(Nodes(nodes, MEMORY_BYTES, apart))
        pool = open_union(None, process.places, [1e9] * nodes)
        undo.callback(pool.close, 5.0)
        long = prefix(bytes(KEY_BYTES), [7] * blocks * BLOCK_TOKENS, size)
        store(pool, long, size)
        keys = [block.key for block in long]
        held = Counter(hit.route[-1] for hit in _found(pool, keys) if hit is not None)
        took = _repeated(lambda: _found(pool, keys), lookups, process.pids)
        two_rounds = [_first_lookup_ms(process.places, keys) for _ in range(FIRST_LOOKUPS)]
        pool.evict(keys[blocks // 2 :])
        half = _repeated(lambda: _found(pool, keys, blocks // 2), lookups, process.pids)
        process.check()
        bare = _bare(nodes, list(held.values()), lookups)
    figures = took.median_ms, took.here_cpu_ms, took.cpu_ms, len(held), median(two_rounds), half.median_ms
    return Lookups(*figures, bare.median_ms, bare.cpu_ms)


def _found(pool: Pool, keys: Sequence[BlockKey], there: int | None = None) -> list[Located | None]:
    """Look a prefix up whose first blocks are there, all of them where it is not said how many."""
    there = len(keys) if there is None else there
    found = pool.lookup(keys, TIMEOUT_S)
    if not all(found[:there]):  # `None in found` would compare each, in Python
        raise PoolError("missing", f"{found[:there].count(None)} of {there} blocks were not found")
    return found


def _first_lookup_ms(places: Sequence[str], keys: Sequence[BlockKey]) -> float:
    """Milliseconds of the first lookup of a prefix by a client that has just connected."""
    pool = open_union(None, places, [1e9] * len(places))
    try:
        _found(pool, keys[-1:], 0)  # its connections are as they are between two lookups
        begin_s = time.perf_counter()
        _found(pool, keys)
        return 1e3 * (time.perf_counter() - begin_s)
    finally:
        pool.close(5.0)


def hottest_over_mean(nodes: int, prefixes: int) -> float:
    """Write so many short prefixes that all begin alike; the blocks of the fullest node over the mean."""
    size = 4096
    with contextlib.ExitStack() as undo:
        pool = open_union(None, undo.enter_context(Nodes(nodes, MEMORY_BYTES, apart=False)).places, [1e9] * nodes)
        undo.callback(pool.close, 5.0)
        system = [1] * BEGINNING_BLOCKS * BLOCK_TOKENS
        chains = [
            prefix(bytes(KEY_BYTES), [*system, *[number] * OWN_BLOCKS * BLOCK_TOKENS], size)
            for number in range(2, prefixes + 2)
        ]
        store(pool, [*chains[0], *(block for chain in chains[1:] for block in chain[BEGINNING_BLOCKS:])], size)
        each = [member.blocks for member in pool.stat(TIMEOUT_S).members]
    return max(each) * len(each) / sum(each)


def lookup_us(blocks: int, lookups: int) -> tuple[float, float]:
    """CPU microseconds of a node's process, and of this one, for a lookup of so many blocks at this node alone."""
    with _node_with(blocks) as (pid, pool, keys):
        begin_s, node_begin_s = time.process_time(), cpu_s(pid)
        for _ in range(lookups):
            _found(pool, keys)
        node_s, client_s = cpu_s(pid) - node_begin_s, time.process_time() - begin_s
    return 1e6 * node_s / lookups, 1e6 * client_s / lookups


def lookup_after_pause_us(blocks: int, lookups: int) -> float:
    """CPU microseconds of a node's process, the median, from the question to the answer of a lookup of so many blocks
    at this node alone, where the last one was a while ago."""
    took_s = list[float]()
    with _node_with(blocks) as (pid, pool, keys):
        for _ in range(lookups):
            time.sleep(PAUSE_S)
            begin_s = cpu_s(pid)
            _found(pool, keys)
            took_s.append(cpu_s(pid) - begin_s)
    return 1e6 * median(took_s)


@contextlib.contextmanager
def _node_with(blocks: int) -> Iterator[tuple[int, Pool, list[BlockKey]]]:
    """A node's process that has so many blocks of one prefix, its client, and their keys."""
    news = prefix(bytes(KEY_BYTES), [7] * blocks * BLOCK_TOKENS, 4096)
    with contextlib.ExitStack() as undo:
        node = undo.enter_context(pool_process("--listen", "127.0.0.1:0", "--memory", str(MEMORY_BYTES)))
        pool = connect_pool(node.address)
        undo.callback(pool.close, 5.0)
        store(pool, news, 4096)
        keys = [block.key for block in news]
        _found(pool, keys)
        yield node.pid, pool, keys


def _bare(nodes: int, keys_of_nodes: Sequence[int], lookups: int) -> Repeated:
    """As `_repeated`, of the bytes of a lookup that asks nodes for so many keys each."""
    asks = [(_frame_bytes(keys), _answer_bytes(keys)) for keys in keys_of_nodes]
    rounds = [asks[:FIRST_PARTS], asks[FIRST_PARTS:]]
    with contextlib.ExitStack() as undo:
        process = undo.enter_context(bare_nodes_process(nodes))
        bare = BareNodes(process.address, nodes)
        undo.callback(bare.close)
        bare.ask(rounds)
        return _repeated(lambda: bare.ask(rounds), lookups, [process.pid])


def _frame_bytes(keys: int) -> int:
    return len(wire.frame(wire.Lookup(1, TIMEOUT_S, bytes(keys * KEY_BYTES))))


def _answer_bytes(keys: int) -> int:
    return len(wire.frame(wire.found(1, [Located(4096, ("memory:0",))] * keys)))


@dataclass(frozen=True, slots=True)
class Repeated:
    """Of what was done many times: milliseconds of one time, the median; CPU milliseconds of this process, and of it
    and others, the mean."""

    median_ms: float
    here_cpu_ms: float
    cpu_ms: float


def _repeated(work: Callable[[], object], times: int, pids: Sequence[int]) -> Repeated:
    """Do it so many times; `pids` are the other processes that count."""
    took_s: list[float] = []
    with without_collector():
        begin_cpu_s, others_begin_s = time.process_time(), cpu_s(*pids)
        for _ in range(times):
            begin_s = time.perf_counter()
            work()
            took_s.append(time.perf_counter() - begin_s)
        here_s = time.process_time() - begin_cpu_s
        all_s = here_s + cpu_s(*pids) - others_begin_s
    return Repeated(1e3 * median(took_s), 1e3 * here_s / times, 1e3 * all_s / times)
