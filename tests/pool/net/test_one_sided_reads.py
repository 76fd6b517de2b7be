"""Reads of a pool node by NIXL: the right bytes, verified, with leases that end; and why a node is read in messages."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.extras import EXTRAS
from penstock.io.device_memory import DeviceMemory
from penstock.io.memory import address_of, aligned_buffer
from penstock.io.numa import numa_nodes
from penstock.pool.api import PoolError
from penstock.pool.authenticated import authenticated
from penstock.pool.local.local_pool import LocalPool
from penstock.pool.mac import PoolKey
from penstock.pool.net import open_agent, pool_lending, rdma_devices, wire
from penstock.pool.net.connect import open_union
from penstock.pool.net.nixl_agent import NixlAgent
from penstock.pool.net.node import PoolNode
from penstock.pool.net.one_sided_agent import Access
from penstock.pool.net.remote import RemotePool
from penstock.pool.net.secret import Secret
from penstock.pool.setup.node_metrics import node_metrics
from penstock.pool.setup.open import open_local_pool
from tests.pool.helpers import Outcome, block_bytes, key_of, until, write
from tests.pool.net.node_rig import HandMade
from tests.pool.net.one_sided_rig import MIB, NIXL, OneSidedRig, attach, counted

pytestmark = NIXL
KEYS = [key_of(i) for i in range(12)]


@pytest.fixture
def rig() -> Iterator[OneSidedRig]:
    with contextlib.ExitStack() as undo:
        yield OneSidedRig(undo)


def pool_of(rig: OneSidedRig, folder: Path, memory: int = 16 * MIB, slab: int = 0) -> LocalPool:
    slabs = [(folder / "kv.slab", slab)] if slab else []
    pool = open_local_pool([memory] if memory else [], slabs, weights=[1.0] * (bool(memory) + bool(slab)))
    rig.undo.callback(lambda: (pool.check_integrity(), pool.close(5.0)))
    return pool


def evict_all(pool: LocalPool) -> None:
    """No block stays pinned: the last pins fall just after leases are counted out."""
    evicted: list[int] = []
    until(lambda: evicted.append(pool.evict(KEYS)) is None and sum(evicted) == len(KEYS))


def filled(rig: OneSidedRig, client: RemotePool, size_bytes: int = 4096) -> None:
    assert [write(client, key, size_bytes=size_bytes) for key in KEYS] == ["ok"] * len(KEYS)


@pytest.mark.parametrize("members", [{"memory": 16 * MIB}, {"memory": 0, "slab": 16 * MIB}, {"slab": 8 * MIB}])
@pytest.mark.parametrize("size_bytes", [4096, 100_000])
def test_blocks_come_one_sided_and_every_lease_ends(
    rig: OneSidedRig, tmp_path: Path, members: dict[str, int], size_bytes: int
) -> None:
    pool = pool_of(rig, tmp_path, **members)
    node = rig.node(pool)
    client = rig.client(node)
    filled(rig, client, size_bytes)
    with counted() as read:
        assert rig.read(client, KEYS, size_bytes) == ["ok"] * len(KEYS)
        assert rig.read(client, [key_of("?")], size_bytes) == ["missing"]
    assert read == {"messages": 0, "one-sided": len(KEYS) * size_bytes}
    lending = node.pool_lending
    assert lending is not None
    until(lambda: lending.leased_bytes == 0)
    lending.check_integrity()
    evict_all(pool)
    stat = client.stat(5.0)
    assert dict(stat.sent_bytes_by)["one-sided"] == len(KEYS) * size_bytes and stat.one_sided == client.one_sided
    text = node_metrics(node, pool).decode()
    assert "penstock_node_one_sided 1.0" in text and 'penstock_pool_sent_bytes_total{way="one-sided"}' in text


def test_a_span_comes_one_sided_and_in_messages_where_it_cannot(rig: OneSidedRig, tmp_path: Path) -> None:
    client = rig.client(rig.node(pool_of(rig, tmp_path)))
    filled(rig, client)
    keys = [*KEYS[:4], key_of("?")]
    for places, way in (
        ([rig.arena.take(4096) for _ in keys], "one-sided"),
        ([aligned_buffer(4096) for _ in keys], "messages"),
    ):
        ended: queue.SimpleQueue[list[PoolError | None]] = queue.SimpleQueue()
        with counted() as read:
            client.read_many(keys, 4096, places, 10.0, ended.put)
            errors = ended.get(timeout=20.0)
        assert [error and error.reason for error in errors] == [None] * 4 + ["missing"]
        assert [bytes(place) for place in places[:4]] == [block_bytes(key, 4096) for key in keys[:4]]
        assert read[way] == 4 * 4096 and sum(read.values()) == 4 * 4096


def test_memory_that_was_not_announced_is_filled_in_messages(rig: OneSidedRig, tmp_path: Path) -> None:
    client = rig.client(rig.node(pool_of(rig, tmp_path)))
    filled(rig, client)
    outcome = Outcome()
    with counted() as read:
        client.read(KEYS[0], 4096, memoryview(bytearray(4096)), 5.0, outcome)
        assert outcome.reason() == "ok"
    assert read == {"messages": 4096, "one-sided": 0}


def test_a_node_without_rdma_is_read_in_messages_and_says_so(rig: OneSidedRig, tmp_path: Path) -> None:
    node = PoolNode(pool_of(rig, tmp_path), "127.0.0.1", 0)
    rig.undo.callback(node.close, 5.0)
    client = RemotePool(*node.address)
    rig.undo.callback(client.close, 5.0)
    client.register(rig.arena.memory)
    filled(rig, client)
    with counted() as read:
        assert rig.read(client, KEYS) == ["ok"] * len(KEYS)
    assert read["one-sided"] == 0 and client.one_sided == "off: the node does not offer it"
    assert client.stat(5.0).one_sided == ""
    for message in (wire.Attach(1, b"", "nixl", b"", 1.0), wire.LendMany(1, KEYS[0], [4096], 1.0)):
        by_hand = HandMade(node.address, "control")
        by_hand.send(message)
        assert isinstance(by_hand.reply(), wire.Failed)
        by_hand.sock.close()


def test_a_client_without_nixl_reads_in_messages_and_says_so(
    rig: OneSidedRig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_agent, "missing_modules", EXTRAS.__getitem__)
    client = RemotePool(*rig.node(pool_of(rig, tmp_path)).address)
    rig.undo.callback(client.close, 5.0)
    client.register(rig.arena.memory)
    filled(rig, client)
    assert rig.read(client, KEYS) == ["ok"] * len(KEYS)
    until(lambda: "penstock[nixl]" in client.one_sided)


class NoMemory(NixlAgent):
    """An agent on a host where no memory may be locked."""

    def register(self, memory: memoryview | DeviceMemory, access: Access = "read") -> object:
        raise PoolError("device", "Cannot allocate memory")


def test_a_node_that_may_not_lock_memory_is_read_in_messages_and_says_so(rig: OneSidedRig, tmp_path: Path) -> None:
    node = rig.node(pool_of(rig, tmp_path), agent=NoMemory())
    client = RemotePool(*node.address)
    rig.undo.callback(client.close, 5.0)
    client.register(rig.arena.memory)
    filled(rig, client)
    assert rig.read(client, KEYS) == ["ok"] * len(KEYS)
    assert client.stat(5.0).one_sided.startswith("off: device: Cannot allocate memory; allowed: ")


@pytest.mark.parametrize(
    ("nodes", "want"), [([0], 0), ([1, 1], 1), ([0, 1], None), ([-1], None), ([None], None), ([], None)]
)
def test_devices_say_which_numa_node_they_are_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nodes: list[int | None], want: int | None
) -> None:
    monkeypatch.setattr(rdma_devices, "RDMA_DEVICES", tmp_path)
    for number, node in enumerate(nodes):
        (tmp_path / f"mlx5_{number}" / "device").mkdir(parents=True)
        if node is not None:
            (tmp_path / f"mlx5_{number}" / "device" / "numa_node").write_text(f"{node}\n")
    assert rdma_devices.numa_node_of(rdma_devices.rdma_devices()) == want


def test_staging_memory_lies_on_the_numa_node_of_the_devices(rig: OneSidedRig, tmp_path: Path) -> None:
    agent = NixlAgent()
    agent.numa_node = numa_nodes()[0]
    node = rig.node(pool_of(rig, tmp_path), agent=agent)
    assert node.pool_lending is not None
    for memory in (node.pool_lending._staging, node.pool_lending._grantable):  # noqa: SLF001 (the kernel is asked)
        assert policy_of(address_of(memory)) in (f"prefer:{agent.numa_node}", f"prefer=relative:{agent.numa_node}")


def policy_of(address: int) -> str:
    """What the kernel says of the mapping that has this address."""
    maps = [line.split() for line in Path("/proc/self/numa_maps").read_text().splitlines()]
    return max((fields for fields in maps if int(fields[0], 16) <= address), key=lambda fields: int(fields[0], 16))[1]


def test_only_a_client_that_proves_the_secret_attaches(rig: OneSidedRig, tmp_path: Path) -> None:
    secret = Secret(b"s" * 32)
    node = rig.node(pool_of(rig, tmp_path), secret=secret)
    with pytest.raises(PoolError, match="secret"):
        RemotePool(*node.address, secret=Secret(b"x" * 32))
    client = rig.client(node, secret=secret)
    filled(rig, client)
    with counted() as read:
        assert rig.read(client, KEYS) == ["ok"] * len(KEYS)
    assert read["messages"] == 0


def test_macs_are_verified(rig: OneSidedRig, tmp_path: Path) -> None:
    client = rig.client(rig.node(pool_of(rig, tmp_path)))
    pool = authenticated(client, PoolKey(b"k" * 32))
    assert write(pool, KEYS[0]) == "ok" and write(client, KEYS[1]) == "ok"
    with counted() as read:
        assert rig.read(pool, KEYS[:2]) == ["ok", "mac"]
    assert read["messages"] == 0


def test_blocks_of_another_node_are_lent_from_staging_memory(rig: OneSidedRig, tmp_path: Path) -> None:
    far = rig.node(pool_of(rig, tmp_path))
    union = open_union(None, ["{}:{}".format(*far.address)], for_node=True)
    rig.undo.callback(union.close, 5.0)
    client = rig.client(rig.node(union))
    filled(rig, client)
    assert all(client.lookup(KEYS, 5.0))
    with counted() as read:
        assert rig.read(client, KEYS) == ["ok"] * len(KEYS)
    assert read["one-sided"] >= len(KEYS) * 4096  # the way between the nodes is counted here too


def test_a_node_that_is_added_later_is_read_one_sided_too(rig: OneSidedRig, tmp_path: Path) -> None:
    first, second = (rig.node(pool_of(rig, tmp_path)) for _ in range(2))
    union = open_union(None, ["{}:{}".format(*first.address)])
    rig.undo.callback(union.close, 5.0)
    union.register(rig.arena.memory)
    added = RemotePool(*second.address)
    union.add_node(added, None)
    until(lambda: not added.one_sided.startswith("off"))
    writer = rig.client(second)
    filled(rig, writer)
    assert all(union.lookup(KEYS, 5.0))
    with counted() as read:
        assert rig.read(union, KEYS) == ["ok"] * len(KEYS)
    assert read == {**read, "messages": 0, "one-sided": len(KEYS) * 4096}


# --- leases ---


class Lender:
    """A client that speaks the protocol by hand, and keeps what it is lent."""

    def __init__(self, node: PoolNode) -> None:
        self.hand = HandMade(node.address, "control")

    def lend(self, *keys: bytes, size_bytes: int = 4096, timeout_s: float = 60.0) -> list[wire.LentBlock]:
        self.hand.send(wire.LendMany(1, b"".join(keys), [size_bytes] * len(keys), timeout_s))
        found: list[wire.LentBlock] = []
        while True:
            reply = self.hand.reply()
            assert isinstance(reply, wire.LentMany)
            found += reply.blocks
            if not reply.more:
                return sorted(found, key=lambda block: block.index)


def test_leases_end_by_themselves_and_with_their_connection(rig: OneSidedRig, tmp_path: Path) -> None:
    pool = pool_of(rig, tmp_path, slab=16 * MIB)
    node = rig.node(pool)
    client = rig.client(node)
    filled(rig, client)
    lender, other = Lender(node), Lender(node)
    lent = lender.lend(*KEYS)
    assert all(block.lease and not block.reason for block in lent)
    assert node.pool_lending is not None and node.pool_lending.leased_bytes == len(KEYS) * 4096
    other.hand.send(wire.ReturnMany([block.lease for block in lent]))
    other.lend(key_of("?"))
    assert node.pool_lending.leased_bytes == len(KEYS) * 4096, "another client cannot return them"
    lender.hand.sock.close()
    until(lambda: node.pool_lending is not None and node.pool_lending.leased_bytes == 0)
    other.lend(*KEYS, timeout_s=0.05)
    until(lambda: node.pool_lending is not None and node.pool_lending.leased_bytes == 0)
    evict_all(pool)
    other.hand.sock.close()


def test_what_one_client_has_leased_is_bounded(
    rig: OneSidedRig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_lending, "LEASED_BYTES_OF_CLIENT", 5 * 4096)
    node = rig.node(pool_of(rig, tmp_path))
    client = rig.client(node)
    filled(rig, client)
    greedy, other = Lender(node), Lender(node)
    assert [block.reason for block in greedy.lend(*KEYS)] == [""] * 5 + ["dropped"] * (len(KEYS) - 5)
    assert [block.reason for block in other.lend(*KEYS[:5])] == [""] * 5
    with counted() as read:
        assert rig.read(client, KEYS) == ["ok"] * len(KEYS), "what is not lent comes in messages"
    assert sum(read.values()) == len(KEYS) * 4096 and read["one-sided"] >= 5 * 4096
    greedy.hand.sock.close()
    other.hand.sock.close()


def test_memory_of_a_member_that_is_added_is_attached_too(
    rig: OneSidedRig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from penstock.pool.members.memory import MemoryMember

    monkeypatch.setattr(pool_lending, "REGISTER_PAUSE_S", 0.0)
    pool = pool_of(rig, tmp_path)
    client = rig.client(rig.node(pool))
    pool.add_member(MemoryMember("added", 16 * MIB), 1.0)
    pool.drain_member("memory:0")
    until(lambda: [member.name for member in pool.stat(1.0).members] == ["added"])
    filled(rig, client)

    def one_sided() -> bool:
        with counted() as read:
            assert rig.read(client, KEYS) == ["ok"] * len(KEYS)
        return read["messages"] == 0

    until(one_sided)


def test_reads_from_many_threads_at_the_same_time(rig: OneSidedRig, tmp_path: Path) -> None:
    client = rig.client(rig.node(pool_of(rig, tmp_path, slab=16 * MIB)))
    filled(rig, client)
    results: list[str] = []

    def some(number: int) -> None:
        into = rig.arena.memory[number * 4096 : (number + 1) * 4096]
        for turn in range(100):
            outcome = Outcome()
            client.read(KEYS[(turn + number) % len(KEYS)], 4096, into, 10.0, outcome)
            results.append(outcome.reason())

    threads = [threading.Thread(target=some, args=(number,)) for number in range(4)]
    with counted() as read:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == ["ok"] * 400 and read["messages"] == 0


def test_what_is_registered_after_attaching_is_read_into_as_well(rig: OneSidedRig, tmp_path: Path) -> None:
    client = rig.client(rig.node(pool_of(rig, tmp_path)))
    filled(rig, client)
    rig.arena = type(rig.arena)(MIB)
    attach(client, rig.arena.memory)

    def one_sided() -> bool:
        with counted() as read:
            assert rig.read(client, KEYS[:2]) == ["ok", "ok"]
        return read["messages"] == 0

    until(one_sided)
