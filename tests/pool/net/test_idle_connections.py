"""Connections without messages have no thread; those with messages have one each, within limits."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.pool.net import idle, wire
from penstock.pool.net.idle import IdleConnections
from penstock.process import spare_threads
from penstock.process.guarded_thread import GuardedThread
from tests.pool.helpers import chain, key_of, read, until, write
from tests.pool.net.node_rig import WAIT_S, NodeRig


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[NodeRig]:
    made = NodeRig(tmp_path)
    with made.undo:
        yield made


def serving() -> int:
    return sum(one.name.startswith(("penstock-node-127", "penstock-send-127")) for one in threading.enumerate())


def test_idle_connections_have_no_thread_and_are_served_again(rig: NodeRig) -> None:
    node = rig.node()
    clients = [rig.by_hand(node, lane, f"127.0.0.{at % 200 + 2}") for at in range(150) for lane in ("read", "control")]
    until(lambda: node.idle.threads == 0 and serving() == 0, WAIT_S)
    assert node.connections == 300
    for number, client in enumerate(clients):
        client.send(wire.Stat(number, 5.0))
    for number, client in enumerate(clients):
        reply = client.reply()
        assert isinstance(reply, wire.Stats) and reply.id == number
    until(lambda: node.idle.threads == 0 and serving() == 0, WAIT_S)
    for client in clients:
        client.sock.close()
    until(lambda: node.connections == 0, WAIT_S)


def test_a_connection_that_is_served_again_starts_no_thread(rig: NodeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    node = rig.node()
    clients = [rig.by_hand(node, lane) for lane in ("read", "control")]
    until(lambda: node.idle.threads == 0 < node.spare_threads.resting, WAIT_S)
    monkeypatch.setattr(GuardedThread, "start", _no_thread)
    for number in range(3):
        for client in clients:
            client.send(wire.Stat(number, 5.0))
            reply = client.reply()
            assert isinstance(reply, wire.Stats) and reply.id == number
            until(lambda: node.idle.threads == 0 < node.spare_threads.resting, WAIT_S)


def test_a_client_s_work_goes_on_after_a_pause(rig: NodeRig) -> None:
    node = rig.node(rig.pool(0, 8 << 20))
    client = rig.client(node)
    for key, parent in chain("again", 4):
        assert write(client, key, parent) == "ok"
        assert read(client, key) == "ok"
        until(lambda: node.idle.threads == 0, WAIT_S)
    until(lambda: serving() == 0, WAIT_S)
    assert client.up


def test_at_most_so_many_are_served_at_once_and_the_others_in_turn(
    rig: NodeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock.pool.net.node.IdleConnections", lambda: IdleConnections(4))
    node = rig.node()
    slow = [rig.by_hand(node) for _ in range(6)]
    until(lambda: node.idle.threads == 0, WAIT_S)
    for one in slow:
        one.sock.sendall(b"\1")  # the first byte of a message whose rest does not come
    until(lambda: node.idle.threads == 2, WAIT_S)  # an address has half of the threads
    other = rig.by_hand(node, "read", "127.0.0.2")
    other.send(wire.Stat(1, 5.0))
    assert isinstance(other.reply(), wire.Stats)
    assert node.idle.threads <= 3
    for one in slow[:2]:
        one.sock.close()
    until(lambda: node.connections == 5, WAIT_S)
    until(lambda: node.idle.threads == 2, WAIT_S)  # the next two of that address
    for one in slow:
        one.sock.close()
    until(lambda: node.connections == 1, WAIT_S)


def test_a_parked_client_that_falls_silent_is_ended(
    rig: NodeRig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(wire, "IDLE_S", 0.6)
    node = rig.node()
    silent = [rig.by_hand(node) for _ in range(3)]
    for one in silent:
        one.until_ended()
    until(lambda: node.connections == 0, WAIT_S)
    assert "the peer sent no message for 0.6 s" in caplog.text


def test_a_connection_for_which_no_thread_can_be_started_ends_alone(
    rig: NodeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spare_threads, "SPARE_MAX", 0)
    node = rig.node()
    first, second = rig.by_hand(node), rig.by_hand(node)
    until(lambda: node.idle.threads == 0, WAIT_S)
    start = GuardedThread.start
    monkeypatch.setattr(GuardedThread, "start", _no_thread)
    first.send(wire.Stat(1, 5.0))
    first.until_ended()
    monkeypatch.setattr(GuardedThread, "start", start)
    second.send(wire.Stat(2, 5.0))
    assert isinstance(second.reply(), wire.Stats)
    until(lambda: node.connections == 1 and node.idle.threads <= 1, WAIT_S)
    assert write(rig.client(node), key_of("a")) == "ok"


def _no_thread(self: object) -> None:
    raise RuntimeError("can't start new thread")


def test_a_node_that_closes_ends_parked_connections_too(rig: NodeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once: it does not wait for the next look at them."""
    monkeypatch.setattr(idle, "LOOK_S", 600.0)
    node = rig.node()
    parked = [rig.by_hand(node) for _ in range(5)]
    until(lambda: node.idle.threads == 0, WAIT_S)
    node.close(5.0)
    for one in parked:
        one.until_ended()
    assert node.connections == 0 and serving() == 0 and not node.idle.alive


def test_limits_of_threads() -> None:
    assert idle.THREADS_MAX == 1024 and idle.PARK_S < wire.IDLE_S
