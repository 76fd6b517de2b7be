"""Threads of a client's link: what a callback raises costs nobody else his answer, and no thread ends by it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.io.memory import aligned_buffer
from penstock.pool.api import PoolError
from penstock.pool.net import connection as connection_module
from penstock.pool.net import wire
from penstock.pool.net.link import NodeLink
from penstock.process import guarded_thread
from penstock.process.guarded_thread import thread_failures
from tests.pool.helpers import Outcome, key_of, new_block, read, staged, until, write
from tests.pool.net.node_rig import WAIT_S, NodeRig


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[NodeRig]:
    made = NodeRig(tmp_path)
    with made.undo:
        yield made


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guarded_thread, "RESTART_PAUSE_S", 0.01)


def failing(called: threading.Event) -> object:
    def done(_: PoolError | None) -> None:
        called.set()
        raise KeyError("as planned")

    return done


def test_callbacks_that_raise_cost_nobody_else_his_answer(rig: NodeRig) -> None:
    node = rig.node()
    client = rig.client(node)
    assert write(client, key_of("a")) == "ok"
    for _ in range(3):
        called = threading.Event()
        client.read(key_of("a"), 4096, aligned_buffer(4096), 10.0, failing(called))  # type: ignore[arg-type]
        assert called.wait(WAIT_S)
        called = threading.Event()
        client.read(key_of("a"), 0, aligned_buffer(4096), 10.0, failing(called))  # type: ignore[arg-type]
        assert called.wait(WAIT_S)
    assert read(client, key_of("a")) == "ok" and node.connections == 3


def test_requests_that_wait_end_by_their_deadline_although_one_before_them_raised(rig: NodeRig) -> None:
    """At the deadline thread: none of them was sent, because the node's staging is taken and 32 are on the wire."""
    node = rig.node(rig.pool(0, slab=8 << 20), staging_capacity_bytes=1 << 20)
    client = rig.client(node)
    assert write(client, key_of("a")) == "ok"
    held = node.staging.take(1 << 20, 1e18)
    assert held is not None
    sent = [Outcome() for _ in range(32)]
    for outcome in sent:
        client.read(key_of("a"), 4096, aligned_buffer(4096), 60.0, outcome)
    called, behind = threading.Event(), [Outcome() for _ in range(4)]
    client.read(key_of("a"), 4096, aligned_buffer(4096), 0.1, failing(called))  # type: ignore[arg-type]
    for outcome in behind:
        client.read(key_of("a"), 4096, aligned_buffer(4096), 0.3, outcome)
    assert called.wait(WAIT_S)
    assert [outcome.reason(WAIT_S) for outcome in behind] == ["deadline"] * 4
    held.give()
    assert [outcome.reason(WAIT_S) for outcome in sent] == ["ok"] * 32


def test_a_link_comes_back_after_its_reconnecting_thread_raised(rig: NodeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    node = rig.node()
    client = rig.client(node)
    real, times = NodeLink._connect, [3]  # noqa: SLF001 (a fault is put in here)
    before = thread_failures().get("penstock-reconnect", 0)

    def broken(self: NodeLink, *arguments: object) -> None:
        if times[0]:
            times[0] -= 1
            raise ZeroDivisionError
        real(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(NodeLink, "_connect", broken)
    node.close(5.0)
    again = type(node)(node.pool, *node.address)
    rig.undo.callback(again.close, 5.0)
    until(lambda: read(client, key_of("?")) == "missing", WAIT_S)
    assert thread_failures()["penstock-reconnect"] == before + 3


def test_a_connection_without_its_threads_is_not_taken_for_one(rig: NodeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    node = rig.node()
    client = rig.client(node)
    real, times = connection_module.Connection.start, [2]

    def no_thread(self: connection_module.Connection) -> None:
        if times[0]:
            times[0] -= 1
            raise RuntimeError("can't start new thread")
        real(self)

    monkeypatch.setattr(connection_module.Connection, "start", no_thread)
    node.close(5.0)
    again = type(node)(node.pool, *node.address)
    rig.undo.callback(again.close, 5.0)
    until(lambda: read(client, key_of("?")) == "missing", WAIT_S)
    assert not times[0] and client.up


def of_links() -> list[str]:
    """Names of the threads of all links of this process."""
    names = [thread.name for thread in threading.enumerate()]
    shared = ("penstock-links", "penstock-pool-callbacks", "penstock-reconnect")
    return [name for name in names if name in shared or name.endswith(("-receive", "-send"))]


def test_an_idle_client_of_many_nodes_has_two_threads(rig: NodeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "PARK_S", 0.05)
    nodes = [rig.node(rig.pool(64 << 10)) for _ in range(12)]
    before = of_links()
    clients = [rig.client(node) for node in nodes]
    for number, client in enumerate(clients):
        assert write(client, key_of(number)) == "ok" and read(client, key_of(number)) == "ok"
    until(lambda: len(of_links()) <= max(2, len(before)), WAIT_S)
    for number, client in enumerate(clients):  # over connections without a thread
        assert client.lookup([key_of(number)], WAIT_S)[0] is not None
        assert read(client, key_of(number)) == "ok" and write(client, key_of((number, "b"))) == "ok"
    nodes[0].close(5.0)
    until(lambda: not clients[0].up, WAIT_S)
    assert read(clients[0], key_of(0)) == "network" and read(clients[1], key_of(1)) == "ok"


def test_a_connection_that_gets_no_thread_again_ends_what_was_asked_over_it(
    rig: NodeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "PARK_S", 0.05)
    client = rig.client(rig.node())
    assert write(client, key_of("a")) == "ok"
    until(lambda: "penstock-read-receive" not in of_links(), WAIT_S)
    real = connection_module.Connection.start

    def no_thread(self: connection_module.Connection) -> None:
        if self.lane == "read":
            raise RuntimeError("can't start new thread")
        real(self)

    with monkeypatch.context() as patched:
        patched.setattr(connection_module.Connection, "start", no_thread)
        assert read(client, key_of("a")) == "network"
    until(lambda: read(client, key_of("a")) == "ok", WAIT_S)


def test_a_message_that_cannot_be_written_down_ends_alone(rig: NodeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    node = rig.node()
    client = rig.client(node)
    outcome = Outcome()
    block = new_block(key_of("a"), position=1 << 70)
    client.write(block, staged(key_of("a"), 4096), 5.0, outcome)
    assert outcome.reason(WAIT_S) == "layout"
    assert write(client, key_of("a")) == "ok" and node.connections == 3


def test_an_answer_to_fewer_keys_than_were_asked_for_is_an_error(rig: NodeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    node = rig.node()
    client = rig.client(node)
    found = wire.found
    monkeypatch.setattr(wire, "found", lambda id, hits: found(id, hits[:-1]))
    with pytest.raises(PoolError, match="answered 1 of 2 keys"):
        client.lookup([key_of(1), key_of(2)], 5.0)
