"""Strangers at a pool node, with a secret and without: they cost it next to nothing and keep nobody out."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from penstock.core.connection_limits import ConnectionLimits
from penstock.pool.api import PoolError
from penstock.pool.net import node as node_module
from penstock.pool.net import wire
from penstock.pool.net.node import PoolNode
from penstock.pool.net.node_connection import ClientConnection
from penstock.pool.net.remote import RemotePool
from penstock.pool.net.secret import Secret
from tests.flood import percentile, reset, usage
from tests.pool.helpers import key_of, read, until, write
from tests.pool.net.node_rig import WAIT_S, HandMade, NodeRig

SECRET = Secret(b"what only honest peers have")


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[NodeRig]:
    made = NodeRig(tmp_path)
    with made.undo:
        yield made


def serve_honest(node: PoolNode) -> float:
    """A peer with the secret connects all its lanes, writes and reads; returns how long it took."""
    begin_s = time.monotonic()
    client = RemotePool(*node.address, connect_timeout_s=WAIT_S, secret=node.secret)
    try:
        assert write(client, key_of("a")) == read(client, key_of("a")) == "ok"
        return time.monotonic() - begin_s
    finally:
        client.close(WAIT_S)


@contextlib.contextmanager
def attacking(attack: Callable[[], None]) -> Iterator[None]:
    """`attack` again and again, on a thread of its own."""
    stop, failed = threading.Event(), list[BaseException]()

    def run() -> None:
        try:
            while not stop.is_set():
                attack()
        except BaseException as error:  # noqa: BLE001 (any failure is what the test looks for)
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(WAIT_S)
    assert not failed and not thread.is_alive()


def told(what: str, alone_s: list[float], beside_s: list[float]) -> None:
    ratio = percentile(beside_s, 0.99) / max(percentile(alone_s, 0.99), 1e-9)
    print(f"{what}: p99 {percentile(beside_s, 0.99) * 1e3:.1f} ms beside it, {ratio:.1f} x of alone")


class Storm:
    """Connections of another address, as fast as they can be made; each says a part of the greeting and stays."""

    def __init__(self, node: PoolNode, held: int) -> None:
        self._address = node.address
        self._socks: list[socket.socket] = []
        self._held = held
        self._turn = itertools.count()

    def __call__(self) -> None:
        with contextlib.suppress(OSError):
            sock = socket.create_connection(self._address, timeout=WAIT_S, source_address=("127.0.0.2", 0))
            sock.sendall(wire.greeting(True)[: next(self._turn) % 9])
            self._socks.append(sock)
        if len(self._socks) > self._held:
            reset(self._socks.pop(0))

    def close(self) -> None:
        for sock in self._socks:
            reset(sock)


class Drip:
    """Connections that fill the budget of strangers, and send a byte each in turn."""

    def __init__(self, node: PoolNode, count: int) -> None:
        self._address = node.address
        self._socks: list[tuple[socket.socket, Iterator[int]]] = [self._one() for _ in range(count)]

    def _one(self) -> tuple[socket.socket, Iterator[int]]:
        return socket.create_connection(self._address, timeout=WAIT_S), iter(wire.greeting(True) + bytes(200))

    def __call__(self) -> None:
        for number, (sock, greeting) in enumerate(self._socks):
            try:
                sock.sendall(bytes([next(greeting)]))
            except (OSError, StopIteration):
                sock.close()
                self._socks[number] = self._one()
        threading.Event().wait(0.01)

    def close(self) -> None:
        for sock, _ in self._socks:
            sock.close()


@pytest.mark.parametrize("attack", [Storm, Drip], ids=["storm", "drip"])
def test_whoever_has_the_secret_is_served_while_strangers_hold_all_that_is_theirs(
    rig: NodeRig, monkeypatch: pytest.MonkeyPatch, attack: type[Storm | Drip]
) -> None:
    monkeypatch.setattr(node_module, "GREETING_MAX", 128)
    node = rig.node(secret=SECRET)
    alone_s = [serve_honest(node) for _ in range(20)]
    attacker = attack(node, 160)
    rig.undo.callback(attacker.close)
    with attacking(attacker):
        until(lambda: node.connections >= 128, WAIT_S)
        beside_s = [serve_honest(node) for _ in range(20)]
    told(attack.__name__.lower(), alone_s, beside_s)
    assert node.alive and node.connections <= 128


def test_a_stranger_has_no_thread(rig: NodeRig) -> None:
    node = rig.node(secret=SECRET)
    before = usage().threads
    strangers = [socket.create_connection(node.address, timeout=WAIT_S) for _ in range(50)]
    for sock in strangers[:25]:
        sock.sendall(wire.greeting(True))
    until(lambda: node.connections == 50, WAIT_S)
    assert usage().threads == before
    serve_honest(node)
    for sock in strangers:
        sock.close()
    until(lambda: node.connections == 0 and usage().threads == before, WAIT_S)


def test_strangers_of_one_address_make_room_for_each_other(rig: NodeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_module, "GREETING_MAX", 8)
    node = rig.node(secret=SECRET)
    quiet = socket.create_connection(node.address, WAIT_S, ("127.0.0.2", 0))
    rig.undo.callback(quiet.close)
    until(lambda: node.connections == 1, WAIT_S)
    many = [socket.create_connection(node.address, timeout=WAIT_S) for _ in range(40)]
    for sock in many[:33]:
        assert sock.recv(1) == b"", "it made room"
    quiet.sendall(wire.greeting(True))
    assert len(quiet.recv(4096)) >= wire.GREETING.size, "it is still there"
    for sock in many:
        sock.close()


def test_a_stranger_that_makes_room_is_told_why_where_there_is_no_secret(
    rig: NodeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_module, "GREETING_MAX", 2)
    node = rig.node()
    silent = socket.create_connection(node.address, timeout=WAIT_S)
    rig.undo.callback(silent.close)
    greeted = rig.by_hand(node, None)
    for _ in range(3):
        rig.by_hand(node, None)
    reply = greeted.reply()
    assert isinstance(reply, wire.Failed) and "2 connections have not said Hello, the limit; try again" in reply.detail
    wire.receive_exactly(silent, memoryview(bytearray(wire.GREETING.size)))
    reply = wire.decode_reply(wire.FrameReader(silent).next()[0])
    assert isinstance(reply, wire.Failed) and reply.reason == "network"


def test_an_address_beyond_its_share_of_connections_is_told_and_others_are_served(rig: NodeRig) -> None:
    node = rig.node(connections=8, connections_per_address=4)
    lanes = [rig.by_hand(node, "read", "127.0.0.2") for _ in range(4)]
    refused = HandMade(node.address, None, "127.0.0.2")
    refused.send(wire.Hello("read"))
    reply = refused.reply()
    assert isinstance(reply, wire.Failed)
    place = f"127.0.0.1:{node.address[1]}"
    assert reply.detail == f"node {place} has 4 connections of address 127.0.0.2, the limit for one address"
    refused.until_ended()
    refused.sock.close()
    assert write(rig.client(node), key_of("a")) == "ok"
    lanes.pop().sock.close()
    until(lambda: node.connections == 6, WAIT_S)
    rig.by_hand(node, "read", "127.0.0.2")
    with pytest.raises(PoolError, match="has 8 connections, the limit"):
        RemotePool(*node.address)


def test_a_host_with_sixteen_engines_of_eight_lanes_fits() -> None:
    limits = ConnectionLimits.within(1 << 16, node_module.GREETING_MAX, node_module.CONNECTIONS_MAX)
    assert limits.peers_per_address >= 16 * (2 + 8)


def test_a_greeting_that_is_no_hello_says_so(rig: NodeRig, caplog: pytest.LogCaptureFixture) -> None:
    node = rig.node()
    for data, line in (
        (wire.frame(wire.Stat(1, 1.0)), "the first message is Stat, not Hello"),
        (wire.frame(wire.Hello("read"), 5), "only Write has a payload"),
        (wire.PREFIX.pack(wire.HELLO_BYTES_MAX + 1, 0) + bytes(60), "a first message of 1025 bytes; 1024 are allowed"),
        (os.urandom(4).replace(b"\0", b"\1") + b"\xff" * 60, "are allowed (is the peer a Penstock pool?)"),
    ):
        made = rig.by_hand(node, None)
        made.sock.sendall(data)
        made.until_ended()
        until(lambda line=line: line in caplog.text, WAIT_S)  # type: ignore[misc]
    assert node.connections == 0


def test_a_long_lane_name_needs_more_than_one_head(rig: NodeRig) -> None:
    node = rig.node()
    made = rig.by_hand(node, None)
    data = wire.frame(wire.Hello("x" * 64, bytes(16)))
    assert len(data) > wire.HEAD_BYTES
    for at in range(0, len(data), 7):
        made.sock.sendall(data[at : at + 7])
    assert isinstance(made.reply(), wire.Ready)


def test_a_client_for_whom_there_is_no_thread_is_not_told_that_the_node_is_ready(
    rig: NodeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would take the node for one that is up, and lose the connection again and again."""
    node = rig.node()
    real = node.connection_of
    short = [True]

    def connection_of(sock: socket.socket, peer: str) -> ClientConnection:
        made = real(sock, peer)

        def start() -> None:
            raise RuntimeError("can't start new thread")

        if short:
            monkeypatch.setattr(made, "start", start)
        return made

    monkeypatch.setattr(node, "connection_of", connection_of)
    with socket.create_connection(node.address, timeout=WAIT_S) as sock:
        sock.sendall(wire.greeting() + wire.frame(wire.Hello("read")))
        said = b""
        with contextlib.suppress(ConnectionError):
            while part := sock.recv(4096):
                said += part
    assert said == wire.greeting()
    until(lambda: node.connections == 0, WAIT_S)
    short.clear()
    assert write(rig.client(node), key_of("a")) == "ok" and node.alive
