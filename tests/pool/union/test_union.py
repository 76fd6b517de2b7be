"""Pools of several nodes and a local one as one pool, over real sockets: spread, lookups, fullness, nodes that go."""

from __future__ import annotations

import logging
import os
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from penstock.io.memory import aligned_buffer
from penstock.pool.api import PoolError
from penstock.pool.local.local_pool import LocalPool
from penstock.pool.net import wire
from penstock.pool.net.connect import connect_pool, open_union
from penstock.pool.net.node import PoolNode
from penstock.pool.net.remote import RemotePool
from penstock.pool.setup.open import open_local_pool
from penstock.pool.union.locations import Locations
from penstock.pool.union.union_pool import UnionPool
from tests.pool.helpers import Outcome, block_bytes, chain, key_of, new_block, read, staged, until, write
from tests.pool.net.one_sided_rig import BOTH_WAYS

MIB = 1 << 20
GB_PER_S = 1e9
MEASURED_S = 90.0  # a busy host measures too little at first, and again after 10, 30 and 70 s


class Hosts:
    """Nodes, pools and unions of this process, closed in reverse order."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: list[Callable[[], None]] = []

    def local(self, *memory: int, slab: int = 0, weight: float = GB_PER_S) -> LocalPool:
        slabs = [(self._folder / f"{len(self._open)}.slab", slab)] if slab else []
        return open_local_pool(memory, slabs, weights=[weight] * (len(memory) + len(slabs)))

    def node(self, pool: LocalPool | UnionPool, port: int = 0, pace: float | None = None) -> PoolNode:
        node = PoolNode(pool, "127.0.0.1", port, pace_bytes_per_s=pace, staging_capacity_bytes=8 * MIB)
        self.later(lambda: pool.close(5.0))
        self.later(lambda: node.close(5.0))
        return node

    def union(
        self, local: LocalPool | None, nodes: Sequence[PoolNode | str], weights: Sequence[float | None] | None = None
    ) -> UnionPool:
        addresses = [node if isinstance(node, str) else place(node) for node in nodes]
        union = open_union(local, addresses, weights, connect_timeout_s=2.0)
        self.later(lambda: union.close(5.0))
        return union

    def later(self, close: Callable[[], None]) -> None:
        self._open.append(close)

    def close(self) -> None:
        while self._open:
            self._open.pop()()


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    hosts = Hosts(tmp_path)
    yield hosts
    hosts.close()


def place(node: PoolNode) -> str:
    return f"127.0.0.1:{node.address[1]}"


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def write_chain(pool: UnionPool, name: object, blocks: int, size_bytes: int = 4096, first: int = 0) -> list[bytes]:
    keys = []
    for at, (key, parent) in enumerate(chain(name, blocks)):
        assert write(pool, key, parent, size_bytes, position=first + at) == "ok"
        keys.append(key)
    return keys


def holders(pool: UnionPool, keys: Sequence[bytes]) -> list[str | None]:
    """The member of each block."""
    return [hit.route[0] if hit else None for hit in pool.lookup(keys, 5.0)]


@BOTH_WAYS
def test_blocks_are_spread_by_weight_over_children_and_their_members(hosts: Hosts) -> None:
    one, two = hosts.node(hosts.local(MIB, MIB)), hosts.node(hosts.local(MIB))
    union = hosts.union(hosts.local(MIB), [one, two], [1 * GB_PER_S, 2 * GB_PER_S, 3 * GB_PER_S])
    keys = write_chain(union, "a", 120, first=77_777)
    assert [read(union, key) for key in keys] == ["ok"] * 120
    found = holders(union, keys)
    names = {"memory:0": 20, f"memory:0@{place(one)}": 20, f"memory:1@{place(one)}": 20, f"memory:0@{place(two)}": 60}
    assert Counter(found) == names
    for begin in range(0, 120, 12):
        within = Counter(found[begin : begin + 12])
        assert all(abs(within[name] - count / 10) <= 2 for name, count in names.items()), "each range is on all members"
    assert sum(union.weights.values()) == pytest.approx(1.0)


@BOTH_WAYS
def test_routes_leases_stat_and_evict(hosts: Hosts) -> None:
    node = hosts.node(hosts.local(MIB))
    union = hosts.union(hosts.local(MIB), [node], [GB_PER_S, GB_PER_S])
    union.register(aligned_buffer(MIB))
    keys = write_chain(union, "a", 20)
    routes = {hit.route for hit in union.lookup(keys, 5.0) if hit}
    assert routes == {("memory:0",), (f"memory:0@{place(node)}", f"net@{place(node)}")}
    leased = 0
    for key, holder in zip(keys, holders(union, keys), strict=True):
        lease = union.lease(key)
        assert (lease is not None) == (holder == "memory:0")
        if lease is not None:
            assert bytes(lease.view) == block_bytes(key, 4096)
            lease.release()
            leased += 1
    assert leased == 10 and len(union.host_buffers()) == 1
    stat = union.stat(5.0)
    assert [member.name for member in stat.members] == ["memory:0", f"memory:0@{place(node)}"]
    assert [member.blocks for member in stat.members] == [10, 10]
    assert sum(member.weight for member in stat.members) == pytest.approx(1.0)
    assert union.evict([*keys[:7], key_of("?")]) == 7
    assert holders(union, keys[:7]) == [None] * 7
    assert [read(union, key) for key in keys[:7]] == ["missing"] * 7
    assert read(union, keys[9], size_bytes=4095) == "layout"
    assert union.lookup([], 1.0) == []


def test_engines_that_do_not_talk_place_alike_and_find_each_others_blocks(hosts: Hosts) -> None:
    nodes = [hosts.node(hosts.local(MIB)) for _ in range(2)]
    weights = [3 * GB_PER_S, GB_PER_S]
    first, second = hosts.union(None, nodes, weights), hosts.union(None, nodes, weights)
    keys = write_chain(first, "a", 40)
    assert [read(second, key) for key in keys] == ["missing"] * 40, "reads follow a lookup"
    assert None not in holders(second, keys)
    assert [read(second, key) for key in keys] == ["ok"] * 40
    other = write_chain(second, "b", 40)
    assert holders(first, other) == holders(first, keys)
    write_chain(second, "a", 40)
    assert sum(member.blocks for member in first.stat(5.0).members) == 80, "no block lies twice"


def test_a_full_child_leaves_its_blocks_to_one_with_room_before_anything_is_evicted(hosts: Hosts) -> None:
    node = hosts.node(hosts.local(100 * 4096))
    union = hosts.union(hosts.local(10 * 4096), [node], [9 * GB_PER_S, GB_PER_S])
    keys = write_chain(union, "a", 60)
    assert Counter(holders(union, keys)) == {"memory:0": 10, f"memory:0@{place(node)}": 50}
    assert union.stat(5.0).evictions == 0
    write_chain(union, "b", 100)
    assert union.stat(5.0).evictions >= 50, "all full: the one whose turn it is evicts"


def test_a_child_evicts_leaves_before_roots_though_it_holds_every_second_block(hosts: Hosts) -> None:
    pools = [hosts.local(8 * 4096), hosts.local(8 * 4096)]
    nodes = [hosts.node(pool) for pool in pools]
    writer, other = (hosts.union(None, nodes, [GB_PER_S, GB_PER_S]) for _ in range(2))
    keys = write_chain(writer, "a", 14)
    assert None not in holders(other, keys), "the second engine learns the prefix from its lookup"
    for at, (key, parent) in enumerate(chain("a", 16)[14:], 14):
        assert write(other, key, parent, position=at) == "ok"
    write_chain(writer, "b", 8)
    held = [hit is not None for hit in writer.lookup([key for key, _ in chain("a", 16)], 5.0)]
    assert sum(held) == 8 and held == sorted(held, reverse=True), "what is left is the beginning of the prefix"


def test_the_weight_of_a_node_is_its_link_and_no_node_is_placed_on_before(hosts: Hosts) -> None:
    fast, slow = hosts.node(hosts.local(MIB), pace=30e6), hosts.node(hosts.local(MIB), pace=10e6)
    union = hosts.union(None, [fast, slow])
    until(lambda: union.weights[place(fast)] == pytest.approx(0.75, abs=0.06), MEASURED_S)
    bounded = hosts.node(hosts.local(MIB, weight=5e6), pace=20e6)
    other = hosts.union(None, [slow, bounded])  # of which the second one's members are slower than its link
    until(lambda: other.weights[place(bounded)] == pytest.approx(1 / 3, abs=0.06), MEASURED_S)


def test_measuring_a_paced_link(hosts: Hosts) -> None:
    client = connect_pool(place(hosts.node(hosts.local(MIB), pace=20e6)))
    assert 10e6 < client.measure_bytes_per_s(0.3) < 25e6, "slower on a busy machine, never faster"
    client.close(5.0)
    with pytest.raises(PoolError, match="closed"):
        client.measure_bytes_per_s(0.3)


def test_a_probe_too_large_is_refused_and_carries_nobodys_bytes(hosts: Hosts) -> None:
    node = hosts.node(hosts.local(MIB))
    client = connect_pool(place(node))
    assert write(client, key_of("secret"), size_bytes=100_000) == "ok"
    client.close(5.0)
    with socket.create_connection(node.address, timeout=10.0) as sock:
        sock.sendall(wire.greeting() + wire.frame(wire.Hello("read")))
        wire.receive_exactly(sock, memoryview(bytearray(wire.GREETING.size)))
        frames = wire.FrameReader(sock)
        assert isinstance(wire.decode_reply(frames.next()[0]), wire.Ready)
        for size in (0, wire.PROBE_BYTES_MAX + 1):
            sock.sendall(wire.frame(wire.Probe(1, size)))
            reply = wire.decode_reply(frames.next()[0])
            assert isinstance(reply, wire.Failed) and reply.reason == "layout"
        sock.sendall(wire.frame(wire.Probe(2, 200_000)))
        header, payload = frames.next()
        assert isinstance(wire.decode_reply(header), wire.Probed) and payload == 200_000
        into = memoryview(bytearray(payload))
        wire.receive_exactly(sock, into)
        assert bytes(into) == bytes(payload)


# --- children that are not there ---


def test_a_node_that_is_down_at_start_is_a_warning_and_used_once_it_is_there(
    hosts: Hosts, caplog: pytest.LogCaptureFixture
) -> None:
    port = closed_port()
    with caplog.at_level(logging.WARNING):
        union = hosts.union(hosts.local(MIB, weight=5e7), [f"127.0.0.1:{port}"])
    assert f"127.0.0.1:{port} is down" in caplog.text
    keys = write_chain(union, "a", 10)
    assert holders(union, keys) == ["memory:0"] * 10
    assert not union.stat(5.0).members[1].healthy and union.failures[f"127.0.0.1:{port}"] >= 1
    hosts.node(hosts.local(MIB), port)
    until(lambda: union.weights[f"127.0.0.1:{port}"] > 0)
    more = write_chain(union, "b", 40)
    assert f"memory:0@127.0.0.1:{port}" in holders(union, more)


def test_what_makes_no_pool_is_refused(hosts: Hosts) -> None:
    with pytest.raises(PoolError, match=r"no pool node can be used: .* refused"):
        open_union(None, [f"127.0.0.1:{closed_port()}", f"127.0.0.1:{closed_port()}"])
    with pytest.raises(ValueError, match="HOST:PORT"):
        open_union(hosts.local(MIB), ["nonsense"])
    node = hosts.node(hosts.local(MIB))
    with pytest.raises(ValueError, match="are one pool node"):
        open_union(None, [place(node), f"localhost:{node.address[1]}"])
    with pytest.raises(ValueError, match="shares"):
        open_union(hosts.local(MIB, weight=3), [place(node)])
    with pytest.raises(ValueError, match="weights for"):
        open_union(hosts.local(MIB), [place(node)], [1.0])


@BOTH_WAYS
def test_a_node_that_goes_costs_its_blocks_and_is_used_again_when_it_is_back(hosts: Hosts) -> None:
    stays, pool = hosts.node(hosts.local(MIB)), hosts.local(MIB)
    goes = PoolNode(pool, "127.0.0.1", 0)
    union = hosts.union(hosts.local(MIB), [stays, goes], [GB_PER_S] * 3)
    keys = write_chain(union, "a", 30)
    before = holders(union, keys)
    lost = f"memory:0@{place(goes)}"
    assert before.count(lost) == 10 and len(union.stat(5.0).members) == 3
    goes.close(5.0)
    begin_s = time.monotonic()
    assert holders(union, keys) == [None if name == lost else name for name in before]
    reasons = Counter(read(union, key, timeout_s=100.0) for key in keys)
    assert sorted(reasons.items()) == [("network", 10), ("ok", 20)]
    assert time.monotonic() - begin_s < 60.0, "while it is down, nothing waits for it"
    more = write_chain(union, "b", 30)
    assert Counter(holders(union, more)) == {"memory:0": 15, f"memory:0@{place(stays)}": 15}
    assert union.failures[place(goes)] >= 1
    down = [member for member in union.stat(5.0).members if member.name == lost]
    assert [(member.healthy, member.blocks, member.state) for member in down] == [(False, 10, "down")]
    hosts.node(pool, goes.address[1])
    until(lambda: holders(union, keys) == before)
    assert [read(union, key) for key in keys] == ["ok"] * 30
    until(lambda: lost in holders(union, write_chain(union, time.monotonic(), 6)))


def test_a_write_that_a_child_refuses_goes_to_the_next(hosts: Hosts) -> None:
    """The node has staging memory for small blocks only; larger ones it refuses as full."""
    node = hosts.node(hosts.local(64 * MIB))
    union = hosts.union(hosts.local(64 * MIB), [node], [1e6, 1e12])
    key = key_of("large")
    assert write(union, key, size_bytes=9 * MIB, position=1) == "ok"
    assert holders(union, [key]) == ["memory:0"] and read(union, key, size_bytes=9 * MIB) == "ok"
    alone = hosts.union(None, [node])
    assert write(alone, key_of("x"), size_bytes=9 * MIB) == "full"
    outcome = Outcome()
    union.write(new_block(key, key), staged(key, 4096), 5.0, outcome)
    assert outcome.reason() == "layout"


class SilentNode:
    """Answers greetings, and nothing else."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.place = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        try:
            wire.receive_exactly(sock, memoryview(bytearray(wire.GREETING.size)))
            wire.FrameReader(sock).next()
            sock.sendall(wire.greeting() + wire.frame(wire.Ready("silent")))
            while sock.recv(65536):
                pass
        except OSError:
            pass
        finally:
            sock.close()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def test_a_silent_node_costs_a_lookup_its_timeout_at_most_and_no_hits_of_others(hosts: Hosts) -> None:
    silent = SilentNode()
    hosts.later(silent.close)
    union = hosts.union(hosts.local(MIB), [silent.place], [GB_PER_S, 1e6])
    keys = write_chain(union, "a", 10)
    begin_s = time.monotonic()
    assert holders_within(union, keys, 0.2) == ["memory:0"] * 10
    assert time.monotonic() - begin_s < 30.0, "not the 3 s of patience with each lane, nor the connection's timeouts"
    assert [read(union, key) for key in keys] == ["ok"] * 10


def holders_within(pool: UnionPool, keys: Sequence[bytes], timeout_s: float) -> list[str | None]:
    return [hit.route[0] if hit else None for hit in pool.lookup(keys, timeout_s)]


def read_all(union: UnionPool, keys: Sequence[bytes]) -> float:
    """Bytes per second of reading these blocks of a MiB, all at once."""
    buffers, outcomes = [aligned_buffer(MIB) for _ in keys], [Outcome() for _ in keys]
    begin_s = time.monotonic()
    for key, buffer, outcome in zip(keys, buffers, outcomes, strict=True):
        union.read(key, MIB, buffer, 30.0, outcome)
    assert [outcome.reason() for outcome in outcomes] == ["ok"] * len(keys)
    elapsed_s = time.monotonic() - begin_s
    for key, buffer in zip(keys, buffers, strict=True):
        assert bytes(buffer[:4096]) == block_bytes(key, MIB)[:4096]
    return len(keys) * MIB / elapsed_s


def test_reads_of_two_paced_nodes_run_in_parallel(hosts: Hosts) -> None:
    nodes = [hosts.node(hosts.local(64 * MIB), pace=20e6) for _ in range(2)]
    union = hosts.union(None, nodes, [GB_PER_S, GB_PER_S])
    keys = write_chain(union, "a", 24, MIB)
    on_first = [name is not None and place(nodes[0]) in name for name in holders(union, keys)]
    assert sum(on_first) == 12
    ratios = []
    for _ in range(3):  # a busy machine holds a pacer up now and then
        alone = [
            read_all(union, [key for key, first in zip(keys, on_first, strict=True) if first == which])
            for which in (True, False)
        ]
        ratios.append(read_all(union, keys) / sum(alone))
        if ratios[-1] >= 0.9:
            return
    raise AssertionError(f"both nodes together read at {ratios} of what they read at alone, added up")


# --- nodes with members of other nodes ---


def node_of(
    hosts: Hosts,
    local: LocalPool | None,
    others: Sequence[str],
    port: int = 0,
    weights: Sequence[float | None] | None = None,
) -> PoolNode:
    return hosts.node(open_union(local, others, weights, connect_timeout_s=2.0, for_node=True), port)


@BOTH_WAYS
def test_a_node_serves_the_members_of_another_one(hosts: Hosts, tmp_path: Path) -> None:
    far_pool = hosts.local(slab=4 * MIB)
    far = hosts.node(far_pool)
    near = node_of(hosts, hosts.local(4 * MIB), [place(far)], weights=[GB_PER_S, GB_PER_S])
    client = connect_pool(place(near))
    hosts.later(lambda: client.close(5.0))
    union = near.pool
    assert isinstance(union, UnionPool)
    keys = [key for key, _ in chain("a", 400)]
    for at, (key, parent) in enumerate(chain("a", 400)):
        assert write(client, key, parent, 5000, position=at) == "ok"
    hits = client.lookup(keys, 5.0)
    routes = Counter(hit.route for hit in hits if hit)
    through = (f"ssd:0@{place(far)}", f"net@{place(far)}", f"net@{place(near)}")
    assert set(routes) == {(f"memory:0@{place(near)}", f"net@{place(near)}"), through}
    assert [read(client, key, 5000) for key in keys[:50]] == ["ok"] * 50
    assert {member.name for member in client.stat(5.0).members} == {f"memory:0@{place(near)}", f"ssd:0@{place(far)}"}
    on_far = [key for key, hit in zip(keys, hits, strict=True) if hit and hit.route == through]
    damaged = on_far[0]
    with next(tmp_path.glob("*.slab")).open("r+b", buffering=0) as slab:
        content = slab.read()
        slab.seek(content.index(block_bytes(damaged, 5000)[:64]) + 4999)
        slab.write(bytes([damaged[0] ^ 0x10]))
        os.fsync(slab.fileno())
    assert read(client, damaged, 5000) == "checksum"
    until(lambda: far_pool.stat(1.0).checksum_errors == 1)
    assert client.lookup([damaged], 5.0) == [None]
    assert client.evict(on_far[1:3]) == 2
    assert read(client, on_far[1], 5000) == "missing"


@BOTH_WAYS
def test_the_checksum_of_a_block_read_through_a_node_is_the_one_it_was_stored_with(hosts: Hosts) -> None:
    far = hosts.node(hosts.local(MIB))
    union = open_union(None, [place(far)], for_node=True)
    hosts.later(lambda: union.close(5.0))
    key = key_of("a")
    assert write(union, key, size_bytes=5000) == "ok"
    opened = union.open_block(key, 5000)
    assert not isinstance(opened, PoolError) and opened.view is None and opened.checksum == 0
    outcome, into = Outcome(), aligned_buffer(8192)
    opened.load(into, 5.0, outcome)
    assert outcome.reason() == "ok"
    here = far.pool.open_block(key, 5000)
    assert not isinstance(here, PoolError) and opened.checksum == here.checksum != 0
    opened.release()
    here.release()


def test_a_slow_node_does_not_hold_up_what_the_node_before_it_has_itself(hosts: Hosts) -> None:
    far = hosts.node(hosts.local(32 * MIB), pace=1e6)
    near = hosts.node(
        open_union(
            hosts.local(slab=64 * MIB), [place(far)], [GB_PER_S, GB_PER_S], for_node=True, follow_bandwidth=False
        )
    )
    client = connect_pool(place(near), connections=2)
    hosts.later(lambda: client.close(5.0))
    keys = [key for key, _ in chain("a", 40)]
    for at, (key, parent) in enumerate(chain("a", 40)):
        assert write(client, key, parent, MIB, position=at) == "ok"
    hits = client.lookup(keys, 5.0)
    here = [key for key, hit in zip(keys, hits, strict=True) if hit and place(far) not in hit.route[0]]
    there = [key for key in keys if key not in here]
    assert len(here) == len(there) == 20
    slow = [Outcome() for _ in there]
    for key, outcome in zip(there, slow, strict=True):
        client.read(key, MIB, aligned_buffer(MIB), 120.0, outcome)
    assert [read(client, key, MIB) for key in here] == ["ok"] * 20
    assert sum(outcome.pending() for outcome in slow) >= 10


@BOTH_WAYS
def test_nodes_that_name_each_other_are_one_pool_and_no_request_goes_round(hosts: Hosts) -> None:
    ports = [closed_port(), closed_port()]
    one = node_of(hosts, hosts.local(MIB), [f"127.0.0.1:{ports[1]}"], ports[0])
    two = node_of(hosts, hosts.local(MIB), [f"127.0.0.1:{ports[0]}"], ports[1])
    until(lambda: min(one.pool.weights.values()) > 0)  # type: ignore[attr-defined]
    clients = [connect_pool(place(node)) for node in (one, two)]
    for client in clients:
        hosts.later(lambda client=client: client.close(5.0))  # type: ignore[misc]
    for at, (key, parent) in enumerate(chain("a", 40)):
        assert write(clients[at % 2], key, parent, position=at) == "ok"
    keys = [key for key, _ in chain("a", 40)]
    for client in clients:
        assert None not in client.lookup(keys, 5.0)
        assert [read(client, key) for key in keys] == ["ok"] * 40
        assert len(client.stat(5.0).members) == 2
    both = hosts.union(None, [one, two], [GB_PER_S, GB_PER_S])
    assert sum(member.blocks for member in both.stat(5.0).members) == 40, "each member counts once"
    assert None not in holders(both, keys)
    assert clients[0].lookup([key_of("?")], 5.0) == [None]


def test_a_node_that_names_itself_is_refused(hosts: Hosts, caplog: pytest.LogCaptureFixture) -> None:
    port = closed_port()
    with caplog.at_level(logging.WARNING):
        node = node_of(hosts, hosts.local(MIB), [f"127.0.0.1:{port}"], port)
        until(lambda: "that is this node itself" in caplog.text)
    assert list(node.pool.weights.values()) == [1.0, 0.0]  # type: ignore[attr-defined]
    with pytest.raises(PoolError, match="this node itself"):
        RemotePool(*node.address, origin=node.node_id)


def test_a_node_without_members_of_its_own_has_nothing_for_another_node(hosts: Hosts) -> None:
    far = hosts.node(hosts.local(MIB))
    front = node_of(hosts, None, [place(far)])
    with pytest.raises(PoolError, match="no members of its own"):
        open_union(None, [place(front)], for_node=True)
    client = connect_pool(place(front))
    assert write(client, key_of("a")) == "ok" and read(client, key_of("a")) == "ok"
    client.close(5.0)


# --- what was seen where, and random operations ---


def test_locations_are_bounded_and_know_each_childs_nearest_ancestor() -> None:
    locations = Locations(2, capacity=4)
    keys = [key_of(i) for i in range(6)]
    locations.note_written(keys[0], key_of("root"), 0)
    for child, (key, parent) in enumerate(zip(keys[1:], keys, strict=False)):
        locations.note_written(key, parent, (child + 1) % 2)
    assert len(locations) == 4 and locations.find(keys[0]) is None and locations.find(keys[5]) == 1
    assert locations.parent_on(0, keys[5]) == keys[4] and locations.parent_on(1, keys[5]) == keys[5]
    assert locations.parent_on(0, key_of("?")) == key_of("?"), "unknown: its own parent"
    locations.forget(keys[5], 0)
    assert locations.find(keys[5]) == 1
    locations.forget(keys[5], 1)
    assert locations.find(keys[5]) is None


@BOTH_WAYS
def test_random_operations_while_a_node_comes_and_goes(hosts: Hosts) -> None:
    stays, pool = hosts.node(hosts.local(40 * 4096)), hosts.local(40 * 4096)
    goes = PoolNode(pool, "127.0.0.1", 0)
    hosts.later(lambda: pool.close(5.0))
    union = hosts.union(hosts.local(40 * 4096), [stays, goes], [GB_PER_S] * 3)
    generator = random.Random(5)
    served = Counter[str]()
    for step in range(400):
        if step % 100 == 50:
            goes.close(5.0)
        if step % 100 == 99:
            goes = PoolNode(pool, "127.0.0.1", goes.address[1])
        i = generator.randrange(60)
        key, size = key_of(i), 500 + 331 * (i % 8)
        match generator.randrange(3):
            case 0:
                assert write(union, key, key_of(i - 1), size, position=i) in ("ok", "network", "full")
            case 1:
                union.lookup([key], 5.0)
                outcome = read(union, key, size)  # raises for wrong bytes
                served[outcome] += 1
                assert outcome in ("ok", "missing", "network")
            case 2:
                union.evict([key])
    assert served["ok"] > 20
    goes.close(5.0)
