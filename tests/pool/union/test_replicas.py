"""Copies of hot blocks on second nodes, over real sockets: hits stay, loads spread, bounds hold, and off is off."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from typer.testing import CliRunner

from penstock.core.keys import KEY_BYTES, BlockKey
from penstock.core.new_block import tenant_tag
from penstock.core.pool.copies import COPY_MARK
from penstock.core.pool.placement import STRIPED_NODES_MAX
from penstock.core.pool.policy import PoolPolicy
from penstock.pool.api import Located, Pool, PoolError
from penstock.pool.local.local_pool import LocalPool
from penstock.pool.members.memory import MemoryMember
from penstock.pool.net.connect import connect_pool, open_union
from penstock.pool.net.node import PoolNode
from penstock.pool.node_backend import OpenedBlock
from penstock.pool.setup.node_metrics import node_metrics
from penstock.pool.setup.pool_command import pool_app
from penstock.pool.union.union_pool import UnionPool
from penstock.units import format_bytes
from tests.pool.helpers import ROOT, Outcome, block_bytes, chain, new_block, staged, until

MIB = 1 << 20
GB_PER_S = 1e9
SHARE = 0.25
SIZES = (4, STRIPED_NODES_MAX + 2)  # a striped pool, and one with owners


class CountingPool(LocalPool):
    """A pool that counts what it is asked for and what is read from it."""

    asked = 0
    opened = 0

    def locate(self, keys: bytes, timeout_s: float) -> Located | list[Located | None]:
        self.asked += len(keys) // KEY_BYTES
        return super().locate(keys, timeout_s)

    def open_block(self, key: BlockKey, size_bytes: int | None) -> OpenedBlock | PoolError:  # type: ignore[override]
        self.opened += 1
        return super().open_block(key, size_bytes)

    def open_blocks(self, keys: Sequence[BlockKey], size_bytes: int) -> list[OpenedBlock | PoolError]:
        self.opened += len(keys)
        return super().open_blocks(keys, size_bytes)


class Fleet:
    """Nodes of this process, and unions of them."""

    def __init__(self, nodes: int, share: float = SHARE, memory_bytes: int = 2 * MIB, hosts: int = 1) -> None:
        self.pools = [
            CountingPool([MemoryMember("memory:0", memory_bytes)], [GB_PER_S], PoolPolicy(copies_share=share))
            for _ in range(nodes)
        ]
        self.nodes = [
            PoolNode(pool, f"127.0.0.{1 + at % hosts}", 0, staging_capacity_bytes=4 * MIB)
            for at, pool in enumerate(self.pools)
        ]
        self.unions: list[UnionPool] = []

    def union(self) -> UnionPool:
        places = [node.place for node in self.nodes]
        union = open_union(None, places, [GB_PER_S] * len(places), connect_timeout_s=5.0)
        self.unions.append(union)
        return union

    def copies(self) -> list[int]:
        """Bytes of copies on each node."""
        return [sum(held for _, held in pool.stat(1.0).copies) for pool in self.pools]

    def close(self) -> None:
        for some in (self.unions, self.nodes, self.pools):
            with ThreadPoolExecutor(8) as threads:
                list(threads.map(lambda one: one.close(5.0), some))


@pytest.fixture(params=SIZES, ids=["striped", "owners"])
def fleet(request: pytest.FixtureRequest) -> Iterator[Fleet]:
    fleet = Fleet(request.param)
    yield fleet
    fleet.close()


def keys_of(name: object, length: int) -> list[BlockKey]:
    return [key for key, _ in chain(name, length)]


def store(pool: UnionPool, keys: Sequence[BlockKey], tenant: str = "") -> None:
    parents = [ROOT, *keys]
    blocks = [
        new_block(key, parent, position=1000 + at, tenant=tenant)
        for at, (key, parent) in enumerate(zip(keys, parents, strict=False))
    ]
    ended = Outcome()
    datas = [staged(block.key, 4096) for block in blocks]
    pool.write_many(blocks, datas, 20.0, lambda errors: ended(next(filter(None, errors), None)))
    assert ended.reason(30.0) == "ok"


def load(pool: UnionPool, keys: Sequence[BlockKey]) -> list[str]:
    """Look blocks up, and read those that are found, in one call; how each ended."""
    hits = pool.lookup(keys, 10.0)
    some = [key for key, hit in zip(keys, hits, strict=True) if hit is not None]
    return [*(read_some(pool, some) if some else ()), *["miss"] * (len(keys) - len(some))]


def read_some(pool: Pool, keys: Sequence[BlockKey]) -> list[str]:
    ended: list[list[PoolError | None]] = []
    intos = [staged(ROOT, 4096) for _ in keys]
    waits = Outcome()

    def done(errors: list[PoolError | None]) -> None:
        ended.append(errors)
        waits(None)

    pool.read_many(keys, 4096, intos, 10.0, done)
    waits.get(20.0)
    for key, into, error in zip(keys, intos, ended[0], strict=True):
        assert error is not None or into[:4096] == block_bytes(key, 4096), "another block's bytes"
    return ["ok" if error is None else error.reason for error in ended[0]]


def make_hot(pool: UnionPool, keys: Sequence[BlockKey]) -> None:
    for _ in range(4):
        assert load(pool, keys) == ["ok"] * len(keys)


def copied(fleet: Fleet, blocks: int) -> bool:
    return sum(fleet.copies()) >= blocks * 4096


def test_a_hot_prefix_gets_one_copy_of_each_block(fleet: Fleet) -> None:
    union = fleet.union()
    hot, cold = keys_of("hot", 100), keys_of("cold", 100)
    store(union, hot)
    store(union, cold)
    make_hot(union, hot)
    assert load(union, cold) == ["ok"] * 100
    until(lambda: copied(fleet, 100), 30.0)
    make_hot(union, hot)
    time.sleep(0.3)
    assert sum(fleet.copies()) == 100 * 4096
    holders = [sum(pool.kind_of(key) is not None for pool in fleet.pools) for key in [*hot, *cold]]
    assert holders == [2] * 100 + [1] * 100
    assert union.stat(5.0).copied_blocks == 100


def test_a_prefix_that_several_engines_read_once_each_gets_copies(fleet: Fleet) -> None:
    engines = [fleet.union() for _ in range(4)]
    hot = keys_of("hot", 64)
    store(engines[0], hot)
    for engine in engines:
        assert load(engine, hot) == ["ok"] * 64
    until(lambda: copied(fleet, 64), 30.0)


def test_a_lost_node_costs_no_hit_of_what_had_two_copies(fleet: Fleet) -> None:
    union, other = fleet.union(), fleet.union()
    hot = keys_of("hot", 120)
    store(union, hot)
    place = str(other.lookup(hot, 10.0)[60].route[-1])
    lost = [node.place for node in fleet.nodes].index(place.removeprefix("net@"))
    cold, expected = list[list[BlockKey]](), list[int]()
    while len(cold) < 20 or min(expected) == 4:
        cold.append(keys_of(("cold", len(cold)), 4))
        store(union, cold[-1])
        expected.append(next((at for at, key in enumerate(cold[-1]) if fleet.pools[lost].kind_of(key)), 4))
    make_hot(union, hot)
    until(lambda: copied(fleet, 120), 30.0)
    fleet.nodes[lost].close(5.0)
    for pool in (union, other):
        assert load(pool, hot) == ["ok"] * 120
        assert [load(pool, keys)[:length] for keys, length in zip(cold, expected, strict=True)] == [
            ["ok"] * length for length in expected
        ]
    assert all(union.lookup(keys, 5.0)[at] is None for keys, at in zip(cold, expected, strict=True) if at < 4)


def test_reads_that_a_lost_node_had_begun_are_read_from_the_copies(fleet: Fleet) -> None:
    union = fleet.union()
    hot = keys_of("hot", 64)
    store(union, hot)
    make_hot(union, hot)
    until(lambda: copied(fleet, 64), 30.0)
    make_hot(union, hot)
    hits = union.lookup(hot, 10.0)
    assert None not in hits
    lost = next(at for at, pool in enumerate(fleet.pools) if pool.kind_of(hot[0]) is not None)
    fleet.pools[lost].close(5.0)  # the node answers, and has nothing
    assert read_some(union, hot) == ["ok"] * 64
    stat = union.stat(5.0)
    assert stat.saved_reads > 0 and stat.copy_reads > 0


def test_reads_of_a_hot_prefix_spread_over_both_holders(fleet: Fleet) -> None:
    union = fleet.union()
    hot = keys_of("hot", 40)
    store(union, hot)
    make_hot(union, hot)
    until(lambda: copied(fleet, 40), 30.0)
    for pool in fleet.pools:
        pool.opened = 0
    for _ in range(10):
        assert load(union, hot) == ["ok"] * 40
    at_copies = union.stat(5.0).copy_reads
    assert sum(pool.opened for pool in fleet.pools) == 400
    assert 100 <= at_copies <= 300, "about half of the reads go to each of two nodes"


@pytest.mark.parametrize("nodes", SIZES)
def test_copies_keep_to_their_share_and_cost_no_original(nodes: int) -> None:
    fleet = Fleet(nodes, share=0.1, memory_bytes=MIB)
    try:
        union = fleet.union()
        prefixes = [keys_of(("hot", at), 8) for at in range(nodes * 256 * 3 // 10 // 8)]
        for keys in prefixes:
            store(union, keys)
        before = [pool.stat(1.0).members[0].blocks for pool in fleet.pools]
        with ThreadPoolExecutor(4) as readers:
            for _ in range(6):
                assert all(found == ["ok"] * 8 for found in readers.map(partial(load, union), prefixes))
            until(lambda: sum(fleet.copies()) > 0.06 * nodes * MIB, 60.0)
            time.sleep(0.5)
            assert all(found == ["ok"] * 8 for found in readers.map(partial(load, union), prefixes))
        for pool, originals in zip(fleet.pools, before, strict=True):
            stat = pool.stat(1.0)  # copies may still be made
            held = sum(held for _, held in stat.copies)
            assert held <= 0.1 * MIB
            assert stat.members[0].blocks - held // 4096 == originals
            pool.check_integrity()
    finally:
        fleet.close()


@pytest.mark.parametrize("nodes", SIZES)
def test_off_is_off(nodes: int) -> None:
    fleet = Fleet(nodes, share=0.0)
    try:
        union = fleet.union()
        hot = keys_of("hot", 64)
        store(union, hot)
        for pool in fleet.pools:
            pool.asked = pool.opened = 0
        for _ in range(6):
            assert load(union, hot) == ["ok"] * 64
        time.sleep(0.5)
        lookups = nodes if nodes <= STRIPED_NODES_MAX else 1
        assert sum(pool.asked for pool in fleet.pools) == 6 * 64 * lookups
        assert sum(pool.opened for pool in fleet.pools) == 6 * 64
        assert sum(fleet.copies()) == 0
        stat = union.stat(5.0)
        assert (stat.copied_blocks, stat.copy_reads, stat.saved_reads) == (0, 0, 0)
    finally:
        fleet.close()


def test_a_node_takes_no_copies_that_it_did_not_offer() -> None:
    fleet = Fleet(1, share=0.0)
    try:
        client = connect_pool(fleet.nodes[0].place)
        assert not client.takes_copies
        client.close(1.0)
    finally:
        fleet.close()


@pytest.mark.parametrize("nodes", SIZES)
def test_a_copy_lies_on_another_host_where_there_is_one(nodes: int) -> None:
    fleet = Fleet(nodes, hosts=2)
    try:
        union, hot = fleet.union(), keys_of("hot", 40)
        store(union, hot)
        make_hot(union, hot)
        until(lambda: copied(fleet, 40), 30.0)
        for key in hot:
            holders = [at for at, pool in enumerate(fleet.pools) if pool.kind_of(key) is not None]
            assert len(holders) == 2 and {at % 2 for at in holders} == {0, 1}
        other = fleet.union()
        fleet.nodes[1].close(5.0)
        assert load(other, hot) == ["ok"] * 40, "found by who never saw them, though the host has other nodes"
        for at in range(3, nodes, 2):
            fleet.nodes[at].close(5.0)
        assert load(union, hot) == ["ok"] * 40
    finally:
        fleet.close()


def test_what_a_lost_node_had_is_found_there_again_once_it_is_back_without_it() -> None:
    fleet = Fleet(STRIPED_NODES_MAX + 2)
    try:
        union, hot = fleet.union(), keys_of("hot", 40)
        store(union, hot)
        make_hot(union, hot)
        until(lambda: copied(fleet, 40), 30.0)
        lost = next(at for at, pool in enumerate(fleet.pools) if pool.kind_of(hot[0]) and not pool.stat(1.0).copies)
        fleet.pools[lost].evict(hot)
        fleet.nodes[lost].close(5.0)
        address = fleet.nodes[lost].address
        fleet.nodes[lost] = PoolNode(fleet.pools[lost], *address, staging_capacity_bytes=4 * MIB)
        until(lambda: all(member.healthy for member in union.stat(5.0).members), 20.0)
        assert load(union, hot) == ["ok"] * 40
        until(lambda: fleet.pools[lost].kind_of(hot[0]) is not None, 30.0)
        assert fleet.pools[lost].stat(1.0).copies == (), "moved to its owner as an original"
    finally:
        fleet.close()


def test_a_node_that_is_a_client_of_others_reads_their_copies_too() -> None:
    fleet = Fleet(4)
    try:
        places = [node.place for node in fleet.nodes]
        union = open_union(None, places, [GB_PER_S] * 4, for_node=True)
        front = PoolNode(union, "127.0.0.1", 0, staging_capacity_bytes=4 * MIB)
        client = connect_pool(front.place)
        try:
            hot = keys_of("hot", 40)
            store(union, hot)
            for _ in range(4):
                assert None not in client.lookup(hot, 10.0)
                assert read_some(client, hot) == ["ok"] * 40
            until(lambda: copied(fleet, 40), 30.0)
            assert None not in client.lookup(hot, 10.0)
            fleet.pools[0].close(5.0)
            assert read_some(client, hot) == ["ok"] * 40
            assert client.stat(5.0).saved_reads > 0
        finally:
            client.close(5.0)
            front.close(5.0)
            union.close(5.0)
    finally:
        fleet.close()


def all_left(pool: LocalPool, copies: Sequence[BlockKey]) -> bool:
    """Evict copies; a node unpins a block that was read shortly after its client has it."""
    pool.evict(copies)
    return not pool.stat(1.0).copies


@pytest.mark.parametrize("nodes", SIZES)
def test_copies_that_leave_while_others_read_them_cost_no_read(nodes: int) -> None:
    fleet = Fleet(nodes)
    try:
        union, hot = fleet.union(), keys_of("hot", 60)
        store(union, hot)
        make_hot(union, hot)
        until(lambda: copied(fleet, 60), 30.0)
        with ThreadPoolExecutor(4) as readers:
            for pool in fleet.pools:
                reads = [readers.submit(load, union, hot) for _ in range(6)]
                copies = [key for key in hot if (row := pool.origins([key])[0]) and len(row.tenant) == len(COPY_MARK)]
                pool.evict(copies)
                assert all(read.result(30.0) == ["ok"] * 60 for read in reads)
                until(partial(all_left, pool, copies), 10.0)
        assert sum(fleet.copies()) == 0
        time.sleep(0.5)
        make_hot(union, hot)
        assert sum(fleet.copies()) == 0, "not made again at once"
    finally:
        fleet.close()


def test_what_copies_hold_is_in_the_metrics_of_a_node_and_in_its_stat() -> None:
    fleet = Fleet(2)
    try:
        union, hot = fleet.union(), keys_of("hot", 10)
        store(union, hot, tenant="t")
        make_hot(union, hot)
        until(lambda: copied(fleet, 10), 30.0)
        bytes_held = fleet.copies()
        for node, pool, held in zip(fleet.nodes, fleet.pools, bytes_held, strict=True):
            line = f'penstock_pool_copy_bytes{{tenant="{tenant_tag("t").hex()}"}} {float(held)}'
            assert line in node_metrics(node, pool).decode()
            shown = CliRunner().invoke(pool_app, ["stat", node.place])
            assert f"copies of other nodes' blocks: {format_bytes(held)}, of 1 tenants" in shown.output
        assert sum(bytes_held) == 10 * 4096 and min(bytes_held) > 0
        assert dict(union.stat(5.0).copies) == {tenant_tag("t").hex(): 10 * 4096}
    finally:
        fleet.close()
