"""Strangers and greedy engines at the router's port for engines."""

from __future__ import annotations

import contextlib
import gc
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from penstock.cluster import wire
from penstock.cluster.router import engine_registry as port_module
from penstock.cluster.router import frame_flow
from penstock.cluster.router import router_command as command
from penstock.cluster.router.router_flags import read_router_flags
from penstock.engine.api import RequestReport
from penstock.pool.net.message_budget import MessageBudget
from penstock.pool.net.secret import prove_as_client
from penstock.server.run import HttpServer
from tests.asking import WAIT_S, wait_until
from tests.cluster.router_rig import SECRET, Client, CountingHost, cluster
from tests.flood import reset

PROMPT = [5, 6, 7, 8]
CARD = wire.EngineCard(
    name="e", role="mixed", host="h", instance="i", model="m", block_tokens=16, block_bytes=4096,
    max_context_tokens=4096, vocab_size=10,
)  # fmt: skip
SPANS = (("x" * 64, 0.0, 1.0),) * 1000
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


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The addresses whose messages are counted, message by message."""
    found: list[str] = []

    class Counting(MessageBudget):
        def used(self, source: str, cost_s: float, now_s: float) -> float:
            assert cost_s > 0.0
            found.append(source)
            return 3600.0 if source == "127.0.0.3" and found.count(source) > 1 else 0.0

    monkeypatch.setattr(port_module, "MessageBudget", Counting)
    monkeypatch.setattr(frame_flow, "AT_ONCE_S", 0.0)
    return found


def registered(address: tuple[str, int], card: wire.EngineCard, source: str) -> tuple[socket.socket, int]:
    """An engine that a test writes itself, and its epoch."""
    sock = proved(address, source)
    sock.sendall(wire.frame(wire.Register(card, CountingHost().report(), [])))
    welcome = answer(sock)
    assert isinstance(welcome, wire.Welcome)
    return sock, welcome.epoch


def test_messages_of_no_use_are_counted_by_address_and_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    addresses = counted(monkeypatch)
    with cluster(lease_s=30.0) as c:
        c.engine("e1")
        finished(c.ask(PROMPT, 100), 100)
        sock, epoch = registered(c.address, c.card("odd"), "127.0.0.2")
        with sock:
            before = addresses.count("127.0.0.1")
            event = wire.Event("nobody's", 0, 0, [1])
            sock.sendall(wire.frame(wire.Events(epoch, [event] * 100)) * 20)
            sock.sendall(wire.frame(wire.Heartbeat(epoch, 1, CountingHost().report())) * 20)
            wait_until(lambda: addresses.count("127.0.0.2") == 41, "its registration and 40 messages")
            c.ask(PROMPT, 100).wait()
            assert addresses.count("127.0.0.1") == before <= 3, "its registration, and heartbeats"


def test_an_engine_whose_address_has_used_its_part_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    addresses = counted(monkeypatch)
    with cluster(lease_s=30.0) as c:
        c.engine("e1")
        sock, epoch = registered(c.address, c.card("odd"), "127.0.0.3")
        with sock:
            beats = [wire.frame(wire.Heartbeat(epoch, number, CountingHost().report())) for number in range(8)]
            sock.sendall(b"".join(beats))
            beat = answer(sock)
            assert isinstance(beat, wire.Beat) and beat.sequence == 0, "the first one is answered at once"
            finished(c.ask(PROMPT, 9))
            assert addresses.count("127.0.0.3") == 2, "its registration and one of them; the next is not read"


@pytest.mark.parametrize("registers", [False, True])
def test_a_frame_that_would_hold_up_others_ends_its_connection_before_it_came(registers: bool) -> None:
    with cluster(lease_s=30.0) as c:
        c.engine("e1")
        sock = registered(c.address, c.card("odd"), "127.0.0.2")[0] if registers else proved(c.address)
        with sock:
            sock.sendall(wire.LENGTH.pack(wire.ENGINE_FRAME_BYTES_MAX + 1))
            with contextlib.suppress(ConnectionError):
                assert sock.recv(1) == b""
        wait_until(lambda: c.router.port.counts.refused_protocol == 1, "the refusal")
        finished(c.ask(PROMPT, 9))


def held_part(number: int, tokens: list[int]) -> wire.Held:
    return wire.Held(
        request_id=f"r{number}", attempt=0, part="mixed", label=f"l{number}", digest=bytes(16), earlier=[], index=0,
        tokens=tokens, finish_reason="stop",
    )  # fmt: skip


def test_an_engine_registers_with_more_than_a_frame_has_room_for() -> None:
    held = [held_part(number, [9] * wire.HELD_TOKENS_MAX) for number in range(24)]
    frames = wire.register_frames(CARD, CountingHost().report(), held)
    assert len(frames) > 3
    with cluster(lease_s=30.0) as c:
        register, *more = wire.register_frames(c.card("odd"), CountingHost().report(), held)
        with proved(c.address) as sock:
            sock.sendall(b"".join([register, *more]))
            welcome = answer(sock)
            assert isinstance(welcome, wire.Welcome)
            assert welcome.keep == [(one.request_id, 0) for one in held]


def test_what_an_engine_has_to_say_travels_in_short_frames_and_is_the_same() -> None:
    largest = (1 << 31) - 1
    error = "\N{GRINNING FACE}" * 4096
    report = wire.pack_report(RequestReport(1, 1, 1, 1, 0.5, 1.0, None, 0.0, 0.0, 0.0, 0.0, 0, {}, SPANS))
    events = [wire.Event("r" * 512, 1, 7, [largest] * count, "error", error, report) for count in (0, 1, 100_000)] * 3
    frames = wire.event_frames(5, events)
    came = [wire.decode_from_engine(one[wire.LENGTH.size :]) for one in frames]
    assert all(isinstance(one, wire.Events) and one.epoch == 5 for one in came)
    parts = [event for one in came if isinstance(one, wire.Events) for event in one.events]
    assert sum(len(part.tokens) for part in parts) == sum(len(event.tokens) for event in events)
    ends = [part for part in parts if part.finish_reason is not None]
    assert [(part.index + len(part.tokens), part.error, bytes(part.report)) for part in ends] == [
        (event.index + len(event.tokens), error, bytes(report)) for event in events
    ]
    at = {part.index: len(part.tokens) for part in parts[2:]}
    assert all(index + size in at or size < wire.HELD_TOKENS_MAX for index, size in at.items()), "none is missing"
    full = msgspec.structs.replace(held_part(1, [largest] * wire.HELD_TOKENS_MAX), error=error, report=report)
    assert len(wire.register_frames(CARD, CountingHost().report(), [full] * 3)) == 4
    assert wire.event_frames(5, []) == []


def test_a_router_does_not_look_at_its_modules_while_it_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full collection would stop every answer for as long as it takes."""
    frozen: list[int] = []
    monkeypatch.setattr(HttpServer, "serve_forever", lambda _: frozen.append(gc.get_freeze_count()))
    secret = tmp_path / "secret"
    secret.write_text("the secret of a router")
    secret.chmod(0o600)
    given = {"port": 0, "cluster_listen": "127.0.0.1:0", "secret_file": str(secret)}
    gc.unfreeze()
    try:
        command._serve(read_router_flags(given, None))  # noqa: SLF001 (what the command does once its flags are read)
        assert frozen[0] > len(gc.get_objects())
    finally:
        gc.unfreeze()
