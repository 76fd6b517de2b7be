"""Writes to a pool node by NIXL: stored only as they were sent, by their deadline, in space that is free again."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from penstock.io.device_memory import DeviceMemory
from penstock.io.memory import address_of, aligned_buffer
from penstock.pool.api import PoolError
from penstock.pool.checksum import block_checksum
from penstock.pool.local.local_pool import LocalPool
from penstock.pool.net import memory_attachment, one_sided_writes, pool_grants, wire
from penstock.pool.net.connect import open_union
from penstock.pool.net.nixl_agent import NixlAgent, NixlTransfer
from penstock.pool.net.node import PoolNode
from penstock.pool.net.one_sided_agent import Operation, Span
from penstock.pool.net.pool_grants import PoolGrants
from penstock.pool.net.pool_lending import NodeMemory, decode_node_memory
from penstock.pool.net.remote import RemotePool
from penstock.pool.setup.open import open_local_pool
from tests.pool.helpers import Outcome, block_bytes, chain, key_of, new_block, read, staged, until, write
from tests.pool.net.node_rig import HandMade
from tests.pool.net.one_sided_rig import MIB, NIXL, OneSidedRig, counted_writes, use_registered_memory

pytestmark = NIXL
KEYS = [key_of(("written", i)) for i in range(8)]
OK = ["ok"] * len(KEYS)


class Faulty(NixlAgent):
    """The client's agent, with a fault before each write or after it."""

    before: Any = None
    around: Any = None

    def begin(
        self, operation: Operation, peer: Any, spans: Sequence[Span], local: DeviceMemory | None = None
    ) -> NixlTransfer:
        if operation == "WRITE" and Faulty.before is not None:
            Faulty.before()
        found = super().begin(operation, peer, spans, local)
        return found if operation == "READ" or Faulty.around is None else Faulty.around(found)


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[OneSidedRig]:
    monkeypatch.setattr(memory_attachment, "open_agent", lambda kind: Faulty())
    monkeypatch.setattr(Faulty, "before", None)
    monkeypatch.setattr(Faulty, "around", None)
    with contextlib.ExitStack() as undo:
        rig = OneSidedRig(undo)
        rig.arena = use_registered_memory(monkeypatch)
        yield rig


def pool_of(rig: OneSidedRig, folder: Path, memory: int = 16 * MIB, slab: int = 0) -> LocalPool:
    slabs = [(folder / "kv.slab", slab)] if slab else []
    pool = open_local_pool([memory] if memory else [], slabs, weights=[1.0] * (bool(memory) + bool(slab)))
    rig.undo.callback(lambda: (pool.check_integrity(), pool.close(5.0)))
    return pool


def grants_of(node: PoolNode) -> PoolGrants:
    assert node.pool_lending is not None and node.pool_lending.grants is not None
    return node.pool_lending.grants


def start(rig: OneSidedRig, folder: Path) -> tuple[LocalPool, PoolNode, RemotePool]:
    pool = pool_of(rig, folder)
    node = rig.node(pool)
    return pool, node, rig.client(node)


def write_span(client: RemotePool, name: object, blocks: int, size_bytes: int) -> list[str]:
    ended: queue.SimpleQueue[list[PoolError | None]] = queue.SimpleQueue()
    pairs, datas = chain(name, blocks), [staged(key, size_bytes) for key, _ in chain(name, blocks)]
    news = [new_block(key, parent, size_bytes) for key, parent in pairs]
    client.write_many(news, datas, 10.0, ended.put)
    return ["ok" if error is None else error.reason for error in ended.get(timeout=20.0)]


@pytest.mark.parametrize("members", [{"memory": 16 * MIB}, {"memory": 0, "slab": 16 * MIB}])
@pytest.mark.parametrize("size_bytes", [4096, 100_000])
def test_blocks_are_written_one_sided_and_every_grant_ends(
    rig: OneSidedRig, tmp_path: Path, members: dict[str, int], size_bytes: int
) -> None:
    pool = pool_of(rig, tmp_path, **members)
    node = rig.node(pool)
    client = rig.client(node)
    with counted_writes() as written:
        assert [write(client, key, size_bytes=size_bytes) for key in KEYS] == OK
        assert write_span(client, "span", 20, size_bytes) == ["ok"] * 20
    assert written == {"messages": 0, "one-sided": (len(KEYS) + 20) * size_bytes}
    keys = [*KEYS, *(key for key, _ in chain("span", 20))]
    assert rig.read(client, keys, size_bytes) == ["ok"] * len(keys)
    assert [read(pool, key, size_bytes) for key in keys] == ["ok"] * len(keys)
    grants = grants_of(node)
    grants.check_integrity()
    assert grants.free_bytes == 8 * MIB and grants.written_bytes == written["one-sided"]


def test_blocks_of_other_nodes_are_passed_on(rig: OneSidedRig, tmp_path: Path) -> None:
    far = rig.node(pool_of(rig, tmp_path))
    union = open_union(None, ["{}:{}".format(*far.address)], for_node=True)
    rig.undo.callback(union.close, 5.0)
    client = rig.client(rig.node(union))
    with counted_writes() as written:
        assert [write(client, key) for key in KEYS] == OK
    assert written["one-sided"] >= len(KEYS) * 4096
    assert [read(far.pool, key) for key in KEYS] == OK


def test_memory_that_was_not_announced_is_written_in_messages(rig: OneSidedRig, tmp_path: Path) -> None:
    _, _, client = start(rig, tmp_path)
    outcome, data = Outcome(), aligned_buffer(4096)
    data[:] = block_bytes(KEYS[0], 4096)
    with counted_writes() as written:
        client.write(new_block(KEYS[0]), data, 5.0, outcome)
        assert outcome.reason() == "ok"
    assert written == {"messages": 4096, "one-sided": 0} and rig.read(client, KEYS[:1]) == ["ok"]


def test_spans_of_few_bytes_are_written_in_messages(
    rig: OneSidedRig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, client = start(rig, tmp_path)
    monkeypatch.setattr(one_sided_writes, "SPAN_BYTES_MIN", 8 * 4096)
    with counted_writes() as written:
        assert write_span(client, "few", 7, 4096) == ["ok"] * 7 and write_span(client, "enough", 8, 4096) == ["ok"] * 8
    assert written == {"messages": 7 * 4096, "one-sided": 8 * 4096}


def test_what_the_pool_refuses_is_refused_one_sided_too(rig: OneSidedRig, tmp_path: Path) -> None:
    _, node, client = start(rig, tmp_path)
    assert write(client, KEYS[0]) == "ok" and write(client, KEYS[0], size_bytes=8192) == "layout"
    assert rig.read(client, KEYS[:1]) == ["ok"]
    assert grants_of(node).free_bytes == 8 * MIB


def test_what_has_no_space_is_written_in_messages(rig: OneSidedRig, tmp_path: Path) -> None:
    node = rig.node(pool_of(rig, tmp_path), staging_capacity_bytes=MIB)
    client = rig.client(node)
    with counted_writes() as written:
        assert write(client, KEYS[0], size_bytes=MIB // 2) == "ok", "more than one client's half"
    assert written["one-sided"] == 0
    until(lambda: write(client, KEYS[1], size_bytes=MIB // 4) == "ok" and grants_of(node).written_bytes > 0)


def test_wrong_bytes_are_not_stored_and_the_block_is_sent_again(
    rig: OneSidedRig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a stranger who writes into the granted space after its client did."""
    pool, node, client = start(rig, tmp_path)
    grants = grants_of(node)

    def damage(inner: NixlTransfer) -> NixlTransfer:
        while not inner.ended():
            threading.Event().wait(0.001)
        grants._memory[100] ^= 1  # noqa: SLF001 (any attached client could)
        return inner

    monkeypatch.setattr(Faulty, "around", staticmethod(damage))
    with counted_writes() as written:
        assert write(client, KEYS[0]) == "ok"
        assert write_span(client, "damaged", 4, 4096) == ["ok"] * 4
    assert written == {"messages": 2 * 4096, "one-sided": 3 * 4096}, "only the damaged ones are sent again"
    keys = [KEYS[0], *(key for key, _ in chain("damaged", 4))]
    assert [read(pool, key) for key in keys] == ["ok"] * 5 and pool.stat(1.0).checksum_errors == 0
    assert grants.free_bytes == 8 * MIB


def test_writes_that_fail_are_made_in_messages_and_three_of_them_turn_the_way_off(
    rig: OneSidedRig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, node, client = start(rig, tmp_path)

    def fail() -> None:
        raise PoolError("network", "the cable is out")

    monkeypatch.setattr(Faulty, "before", staticmethod(fail))
    with counted_writes() as written:
        until(lambda: write(client, KEYS[0]) == "ok" and "the cable is out" in client.one_sided)
    assert written["one-sided"] == 0
    until(lambda: grants_of(node).free_bytes == 8 * MIB)


class Held:
    """A transfer of NIXL that ends when the test says so."""

    def __init__(self, inner: NixlTransfer, release: threading.Event) -> None:
        self._inner, self._release = inner, release

    def ended(self) -> bool:
        return self._release.is_set() and self._inner.ended()


def test_a_write_that_nixl_does_not_end_ends_by_its_deadline_and_its_space_later(
    rig: OneSidedRig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, node, client = start(rig, tmp_path)
    grants, release = grants_of(node), threading.Event()
    monkeypatch.setattr(Faulty, "around", staticmethod(lambda inner: Held(inner, release)))
    assert write(client, KEYS[0], timeout_s=0.2) == "deadline"
    assert grants.free_bytes == 8 * MIB - 4096 and pool.lookup(KEYS[:1], 1.0) == [None]
    release.set()
    until(lambda: grants.free_bytes == 8 * MIB)
    monkeypatch.setattr(Faulty, "around", None)
    assert pool.lookup(KEYS[:1], 1.0) == [None], "it is never committed"
    assert write(client, KEYS[0]) == "ok"


def test_a_grant_that_ran_out_is_not_committed_and_the_block_goes_in_messages(
    rig: OneSidedRig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, node, client = start(rig, tmp_path)
    monkeypatch.setattr(wire, "LEASE_S_MAX", 0.05)

    def too_late(inner: NixlTransfer) -> NixlTransfer:
        threading.Event().wait(0.1)
        return inner

    monkeypatch.setattr(Faulty, "around", staticmethod(too_late))
    with counted_writes() as written:
        assert write(client, KEYS[0]) == "ok"
    assert written == {"messages": 4096, "one-sided": 0}
    until(lambda: grants_of(node).free_bytes == 8 * MIB)


# --- clients that speak the protocol by hand ---


class Writer:
    """A client that does what it should not: writes late, or anywhere, and ends without a word."""

    def __init__(self, node: PoolNode, agent: NixlAgent) -> None:
        self.hand = HandMade(node.address, "control")
        self._agent = agent
        self.hand.send(wire.Attach(1, b"", "nixl", b"", 5.0))
        attached = self.hand.reply()
        assert isinstance(attached, wire.Attached)
        self._memory: NodeMemory = decode_node_memory(attached.memory)
        self._peer = agent.add_peer(self._memory.metadata)
        self._data = aligned_buffer(4096)
        agent.register(self._data)

    def grant(self, timeout_s: float = 60.0, size_bytes: int = 4096, blocks: int = 1) -> wire.Granted:
        self.hand.send(wire.Grant(2, blocks, size_bytes, timeout_s))
        reply = self.hand.reply()
        assert isinstance(reply, wire.Granted)
        return reply

    def fill(self, granted: wire.Granted, data: bytes) -> None:
        self._data[: len(data)] = data
        there = self._memory.regions[granted.region].address + granted.offset
        transfer = self._agent.begin("WRITE", self._peer, [(address_of(self._data), there, len(data))])
        until(transfer.ended)

    def commit(self, lease: int, *keys: bytes, size_bytes: int = 4096) -> list[str]:
        blocks = [new_block(key, size_bytes=size_bytes) for key in keys]
        sums = [block_checksum(key, memoryview(block_bytes(key, size_bytes))) for key in keys]
        self.hand.send(wire.Commit(3, lease, wire.WriteMany.of(0, blocks, sums), 5.0))
        reply = self.hand.reply()
        if isinstance(reply, wire.Failed):
            return [reply.reason]
        assert isinstance(reply, wire.WrittenMany)
        return ["ok" if one is None else one.reason for one in wire.errors_of(reply.states, reply.detail)]


@pytest.fixture
def by_hand(rig: OneSidedRig) -> Callable[[PoolNode], Writer]:
    agent = NixlAgent()

    def made(node: PoolNode) -> Writer:
        writer = Writer(node, agent)
        rig.undo.callback(writer.hand.sock.close)
        return writer

    return made


def test_a_client_that_ends_between_write_and_commit_stores_nothing_and_its_space_is_quarantined(
    rig: OneSidedRig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_hand: Callable[[PoolNode], Writer]
) -> None:
    monkeypatch.setattr(pool_grants, "QUARANTINE_S", 0.5)
    pool = pool_of(rig, tmp_path)
    node = rig.node(pool)
    gone, other = by_hand(node), by_hand(node)
    granted = gone.grant()
    gone.fill(granted, block_bytes(KEYS[0], 4096))
    assert grants_of(node).free_bytes == 8 * MIB - 4096
    gone.hand.sock.close()
    assert other.commit(granted.lease, KEYS[0]) == ["dropped"], "nobody else can commit it"
    assert other.grant().offset != granted.offset, "something may still be written there"
    until(lambda: grants_of(node).free_bytes == 8 * MIB - 4096)
    assert pool.lookup(KEYS[:1], 1.0) == [None]
    grants_of(node).check_integrity()


class Ending(NixlAgent):
    """A node's agent that says of each attachment, in order, whether it could end its transfers."""

    def __init__(self, *ends: bool) -> None:
        super().__init__()
        self._ends = list(ends)

    def accept(self, request: bytes) -> tuple[bytes, Callable[[], bool]]:
        end = self._ends.pop(0)
        return b"", lambda: end


@pytest.mark.parametrize(
    ("ends", "state"),
    [((True,), "free"), ((False,), "quarantine"), ((True, False), "quarantine"), ((False, True, True), "quarantine")],
)
def test_space_of_a_client_that_is_gone_is_free_once_all_its_transfers_have_ended(
    rig: OneSidedRig, tmp_path: Path, by_hand: Callable[[PoolNode], Writer], ends: Sequence[bool], state: str
) -> None:
    node = rig.node(pool_of(rig, tmp_path), agent=Ending(*ends))
    client = by_hand(node)
    for _ in ends[1:]:
        client.hand.send(wire.Attach(1, b"", "nixl", b"", 5.0))
        assert isinstance(client.hand.reply(), wire.Attached)
    assert client.grant().lease
    client.hand.sock.close()
    table = grants_of(node)._table  # noqa: SLF001 (what its space goes by)
    until(lambda: not table.count("open"))
    assert table.count("quarantine") == (state == "quarantine")
    assert (grants_of(node).free_bytes == 8 * MIB) == (state == "free")


def test_a_late_write_into_space_that_another_was_granted_damages_no_block(
    rig: OneSidedRig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_hand: Callable[[PoolNode], Writer]
) -> None:
    monkeypatch.setattr(pool_grants, "QUARANTINE_S", 0.0)
    pool = pool_of(rig, tmp_path)
    node = rig.node(pool)
    late, honest = by_hand(node), by_hand(node)
    old = late.grant(timeout_s=0.01)
    threading.Event().wait(0.02)
    assert late.commit(old.lease, KEYS[0]) == ["dropped"]
    granted = honest.grant()
    assert granted.offset == old.offset and granted.lease != old.lease
    honest.fill(granted, block_bytes(KEYS[0], 4096))
    late.fill(old, b"late" * 1024)
    assert honest.commit(granted.lease, KEYS[0]) == ["checksum"] and pool.lookup(KEYS[:1], 1.0) == [None]
    again = honest.grant()
    honest.fill(again, block_bytes(KEYS[0], 4096))
    assert honest.commit(again.lease, KEYS[0]) == ["ok"]
    late.fill(old, b"late" * 1024)
    assert read(pool, KEYS[0]) == "ok", "the stored block lies elsewhere"


def test_bounds_of_a_client(rig: OneSidedRig, tmp_path: Path, by_hand: Callable[[PoolNode], Writer]) -> None:
    node = rig.node(pool_of(rig, tmp_path))
    greedy, other = by_hand(node), by_hand(node)
    leases = [greedy.grant(size_bytes=MIB).lease for _ in range(6)]
    assert all(leases[:4]) and leases[4:] == [0, 0], "half of the space"
    assert other.grant(size_bytes=MIB).lease and not other.grant(size_bytes=MIB, blocks=9).lease
    assert greedy.commit(leases[0], *KEYS[:1], size_bytes=2 * MIB) == ["layout"], "more than was granted"
    assert greedy.commit(leases[0], *KEYS[:1], size_bytes=MIB) == ["dropped"], "and the grant has ended"
    greedy.hand.send(wire.ReturnMany(leases[:4]))
    assert greedy.grant(size_bytes=MIB).lease
    grants_of(node).check_integrity()


def test_a_node_without_rdma_grants_nothing(rig: OneSidedRig, tmp_path: Path) -> None:
    node = PoolNode(pool_of(rig, tmp_path), "127.0.0.1", 0)
    rig.undo.callback(node.close, 5.0)
    span = wire.WriteMany.of(0, [new_block(KEYS[0])], [0])
    for message in (wire.Grant(1, 1, 4096, 1.0), wire.Commit(1, 7, span, 1.0)):
        by_hand = HandMade(node.address, "control")
        by_hand.send(message)
        assert isinstance(by_hand.reply(), wire.Failed)
        by_hand.sock.close()
