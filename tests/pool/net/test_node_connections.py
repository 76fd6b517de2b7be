"""The places of a pool node: each comes back, whatever its client does or leaves undone, and a refused one is told."""

from __future__ import annotations

import contextlib
import itertools
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from penstock.io.memory import aligned_buffer
from penstock.pool.api import PoolError
from penstock.pool.losses import losses
from penstock.pool.net import node as node_module
from penstock.pool.net import node_connection, wire
from penstock.pool.net.connect import connect_pool
from penstock.pool.net.pool_connection import FIRST_BYTES
from penstock.units import format_address
from tests.pool.helpers import Outcome, key_of, new_block, read, staged, until, write
from tests.pool.net.node_rig import MIB, WAIT_S, HandMade, NodeRig
from tests.waiting import read_until_ended


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[NodeRig]:
    made = NodeRig(tmp_path)
    with made.undo:
        yield made


def message(number: int, size_bytes: int, timeout_s: float = 5.0) -> wire.Write:
    return wire.Write(number, key_of(number), bytes(16), size_bytes, 0, b"", 0.0, 0, timeout_s)


def test_a_write_whose_payload_is_cut_gives_its_place_back(rig: NodeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_module, "CONNECTIONS_MAX", 3)
    node = rig.node(staging_capacity_bytes=MIB)
    for number in range(5):
        cut = rig.by_hand(node, "write")
        cut.send(message(number, 65536), bytes(1000), 65536)
        cut.sock.close()
        until(lambda: node.connections == 0, WAIT_S)
    assert node.staging.free_bytes == node.staging.capacity_bytes
    client = rig.client(node)
    assert write(client, key_of("a")) == read(client, key_of("a")) == "ok"


def test_a_write_that_the_pool_refuses_by_an_exception_gives_its_place_back(rig: NodeRig) -> None:
    pool = rig.pool()

    def broken(*_: object) -> None:
        raise RuntimeError("as planned")

    node = rig.node(pool)
    client = rig.client(node)
    assert write(client, key_of("a")) == "ok"
    pool.write, working = broken, pool.write  # type: ignore[method-assign, assignment]
    assert write(client, key_of("b")) == "network"
    pool.write = working  # type: ignore[method-assign]
    until(lambda: node.staging.free_bytes == node.staging.capacity_bytes, WAIT_S)
    until(lambda: write(client, key_of("b")) == "ok", WAIT_S)


def test_saves_past_their_deadline_leave_nothing_behind(rig: NodeRig) -> None:
    """The payload of each takes longer than its deadline, so that it is cut in the middle of it."""
    node = rig.node(rig.pool(64 * MIB))
    client = rig.client(node)
    data = aligned_buffer(48 * MIB)
    for number in range(4):
        outcome = Outcome()
        client.write(new_block(key_of(number), size_bytes=len(data)), data, 0.002, outcome)
        assert outcome.reason(WAIT_S) in ("deadline", "network", "ok", "dropped")
    until(lambda: client.up and node.connections == 3, WAIT_S)


@pytest.mark.parametrize("sent", [b"", wire.greeting()[:4], wire.greeting(), wire.greeting() + bytes(3)])
def test_who_does_not_say_hello_in_time_is_ended(rig: NodeRig, monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    monkeypatch.setattr(wire, "GREET_S", 0.2)
    monkeypatch.setattr(wire, "STALL_S", 0.2)
    node = rig.node()
    with socket.create_connection(node.address, timeout=WAIT_S) as sock:
        sock.sendall(sent)
        read_until_ended(sock)
    until(lambda: node.connections == 0, WAIT_S)


def test_a_greeting_that_drips_is_ended_too(rig: NodeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "GREET_S", 0.3)
    monkeypatch.setattr(wire, "STALL_S", 0.2)
    node = rig.node()
    slow, hello = rig.by_hand(node, None), wire.frame(wire.Hello("read"))
    sent = 0
    with pytest.raises(OSError):  # long before all of it was sent, one byte each 0.1 s
        while True:
            slow.sock.sendall(hello[sent : sent + 1])
            sent += 1
            assert sent < 60
            threading.Event().wait(0.1)
    until(lambda: node.connections == 0, WAIT_S)


def test_a_message_before_hello_ends_the_connection(rig: NodeRig) -> None:
    node = rig.node()
    first = rig.by_hand(node, None)
    first.send(wire.Stat(1, 1.0))
    first.until_ended()


def test_those_that_only_greet_keep_nobody_out(rig: NodeRig, caplog: pytest.LogCaptureFixture) -> None:
    node = rig.node()
    strangers = [rig.by_hand(node, None) for _ in range(2 * node_module.GREETING_MAX + 4)]
    client = rig.client(node)
    assert write(client, key_of("a")) == read(client, key_of("a")) == "ok"
    assert node.connections <= node_module.GREETING_MAX + 3
    strangers[0].until_ended()
    lines = [record for record in caplog.records if "have not said Hello" in record.getMessage()]
    assert len(lines) == 1, "one line for all of them"


def test_a_client_that_is_refused_is_told_why(rig: NodeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_module, "CONNECTIONS_MAX", 3)
    node = rig.node()
    first = rig.client(node)
    place = f"127.0.0.1:{node.address[1]}"
    with pytest.raises(PoolError, match=f"node {place} has 3 connections, the limit"):
        connect_pool(place)
    first.close(5.0)
    until(lambda: node.connections == 0, WAIT_S)
    rig.client(node)


@pytest.mark.slow
def test_a_client_that_falls_silent_is_ended_and_an_honest_idle_one_stays(
    rig: NodeRig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(wire, "IDLE_S", 4.0)
    monkeypatch.setattr(wire, "STALL_S", 0.25)
    node = rig.node()
    client = rig.client(node)
    for _ in range(2):  # by the time that two have come and gone, the honest one was idle for twice the limit
        rig.by_hand(node, "read").until_ended()
    assert f"pool node {client.place} ended" not in caplog.text, "none of its connections was lost"
    assert client.up and read(client, key_of("?")) == "missing"


def test_a_peer_whose_host_is_gone_is_found_by_the_kernel(rig: NodeRig) -> None:
    made = rig.by_hand(rig.node())
    client = socket.socket()
    wire.set_timeouts(client)
    assert client.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == wire.KEEPALIVE_S[0]
    assert 0 < client.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) <= 120_000
    client.close()
    assert made.sock.fileno() >= 0


def test_a_payload_that_drips_holds_its_staging_for_a_bounded_time(
    rig: NodeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_connection, "PAYLOAD_S", 0.5)
    monkeypatch.setattr(wire, "STALL_S", 0.25)
    node = rig.node(staging_capacity_bytes=MIB)
    slow = rig.by_hand(node, "write")
    slow.send(message(1, MIB, 0.1), bytes(FIRST_BYTES + 1), MIB)
    until(lambda: node.staging.free_bytes == 0, WAIT_S)
    sent = 0
    with pytest.raises(OSError):
        while True:
            slow.sock.sendall(b"x")
            sent += 1
            assert sent < 100
            threading.Event().wait(0.1)
    until(lambda: node.staging.free_bytes == node.staging.capacity_bytes, WAIT_S)


@pytest.mark.slow
def test_a_client_that_takes_a_block_in_drops_holds_it_for_a_bounded_time(
    rig: NodeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_connection, "PAYLOAD_S", 0.5)
    monkeypatch.setattr(wire, "STALL_S", 0.25)
    pool = rig.pool(64 * MIB)
    node = rig.node(pool)
    key, size = key_of("a"), 48 * MIB
    assert write(rig.client(node), key, size_bytes=size) == "ok"
    slow = rig.by_hand(node, "read")
    slow.send(wire.Read(1, key, size, 0.5))
    assert slow.sock.recv(1) and pool.evict([key]) == 0, "it is held while it is sent"
    taken = 0
    with pytest.raises(OSError):
        while True:
            if not slow.sock.recv(262_144):
                raise ConnectionError("ended")
            taken += 1
            assert taken < 150
            threading.Event().wait(0.1)
    until(lambda: pool.evict([key]) == 1, WAIT_S)


def test_a_node_says_what_it_loses(rig: NodeRig, caplog: pytest.LogCaptureFixture) -> None:
    node = rig.node(rig.pool(0, slab=8 * MIB), staging_capacity_bytes=MIB)
    client = rig.client(node)
    assert write(client, key_of("a")) == "ok"
    held = node.staging.take(MIB, 1e18)
    assert held is not None
    before = losses().get("read_deadline", 0)
    assert read(client, key_of("a"), timeout_s=0.3) == "deadline"
    until(lambda: "no staging memory for 4 KiB in time" in caplog.text, WAIT_S)
    held.give()
    assert losses()["read_deadline"] >= before + 1
    outcomes = [Outcome() for _ in range(5)]
    for outcome in outcomes:
        client.write(new_block(key_of("big"), size_bytes=2 * MIB), staged(key_of("big"), 2 * MIB), 5.0, outcome)
    assert [outcome.reason() for outcome in outcomes] == ["full"] * 5
    told = [r for r in caplog.records if r.levelno >= logging.WARNING and "this node takes at most" in r.getMessage()]
    assert len(told) == 1 and losses()["write_full"] >= 5


def test_the_accepting_thread_outlives_what_it_did_not_expect(rig: NodeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    from penstock.process import guarded_thread

    monkeypatch.setattr(guarded_thread, "RESTART_PAUSE_S", 0.01)
    node = rig.node()
    real, broken = node.connection_of, [True]

    def connection_of(sock: socket.socket, peer: str) -> node_connection.ClientConnection:
        if broken.pop() if broken else False:
            raise KeyError("as planned")
        return real(sock, peer)

    monkeypatch.setattr(node, "connection_of", connection_of)
    with socket.create_connection(node.address, timeout=WAIT_S) as sock:
        assert sock.recv(1) == b""
    client = rig.client(node)
    assert read(client, key_of("?")) == "missing" and node.alive


def test_a_fetch_that_raises_ends_its_read_and_no_other(rig: NodeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    node = rig.node(rig.pool(0, slab=8 * MIB))
    client = rig.client(node)
    assert write(client, key_of("a")) == "ok"
    take = node.staging.take

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(node.staging, "take", broken)
    assert read(client, key_of("a"), timeout_s=20.0) == "device"
    monkeypatch.setattr(node.staging, "take", take)
    assert read(client, key_of("a")) == "ok" and node.alive


def test_a_sign_of_life_has_no_answer(rig: NodeRig) -> None:
    made: HandMade = rig.by_hand(rig.node(), "control")
    made.send(wire.Alive())
    made.send(wire.Stat(7, 1.0))
    reply = made.reply()
    assert isinstance(reply, wire.Stats) and reply.id == 7


class Balancer:
    """One address in front of several nodes: each connection goes where `choose()` says."""

    def __init__(self, choose: Callable[[], tuple[str, int]]) -> None:
        self._choose = choose
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._listener.getsockname()
        self._socks: list[socket.socket] = [self._listener]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                local, _ = self._listener.accept()
                remote = socket.create_connection(self._choose())
                self._socks += [local, remote]
                for one, other in ((local, remote), (remote, local)):
                    threading.Thread(target=self._copy, args=(one, other), daemon=True).start()

    @staticmethod
    def _copy(one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(1 << 16):
                other.sendall(data)
        for sock in (one, other):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def cut_one(self) -> None:
        """End the connection that came last."""
        for sock in self._socks[-2:]:
            with contextlib.suppress(OSError):  # the end of the first may have ended the other already
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for sock in self._socks:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()


def test_an_address_with_several_nodes_behind_it_is_refused_with_a_reason(rig: NodeRig) -> None:
    """Lookups went to one node and reads to another: every hit was a miss, and nobody said why."""
    turns = itertools.cycle([rig.node().address, rig.node().address])
    balancer = Balancer(lambda: next(turns))
    rig.undo.callback(balancer.close)
    with pytest.raises(PoolError, match="leads to more than one node"):
        connect_pool(wire_address(balancer)).close(5.0)


def test_an_address_that_moves_to_another_node_is_followed_whole(rig: NodeRig) -> None:
    """One connection ends and leads elsewhere from then on, while the others to the node before live on."""
    nodes = [rig.node(), rig.node()]
    at = [0]
    balancer = Balancer(lambda: nodes[at[0]].address)
    rig.undo.callback(balancer.close)
    client = connect_pool(wire_address(balancer))
    rig.undo.callback(client.close, 5.0)
    assert write(client, key_of("a")) == read(client, key_of("a")) == "ok"
    at[0] = 1
    balancer.cut_one()
    until(lambda: nodes[0].connections == 0 and client.up, WAIT_S)
    assert client.lookup([key_of("a")], WAIT_S) == [None]
    assert write(client, key_of("a")) == read(client, key_of("a")) == "ok"
    assert client.lookup([key_of("a")], WAIT_S) != [None]


def wire_address(balancer: Balancer) -> str:
    return format_address(*balancer.address)
