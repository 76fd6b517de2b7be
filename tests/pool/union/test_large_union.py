"""Many nodes as one pool, over real sockets: only owners are asked, and nothing is lost beside them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest

from penstock.core.keys import KEY_BYTES
from penstock.core.new_block import tenant_tag
from penstock.core.pool.placement import STRIPED_NODES_MAX
from penstock.core.pool.runs import FIRST_PARTS, begins_run
from penstock.pool.api import Located
from penstock.pool.local.local_pool import LocalPool
from penstock.pool.members.memory import MemoryMember
from penstock.pool.net.connect import connect_pool, open_union
from penstock.pool.net.node import PoolNode
from penstock.pool.net.remote import RemotePool
from penstock.pool.node_backend import BlockOrigin
from penstock.pool.setup.open import open_local_pool
from penstock.pool.union.union_pool import UnionPool
from tests.call_counts import all_calls
from tests.pool.helpers import ROOT, Outcome, chain, key_of, new_block, read, staged, until, write

MIB = 1 << 20
GB_PER_S = 1e9
NODES = STRIPED_NODES_MAX + 2


class CountingPool(LocalPool):
    """A pool that counts the keys it is asked for, and how often it is asked."""

    asked = lookups = 0

    def locate(self, keys: bytes, timeout_s: float) -> Located | list[Located | None]:
        self.asked += len(keys) // KEY_BYTES
        self.lookups += 1
        return super().locate(keys, timeout_s)


class Fleet:
    """Nodes of this process and unions of them, closed in reverse order."""

    def __init__(self) -> None:
        self.pools = [self._pool() for _ in range(NODES)]
        self.nodes = [PoolNode(pool, "127.0.0.1", 0, staging_capacity_bytes=4 * MIB) for pool in self.pools]
        self.clients: list[UnionPool | RemotePool] = []

    def _pool(self) -> CountingPool:
        # Room for all blocks of a test: ports, and so the map, differ from run to run.
        return CountingPool([MemoryMember("memory:0", 8 * MIB)], [GB_PER_S])

    @property
    def places(self) -> list[str]:
        return [node.place for node in self.nodes]

    def union(self, places: Sequence[str] | None = None, local: LocalPool | None = None) -> UnionPool:
        found = list(places or self.places)
        union = open_union(local, found, [GB_PER_S] * (len(found) + (local is not None)), connect_timeout_s=5.0)
        self.clients.append(union)
        return union

    def client(self, at: int) -> RemotePool:
        client = connect_pool(self.places[at])
        self.clients.append(client)
        return client

    def asked(self) -> list[int]:
        """The keys that each node was asked for since the last call."""
        counts = [pool.asked for pool in self.pools]
        for pool in self.pools:
            pool.asked = 0
        return counts

    def close(self) -> None:
        for some in (self.clients, self.nodes, self.pools):
            with ThreadPoolExecutor(8) as threads:
                list(threads.map(lambda one: one.close(5.0), some))


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    fleet = Fleet()
    yield fleet
    fleet.close()


def write_all(pool: UnionPool, keys: Sequence[bytes], first: int = 0) -> None:
    """Blocks of one prefix from number `first` on, in one call."""
    write_prefixes(pool, [keys], first)


def write_prefixes(pool: UnionPool, prefixes: Sequence[Sequence[bytes]], first: int = 0) -> None:
    """Blocks of each prefix from number `first` on, in one call."""
    blocks = [
        new_block(key, parent, position=1000 + at)
        for keys in prefixes
        for at, (key, parent) in enumerate(zip(keys, [ROOT, *keys], strict=False))
        if at >= first
    ]
    ended = Outcome()
    datas = [staged(block.key, 4096) for block in blocks]
    pool.write_many(blocks, datas, 20.0, lambda errors: ended(next(filter(None, errors), None)))
    assert ended.reason(30.0) == "ok"


def keys_of(name: object, length: int, after: Sequence[bytes] = ()) -> list[bytes]:
    return [*after, *(key for key, _ in chain(name, length - len(after)))]


def places_of(hits: Sequence[Located | None]) -> list[str | None]:
    return [hit.route[-1] if hit else None for hit in hits]


def test_only_owners_are_asked_and_engines_agree_on_them(fleet: Fleet) -> None:
    writer, reader = fleet.union(), fleet.union(fleet.places[::-1])
    keys = keys_of("a", 500)
    write_all(writer, keys)
    fleet.asked()
    found = places_of(reader.lookup(keys, 10.0))
    assert None not in found and found == places_of(writer.lookup(keys, 10.0))
    assert sum(fleet.asked()) == 2 * 500, "one node per block"
    runs = [at for at, key in enumerate(keys) if begins_run(key) or at == 0]
    assert sum(a != b for a, b in pairwise(found)) < len(runs)
    assert [read(reader, key) for key in keys[::25]] == ["ok"] * 20
    unknown = keys_of("?", 500)
    assert reader.lookup(unknown, 10.0) == [None] * 500
    asked = fleet.asked()
    heads = [at for at, key in enumerate(unknown) if begins_run(key) and at] + [500] * FIRST_PARTS
    assert sum(asked) <= heads[FIRST_PARTS - 1] + NODES, "a few runs, and every node for one block"


def test_who_found_a_prefix_before_asks_each_of_its_nodes_once(fleet: Fleet) -> None:
    writer, reader = fleet.union(), fleet.union()
    keys = keys_of("a", 700)
    write_all(writer, keys)
    for asking, most in ((writer, 0), (reader, FIRST_PARTS), (reader, 0)):
        before = sum(pool.lookups for pool in fleet.pools)
        nodes = len(set(places_of(asking.lookup(keys, 10.0))))
        asked = sum(pool.lookups for pool in fleet.pools) - before
        assert nodes <= asked <= nodes + most, "some nodes twice where nothing is known, in two rounds"


def test_a_lookup_costs_its_client_few_calls_for_each_node(fleet: Fleet) -> None:
    """Of the thread that asks, which also reads the answers; and of a run or a block next to nothing."""
    union, keys = fleet.union(), keys_of("a", 2000)
    write_all(union, keys)
    nodes = len(set(places_of(union.lookup(keys, 10.0))))
    runs = 1 + sum(map(begins_run, keys[1:]))
    calls = min(all_calls(lambda: union.lookup(keys, 10.0)) for _ in range(3))
    assert calls < 115 * nodes + 35 * runs + 100, "119 for each node before, and 47 for each run"


def test_continuations_go_on_where_their_writer_was_and_others_find_them(fleet: Fleet) -> None:
    one, two, reader = fleet.union(), fleet.union(), fleet.union()
    shared = [key for key in keys_of("system", 900) if not begins_run(key)][:12]
    write_all(one, shared)
    where = set[str | None]()
    for user in range(30):
        keys = keys_of(user, 20, shared)
        write_all((one, two)[user % 2], keys, 12)
        found = places_of(reader.lookup(keys, 10.0))
        assert None not in found
        where.update(found[12:])
    assert len(where) >= NODES // 2
    assert write(one, key_of("later"), keys[-1], position=1020) == "ok"
    assert places_of(reader.lookup([*keys, key_of("later")], 10.0))[-1] is not None


def test_a_node_that_goes_costs_its_blocks_and_what_was_written_meanwhile_is_found_when_it_is_back(
    fleet: Fleet,
) -> None:
    union, other = fleet.union(), fleet.union()
    prefixes = [keys_of(name, 6) for name in range(25)]
    write_prefixes(union, prefixes)
    before = [places_of(union.lookup(keys, 10.0)) for keys in prefixes]
    gone = before[0][0]
    fleet.nodes[fleet.places.index(str(gone).removeprefix("net@"))].close(5.0)
    at = fleet.places.index(str(gone).removeprefix("net@"))
    lost = [number for number, found in enumerate(before) if gone in found]
    for number, keys in enumerate(prefixes):
        found = places_of(other.lookup(keys, 10.0))
        assert found == [place if place != gone else None for place in before[number]][: len(found)] or number in lost
        assert set(Counter(read(other, key) for key in keys)) <= {"ok", "network", "missing"}
    for number in lost:
        write_all(union, prefixes[number])
        assert None not in places_of(union.lookup(prefixes[number], 10.0))
        assert None not in places_of(other.lookup(prefixes[number], 10.0)), "all agree on the stand-in"
    meanwhile = [keys_of(("meanwhile", name), 6) for name in range(25)]
    write_prefixes(union, meanwhile)
    fleet.nodes[at] = PoolNode(fleet.pools[at], "127.0.0.1", fleet.nodes[at].address[1], staging_capacity_bytes=4 * MIB)
    until(lambda: all(member.healthy for member in other.stat(5.0).members), 20.0)
    for keys in [*prefixes, *meanwhile]:
        assert None not in places_of(other.lookup(keys, 10.0))
        assert [read(other, key) for key in keys] == ["ok"] * 6


def test_blocks_that_an_earlier_version_spread_over_all_nodes_are_found(fleet: Fleet) -> None:
    keys = keys_of("old", 90)
    clients = [fleet.client(at) for at in range(NODES)]
    for at, (key, parent) in enumerate(chain("old", 90)):
        assert write(clients[at % NODES], key, parent, position=at) == "ok"
    union = fleet.union()
    longer = [*keys, *keys_of("new", 30)]
    assert None not in union.lookup(keys, 10.0)
    assert [read(union, key) for key in keys] == ["ok"] * 90
    write_all(union, longer, 90)
    assert None not in fleet.union().lookup(longer, 10.0)


def test_blocks_beside_their_owners_are_copied_there_as_they_were_written(fleet: Fleet) -> None:
    keys = keys_of("old", 60)
    clients = [fleet.client(at) for at in range(3)]
    for at, (key, parent) in enumerate(chain("old", 60)):
        assert write(clients[at % 3], key, parent, position=at, tenant=f"tenant-{at % 2}", rebuild_s=0.5) == "ok"
    union = fleet.union()
    assert None not in union.lookup(keys, 10.0)

    def owners_have_all() -> bool:
        """As one sees it who has seen nothing; closed at once, as many of them would keep the nodes busy."""
        assert None not in union.lookup(keys, 10.0)
        fleet.asked()
        newcomer = open_union(None, fleet.places, [GB_PER_S] * NODES, connect_timeout_s=5.0)
        try:
            return None not in newcomer.lookup(keys, 10.0) and sum(fleet.asked()) == 60
        finally:
            newcomer.close(5.0)

    until(owners_have_all, 60.0)
    assert union.stat(5.0).moved_blocks >= 30
    reader = fleet.union()
    found = places_of(reader.lookup(keys, 10.0))
    assert [read(reader, key) for key in keys] == ["ok"] * 60
    for at, (key, place) in enumerate(zip(keys, found, strict=True)):
        origin = fleet.pools[fleet.places.index(str(place).removeprefix("net@"))].origins([key])[0]
        assert origin is not None and origin.tenant == tenant_tag(f"tenant-{at % 2}") and origin.rebuild_s == 0.5
        assert at == 0 or origin.parent == keys[at - 1] or place == f"net@{fleet.places[at % 3]}"


def test_origins_are_asked_for_of_a_span_at_most(fleet: Fleet) -> None:
    client = fleet.client(0)
    assert write(client, key_of("a"), ROOT, tenant="t") == "ok"
    assert client.origins([key_of("a"), key_of("?")], 5.0) == [BlockOrigin(ROOT, tenant_tag("t"), 0.0), None]
    with pytest.raises(ValueError, match="more than 64"):
        client.origins([key_of("a")] * 65, 5.0)


def test_a_node_that_is_added_takes_its_share_and_old_blocks_are_found(fleet: Fleet) -> None:
    union = fleet.union(fleet.places[:-1])
    prefixes = [keys_of(name, 8) for name in range(25)]
    write_prefixes(union, prefixes)
    union.add_node(RemotePool(*fleet.nodes[-1].address), GB_PER_S)
    everyone = fleet.union()
    for pool in (union, everyone):
        assert all(None not in pool.lookup(keys, 10.0) for keys in prefixes)
    more = [keys_of(("more", name), 2) for name in range(150)]
    write_prefixes(union, more)
    assert fleet.pools[-1].stat(1.0).members[0].blocks > 0
    assert sum(union.weights.values()) == pytest.approx(1.0)
    union.drop_node(fleet.places[0], 1.0)
    assert all(place != f"net@{fleet.places[0]}" for keys in more[::5] for place in places_of(union.lookup(keys, 10.0)))


def test_local_members_beside_many_nodes_hold_their_share_of_the_runs(fleet: Fleet) -> None:
    local = open_local_pool((8 * MIB,), [], weights=[GB_PER_S])
    union = fleet.union(local=local)
    prefixes = [keys_of(name, 4) for name in range(120)]
    write_prefixes(union, prefixes)
    assert all(None not in union.lookup(keys, 10.0) for keys in prefixes[::4])
    assert 1 <= local.stat(1.0).members[0].blocks <= 100, "a nineteenth of 480, more or less"
    local_hit = next(key for keys in prefixes for key in keys if local.lookup([key], 1.0)[0])
    lease = union.lease(local_hit)
    assert lease is not None
    lease.release()


def test_switching_between_few_and_many_nodes_costs_what_lay_on_the_node_that_left(fleet: Fleet) -> None:
    union = fleet.union(fleet.places[:STRIPED_NODES_MAX])
    keys = keys_of("striped", 60)
    write_all(union, keys)
    assert len(set(places_of(union.lookup(keys, 10.0)))) == STRIPED_NODES_MAX
    union.add_node(RemotePool(*fleet.nodes[STRIPED_NODES_MAX].address), GB_PER_S)
    assert None not in union.lookup(keys, 10.0)
    left = f"net@{fleet.places[STRIPED_NODES_MAX]}"
    prefixes: list[list[bytes]] = []
    before: list[list[str | None]] = []
    while len(prefixes) < 300 and not any(left in found for found in before):
        prefixes.append(keys_of(("runs", len(prefixes)), 5))
        write_all(union, prefixes[-1])
        before.append(places_of(union.lookup(prefixes[-1], 10.0)))
        assert len(set(before[-1])) <= 3
    assert left in before[-1]
    union.drop_node(fleet.places[STRIPED_NODES_MAX], 1.0)
    for prefix, found in zip(prefixes, before, strict=True):
        assert places_of(union.lookup(prefix, 10.0)) == [place if place != left else None for place in found]
    assert None not in union.lookup(keys, 10.0)
