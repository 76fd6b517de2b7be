"""Strangers and greedy engines at the router's port for engines."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

import pytest

from penstock.cluster import wire
from penstock.cluster.router import engine_registry as port_module
from penstock.pool.net.secret import prove_as_client
from tests.asking import WAIT_S, wait_until
from tests.cluster.router_rig import SECRET, Client, CountingHost, cluster
from tests.flood import reset

PROMPT = [5, 6, 7, 8]
KINDS = {"silent": b"", "greets": wire.greeting(), "drips": wire.greeting() + bytes(40)}


def finished(client: Client, count: int = 9) -> None:
    assert client.wait().finish_reason == "length" and len(client.tokens) == count


@contextlib.contextmanager
def strangers(address: tuple[str, int], kind: str) -> Iterator[None]:
    """Connections as fast as they come, 600 of which stay."""
    stop = threading.Event()

    def run() -> None:
        held: list[socket.socket] = []
        while not stop.is_set():
            with contextlib.suppress(OSError):
                held.append(socket.create_connection(address, timeout=WAIT_S))
                held[-1].sendall(KINDS[kind])
            if len(held) > 600:
                reset(held.pop(0))
        for sock in held:
            reset(sock)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(WAIT_S)


@pytest.mark.parametrize("kind", KINDS)
def test_engines_register_and_serve_while_strangers_hold_all_that_is_theirs(kind: str) -> None:
    with cluster(lease_s=30.0) as c:
        c.engine("before")
        with strangers(c.address, kind):
            wait_until(lambda: c.router.port.counts.strangers_dropped > 100, "more strangers than fit")
            for number in range(3):
                c.engine(f"e{number}")
            for _ in range(5):
                finished(c.ask(PROMPT, 9))
        assert len(c.router.port.engines) == 4 and c.router.port.counts.lost == 0


def proved(address: tuple[str, int], source: str = "127.0.0.1") -> socket.socket:
    sock = socket.create_connection(address, WAIT_S, (source, 0))
    sock.sendall(wire.greeting())
    got = b""
    while len(got) < wire.GREETING.size:
        got += sock.recv(wire.GREETING.size - len(got))
    prove_as_client(sock, SECRET, wire.PURPOSE)
    return sock


def answer(sock: socket.socket) -> wire.FromRouter:
    data = b""
    while len(data) < 4 or len(data) < 4 + wire.frame_length(data[:4]):
        part = sock.recv(4096)
        assert part, "it closed without a word"
        data += part
    return wire.decode_from_router(data[4 : 4 + wire.frame_length(data[:4])])


def test_an_address_beyond_its_share_of_engines_is_told_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(port_module, "ENGINES_OF_ADDRESS_MAX", 2)
    with cluster() as c:
        c.engine("e1")
        c.engine("e2")
        register = wire.Register(c.card("e3"), CountingHost().report(), [])
        with proved(c.address) as sock:
            sock.sendall(wire.frame(register))
            refused = answer(sock)
            assert isinstance(refused, wire.Refused) and refused.retry
            assert refused.reason == "the router has 2 connections of address 127.0.0.1, the limit for one address"
        with proved(c.address, "127.0.0.2") as sock:
            sock.sendall(wire.frame(register))
            assert isinstance(answer(sock), wire.Welcome)
        finished(c.ask(PROMPT, 9))


def test_an_engine_that_sends_without_end_holds_up_no_other() -> None:
    """Frames that are there already were read without a pause for anybody else."""
    with cluster(lease_s=30.0) as c:
        c.engine("e1")
        with proved(c.address) as sock:
            sock.sendall(wire.frame(wire.Register(c.card("greedy"), CountingHost().report(), [])))
            welcome = answer(sock)
            assert isinstance(welcome, wire.Welcome)
            events = wire.frame(wire.Events(welcome.epoch, [])) * 20_000
            stop = threading.Event()

            def send() -> None:
                with contextlib.suppress(OSError):
                    while not stop.is_set():
                        sock.sendall(events)

            thread = threading.Thread(target=send, daemon=True)
            thread.start()
            try:
                for _ in range(10):
                    finished(c.ask(PROMPT, 9))
            finally:
                stop.set()
                sock.shutdown(socket.SHUT_RDWR)
                thread.join(WAIT_S)
