"""What hostile hosts do to a port of peers: a pool node's, a relay's, the router's. Each attack goes on until `stop` is
set, and survives being refused. Those of strangers come without the secret, those of peers have it."""

from __future__ import annotations

import argparse
import ast
import contextlib
import itertools
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec

from penstock.cluster import wire as cluster_wire
from penstock.cluster.messages import EngineReport
from penstock.pool.net import wire
from penstock.pool.net.secret import Secret, prove_as_client
from tests.flood import reset
from tests.flooded import ATTACKED_BLOCK_BYTES, ATTACKED_KEYS, SECRET
from tests.pool.helpers import key_of

Kind = Literal["pool", "relay", "router"]
Attack = Callable[["Port", threading.Event], None]
THREADS = 4
HELD = 1000  # connections
MIB = 1 << 20
STRANGER, PEER = "127.0.0.2", "127.0.0.3"  # where they come from
LARGE_KEYS = [key_of(("large", number)) for number in range(8)]  # blocks of 8 MiB that lie in the pool
LARGE_BYTES = 8 * MIB
CLIENT_HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(506)  # as TLS begins


class Port:
    """A port of that kind, and how to come through its greeting."""

    def __init__(self, kind: Kind, address: tuple[str, int], secret: Secret = SECRET) -> None:
        self.kind, self.address, self.secret = kind, address, secret
        self.greeting = cluster_wire.greeting() if kind == "router" else wire.greeting(secret=True)
        self._purpose = cluster_wire.PURPOSE if kind == "router" else wire.SECRET_PURPOSE
        self._fitting: dict[str, Any] = {}

    def connect(self, source: str = STRANGER) -> socket.socket:
        return socket.create_connection(self.address, 10.0, (source, 0))

    def proved(self, source: str = PEER) -> socket.socket:
        """A connection that has proved the secret, and said no more."""
        sock = self.connect(source)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.sendall(self.greeting)
            wire.receive_exactly(sock, memoryview(bytearray(len(self.greeting))))
            prove_as_client(sock, self.secret, self._purpose)
        except BaseException:
            reset(sock)
            raise
        return sock

    def lane(self, lane: str, source: str = PEER) -> Lane:
        """A connection to a node that has said Hello. Raises OSError where it is refused."""
        made = Lane(self.proved(source))
        made.send(wire.Hello(lane))
        if not isinstance(made.reply(), wire.Ready):
            reset(made.sock)
            raise ConnectionError("it is not served")
        return made

    def engine(self, name: str, source: str = PEER) -> RegisteredEngine:
        """An engine that has registered, as one that fits the others: a router says what does not. Raises OSError
        where it is refused."""
        while True:
            try:
                return RegisteredEngine(self.proved(source), name, self._fitting)
            except Misfit as error:
                self._fitting = self._fitting | {error.field: error.wanted}


class Lane:
    """A client's end of a connection to a node."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.frames = wire.FrameReader(sock)
        self._block = memoryview(bytearray(LARGE_BYTES))

    def send(self, *messages: wire.Request) -> None:
        self.sock.sendall(b"".join(map(wire.frame, messages)))

    def reply(self) -> wire.Reply:
        header, payload_bytes = self.frames.next()
        reply = wire.decode_reply(header)
        wire.receive_exactly(self.sock, self._block[:payload_bytes])
        return reply


class Misfit(ConnectionError):
    """A router's engines have another value of a field."""

    def __init__(self, field: str, wanted: Any) -> None:
        super().__init__(f"{field} is to be {wanted}")
        self.field, self.wanted = field, wanted


class RegisteredEngine:
    """An engine's end of a connection to a router. It has no room for a request, so that none is placed there."""

    def __init__(self, sock: socket.socket, name: str, fitting: dict[str, Any]) -> None:
        self.sock = sock
        fields: dict[str, Any] = {"model": "m", "block_tokens": 16, "block_bytes": 4096, "vocab_size": 256} | fitting
        self.card = cluster_wire.EngineCard(
            name=name, role="prefill", host=name, instance=os.urandom(8).hex(), max_context_tokens=4096, **fields
        )
        self.report = EngineReport(total_pages=1)
        self.send(cluster_wire.Register(self.card, self.report, []))
        welcome = self.receive()
        if not isinstance(welcome, cluster_wire.Welcome):
            reset(sock)
            reason = welcome.reason if isinstance(welcome, cluster_wire.Refused) else ""
            if found := re.match(r"its (\w+) is .*; .* and the others have (.*)$", reason):
                raise Misfit(found[1], ast.literal_eval(found[2]))
            raise ConnectionError(f"it is not taken: {reason}")
        self.epoch = welcome.epoch

    def heartbeat(self, sequence: int) -> cluster_wire.Heartbeat:
        return cluster_wire.Heartbeat(self.epoch, sequence, self.report)

    def send(self, *messages: cluster_wire.FromEngine) -> None:
        self.sock.sendall(b"".join(map(cluster_wire.frame, messages)))

    def receive(self) -> cluster_wire.FromRouter:
        head = bytearray(cluster_wire.LENGTH.size)
        wire.receive_exactly(self.sock, memoryview(head))
        body = bytearray(cluster_wire.frame_length(bytes(head)))
        wire.receive_exactly(self.sock, memoryview(body))
        return cluster_wire.decode_from_router(bytes(body))


# What goes wrong for an attacker: it is refused, cut, or answered with an error.
_SURVIVED = (OSError, wire.ProtocolError, cluster_wire.ProtocolError, msgspec.MsgspecError)


def again_and_again(stop: threading.Event, once: Callable[[], None], threads: int = THREADS) -> None:
    def go_on() -> None:
        while not stop.is_set():
            try:
                once()
            except Exception as error:
                if not isinstance(error, _SURVIVED) and type(error).__name__ != "SecretRefused":
                    raise
                time.sleep(0.001)

    running = [threading.Thread(target=go_on, daemon=True) for _ in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()


def _until_ended(sock: socket.socket, stop: threading.Event) -> None:
    sock.settimeout(0.5)
    with contextlib.suppress(TimeoutError, BlockingIOError):
        while not stop.is_set() and sock.recv(1 << 16):
            pass


def _said(port: Port, stop: threading.Event, data: bytes) -> None:
    """Over connections of their own, each until it is ended."""

    def once() -> None:
        sock = port.connect()
        try:
            sock.sendall(data)
            _until_ended(sock, stop)
        finally:
            reset(sock)

    again_and_again(stop, once)


def _held(port: Port, stop: threading.Event, count: int, drips: Callable[[], Iterator[bytes]]) -> None:
    """Connections that say one part after the other, in turn; those that are ended are opened again."""
    held: list[tuple[socket.socket, Iterator[bytes]] | None] = [None] * count
    while not stop.is_set():
        for number, one in enumerate(held):
            if stop.is_set():
                break
            try:
                if one is None:
                    sock = port.connect()
                    sock.setblocking(False)
                    held[number] = one = sock, drips()
                sock, parts = one
                sock.sendall(next(parts, b""))
                if not sock.recv(1 << 16):
                    raise ConnectionError("ended")
            except BlockingIOError:
                continue
            except OSError:
                if one is not None:
                    reset(one[0])
                held[number] = None
        stop.wait(0.01)


# --- strangers, at each port ---


def connection_storm(port: Port, stop: threading.Event) -> None:
    again_and_again(stop, lambda: reset(port.connect()))


def storm_of_many_addresses(port: Port, stop: threading.Event) -> None:
    numbers = itertools.count()

    def once() -> None:
        number = next(numbers)
        reset(port.connect(f"127.1.{number // 250 % 250}.{1 + number % 250}"))

    again_and_again(stop, once)


def silent_connections(port: Port, stop: threading.Event) -> None:
    _held(port, stop, HELD, lambda: iter(()))


def greetings_that_drip(port: Port, stop: threading.Event) -> None:
    said = port.greeting + bytes(64)
    _held(port, stop, 400, lambda: (said[at : at + 1] for at in range(len(said))))


def storm_of_greetings(port: Port, stop: threading.Event) -> None:
    def once() -> None:
        with port.connect() as sock:
            sock.sendall(port.greeting)
            sock.recv(1024)

    again_and_again(stop, once)


def garbage(port: Port, stop: threading.Event) -> None:
    _said(port, stop, b"\xff" * 4096)


def garbage_after_the_greeting(port: Port, stop: threading.Event) -> None:
    _said(port, stop, port.greeting + b"\xff" * 4096)


def other_protocols(port: Port, stop: threading.Event) -> None:
    _said(port, stop, CLIENT_HELLO)


def wrong_secret(port: Port, stop: threading.Event) -> None:
    def once() -> None:
        sock = port.connect()
        try:
            sock.sendall(port.greeting)
            wire.receive_exactly(sock, memoryview(bytearray(len(port.greeting) + 32)))
            sock.sendall(os.urandom(64))
            _until_ended(sock, stop)
        finally:
            reset(sock)

    again_and_again(stop, once)


# --- peers, at nodes ---


def _over_a_lane(port: Port, stop: threading.Event, lane: str, talk: Callable[[Lane], None], threads: int) -> None:
    """`talk` again and again over a connection, and over another one where that ends."""

    def once() -> None:
        made = port.lane(lane)
        try:
            while not stop.is_set():
                talk(made)
        finally:
            reset(made.sock)

    again_and_again(stop, once, threads)


def hellos(port: Port, stop: threading.Event) -> None:
    again_and_again(stop, lambda: reset(port.lane("read").sock))


def _write(size_bytes: int, key: bytes = bytes(16)) -> wire.Write:
    return wire.Write(1, key, bytes(16), size_bytes, 0, b"", 0.0, 0, 60.0)


def payloads_that_drip(port: Port, stop: threading.Event) -> None:
    """More of them than staging memory has room for."""
    size = ATTACKED_BLOCK_BYTES if port.kind == "relay" else 32 * MIB

    def once() -> None:
        made = port.lane("write")
        try:
            made.sock.sendall(wire.frame(_write(size, ATTACKED_KEYS[-1]), size) + bytes(33 << 10))
            while not stop.is_set():
                made.sock.sendall(b"x")
                time.sleep(0.01)
        finally:
            reset(made.sock)

    again_and_again(stop, once, 16)


def huge_announcements(port: Port, stop: threading.Event) -> None:
    """Payloads of 1 GiB, and headers of 1 MiB, that end after a part of them."""
    turn = itertools.count()

    def once() -> None:
        made = port.lane("write")
        if next(turn) % 2:
            made.sock.sendall(wire.frame(_write(1 << 30), 1 << 30) + bytes(MIB))
        else:
            made.sock.sendall(wire.PREFIX.pack(wire.HEADER_BYTES_MAX, 0) + bytes(MIB // 2))
        reset(made.sock)

    again_and_again(stop, once)


def lookups(port: Port, stop: threading.Event) -> None:
    asked = [wire.Lookup(number, 60.0, os.urandom(16 * wire.KEYS_PER_MESSAGE)) for number in range(4)]

    def talk(made: Lane) -> None:
        made.send(*asked)
        for _ in asked:
            made.reply()

    _over_a_lane(port, stop, "control", talk, 8)


def evictions(port: Port, stop: threading.Event) -> None:
    asked = [wire.Evict(number, 60.0, os.urandom(16 * wire.KEYS_PER_MESSAGE)) for number in range(4)]

    def talk(made: Lane) -> None:
        made.send(*asked)
        for _ in asked:
            made.reply()

    _over_a_lane(port, stop, "control", talk, 8)


def small_questions(port: Port, stop: threading.Event) -> None:
    """As many as fit the socket, whose answers are read all at once."""
    asked = b"".join(wire.frame(wire.Lookup(number, 60.0, os.urandom(16))) for number in range(256))

    def talk(made: Lane) -> None:
        made.sock.sendall(asked)
        for _ in range(256):
            made.reply()

    _over_a_lane(port, stop, "control", talk, 8)


def messages_without_answers(port: Port, stop: threading.Event) -> None:
    told = (wire.frame(wire.Alive()) + wire.frame(wire.Corrupt(os.urandom(16), 1))) * 2000
    _over_a_lane(port, stop, "control", lambda made: made.sock.sendall(told), 8)


def refused_messages(port: Port, stop: threading.Event) -> None:
    key = os.urandom(16)
    asked = wire.frame(wire.Probe(1, 0)) + wire.frame(wire.Read(2, key, 4096, 1.0))
    asked += wire.frame(wire.HandedOver(3, "nothing", 1, 0, 1.0)) + wire.frame(wire.Lend(4, key, 4096, 1.0))

    def talk(made: Lane) -> None:
        made.sock.sendall(asked * 64)
        for _ in range(4 * 64):
            made.reply()

    _over_a_lane(port, stop, "read", talk, 8)


def bad_messages(port: Port, stop: threading.Event) -> None:
    def once() -> None:
        made = port.lane("read")
        try:
            made.sock.sendall(b"\xff" * 4096)
            _until_ended(made.sock, stop)
        finally:
            reset(made.sock)

    again_and_again(stop, once)


def _reads(port: Port, count: int) -> bytes:
    if port.kind == "relay":
        asked = [wire.Read(n, ATTACKED_KEYS[n % 2], ATTACKED_BLOCK_BYTES, 60.0) for n in range(count)]
    else:
        asked = [wire.Read(n, LARGE_KEYS[n % len(LARGE_KEYS)], LARGE_BYTES, 60.0) for n in range(count)]
    return b"".join(map(wire.frame, asked))


def reads_that_are_cut(port: Port, stop: threading.Event) -> None:
    asked = _reads(port, 16)

    def once() -> None:
        made = port.lane("read")
        made.sock.sendall(asked)
        made.sock.recv(1 << 16)
        reset(made.sock)

    again_and_again(stop, once)


def reads_that_nobody_takes(port: Port, stop: threading.Event) -> None:
    asked = _reads(port, 64)

    def once() -> None:
        made = port.lane("read")
        try:
            made.sock.sendall(asked)
            while not stop.is_set():
                time.sleep(0.05)
                made.sock.sendall(wire.frame(wire.Alive()))
        finally:
            reset(made.sock)

    again_and_again(stop, once, 32)


def answers_that_nobody_takes(port: Port, stop: threading.Event) -> None:
    asked = wire.frame(wire.Lookup(1, 60.0, os.urandom(16 * wire.KEYS_PER_MESSAGE)))
    _over_a_lane(port, stop, "control", lambda made: made.sock.sendall(asked), 16)


def small_writes(port: Port, stop: threading.Event) -> None:
    """Each with a wrong checksum, so that it is refused after it has come."""

    def talk(made: Lane) -> None:
        made.sock.sendall((wire.frame(_write(4096), 4096) + bytes(4096)) * 64)
        for _ in range(64):
            made.reply()

    _over_a_lane(port, stop, "write", talk, 8)


def openings(port: Port, stop: threading.Event) -> None:
    """Of hand-offs that no router names."""
    numbers = itertools.count()

    def talk(made: Lane) -> None:
        made.send(*[wire.Open(number, f"nothing {next(numbers)}", True, 0.001) for number in range(64)])
        for _ in range(64):
            made.reply()

    _over_a_lane(port, stop, "control", talk, 8)


# --- engines, at the router ---


def _as_an_engine(port: Port, stop: threading.Event, talk: Callable[[RegisteredEngine], None], threads: int) -> None:
    names = itertools.count()

    def once() -> None:
        made = port.engine(f"attacker-{next(names)}")
        try:
            while not stop.is_set():
                talk(made)
        finally:
            reset(made.sock)

    again_and_again(stop, once, threads)


def registrations(port: Port, stop: threading.Event) -> None:
    names = itertools.count()
    again_and_again(stop, lambda: reset(port.engine(f"attacker-{next(names)}").sock))


def heartbeats(port: Port, stop: threading.Event) -> None:
    def talk(made: RegisteredEngine) -> None:
        told = b"".join(cluster_wire.frame(made.heartbeat(number)) for number in range(256))
        while not stop.is_set():
            made.sock.sendall(told)
            for _ in range(256):
                made.receive()

    _as_an_engine(port, stop, talk, 8)


def events(port: Port, stop: threading.Event) -> None:
    """Of requests that nobody asked for, with a thousand tokens each."""
    some = [cluster_wire.Event(f"nothing-{number}", 0, 0, list(range(1000))) for number in range(50)]

    def talk(made: RegisteredEngine) -> None:
        told = cluster_wire.frame(cluster_wire.Events(made.epoch, some))
        while not stop.is_set():
            made.sock.sendall(told)

    _as_an_engine(port, stop, talk, 8)


def large_frames(port: Port, stop: threading.Event) -> None:
    """Of 48 MiB each, one message."""
    some = [cluster_wire.Event("nothing", 0, 0, [1 << 20] * (1 << 20)) for _ in range(9)]

    def talk(made: RegisteredEngine) -> None:
        told = cluster_wire.frame(cluster_wire.Events(made.epoch, some))
        while not stop.is_set():
            made.sock.sendall(told)

    _as_an_engine(port, stop, talk, 2)


def frames_that_drip(port: Port, stop: threading.Event) -> None:
    def talk(made: RegisteredEngine) -> None:
        made.sock.sendall(cluster_wire.LENGTH.pack(cluster_wire.FRAME_BYTES_MAX) + bytes(MIB))
        while not stop.is_set():
            made.sock.sendall(b"x")
            time.sleep(0.01)

    _as_an_engine(port, stop, talk, 16)


def beats_that_nobody_takes(port: Port, stop: threading.Event) -> None:
    def talk(made: RegisteredEngine) -> None:
        told = b"".join(cluster_wire.frame(made.heartbeat(number)) for number in range(256))
        while not stop.is_set():
            made.sock.sendall(told)

    _as_an_engine(port, stop, talk, 8)


def bad_frames(port: Port, stop: threading.Event) -> None:
    def once() -> None:
        sock = port.proved()
        try:
            sock.sendall((cluster_wire.LENGTH.pack(64) + b"\xff" * 64) * 64)
            _until_ended(sock, stop)
        finally:
            reset(sock)

    again_and_again(stop, once)


STRANGERS: tuple[Attack, ...] = (
    connection_storm,
    storm_of_many_addresses,
    silent_connections,
    greetings_that_drip,
    storm_of_greetings,
    garbage,
    garbage_after_the_greeting,
    other_protocols,
    wrong_secret,
)
NODES: tuple[Attack, ...] = (
    hellos,
    payloads_that_drip,
    huge_announcements,
    lookups,
    evictions,
    small_questions,
    messages_without_answers,
    refused_messages,
    bad_messages,
    reads_that_are_cut,
    reads_that_nobody_takes,
    answers_that_nobody_takes,
    small_writes,
)
ENGINES: tuple[Attack, ...] = (
    registrations,
    heartbeats,
    events,
    large_frames,
    frames_that_drip,
    beats_that_nobody_takes,
    bad_frames,
)
ATTACKS: dict[Kind, dict[str, Attack]] = {
    "pool": {one.__name__: one for one in (*STRANGERS, *NODES)},
    "relay": {one.__name__: one for one in (*STRANGERS, *NODES, openings)},
    "router": {one.__name__: one for one in (*STRANGERS, *ENGINES)},
}
EVERY_ATTACK = list(dict.fromkeys(name for attacks in ATTACKS.values() for name in attacks))


def parse_attack_flags(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """What the command line says; the flags that all measurements beside these attacks have are added."""
    parser.add_argument("--port", action="append", choices=sorted(ATTACKS), help="this port; may be repeated")
    parser.add_argument("--only", action="append", choices=EVERY_ATTACK, help="this attack; may be repeated")
    parser.add_argument("--rounds", type=int, default=1, help="the quietest of so many")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    return parser.parse_args()
