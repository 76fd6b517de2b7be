"""Engines of a router, for `penstock bench scale`: all in one process, without a model. Each registers, sends
heartbeats as real ones do, and answers every part of a request with one token."""

from __future__ import annotations

import contextlib
import re
import select
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Literal

import msgspec

from penstock.bench.processes import ReadyProcess
from penstock.cluster import wire
from penstock.cluster.messages import EngineReport, LinkReport, PlacedRequest
from penstock.engine.api import RequestReport
from penstock.framing import Greeting
from penstock.pool.net.secret import Secret, prove_as_client
from penstock.process.child_python import python_command
from penstock.process.file_limit import raise_file_limit
from penstock.units import parse_address

READY = re.compile(r"engines registered: (\d+)\.")
HOST_ENGINES = 8
LINKS = 32  # that a prefill engine reports
TIMEOUT_S, READY_S = 30.0, 300.0
ATTEMPTS, AT_ONCE = 4, 32  # registrations of one engine, and under way
RECEIVE_BYTES = 1 << 20
ANSWERED = RequestReport(32_768, 32_704, 1 << 30, 1, 0.5, 1.0, None, 0.1, 0.1, 0.1, 0.1, 0, {}, (("fetch", 0.0, 0.4),))


def engines_process(router: tuple[str, int], secret_file: Path, engines: int, beat_s: float) -> ReadyProcess:
    """So many engines for this router, half of the hosts for prefill and half for decode; each sends a heartbeat every
    `beat_s`."""
    arguments = (f"{router[0]}:{router[1]}", str(secret_file), str(engines), str(beat_s))
    return ReadyProcess(python_command("-m", __name__, *arguments), READY, ready_s=READY_S)


class _Connection:
    """A registration with the router, or with one of its front processes."""

    def __init__(self, router: tuple[str, int], secret: Secret, source: str, first: bytes, front: int | None) -> None:
        """`first`: the frames of the registration."""
        self.sock = socket.create_connection(router, TIMEOUT_S, (source, 0))
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._arrived = bytearray()
        self.welcome = self._register(secret, first, wire.GREETING if front is None else wire.front_greeting(front))
        self.sock.setblocking(False)

    def messages(self) -> Iterator[wire.FromRouter]:
        """What arrived. Raises ConnectionError when the router is gone."""
        try:
            received = self.sock.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return
        if not received:
            raise ConnectionError("the router has closed the connection")
        arrived = self._arrived
        arrived += received
        while len(arrived) >= wire.LENGTH.size:
            end = wire.LENGTH.size + wire.frame_length(bytes(arrived[: wire.LENGTH.size]))
            if len(arrived) < end:
                return
            message = wire.decode_from_router(bytes(arrived[wire.LENGTH.size : end]))
            del arrived[:end]
            yield message

    def send(self, frame: bytes) -> None:
        """Frames are short, and the router reads: what does not fit ends the measurement."""
        if self.sock.send(frame) != len(frame):
            raise ConnectionError("the router does not read")

    def _register(self, secret: Secret, first: bytes, greeting: Greeting) -> wire.Welcome:
        sock = self.sock
        sock.sendall(greeting.pack(True))
        greeting.check(_exactly(sock, greeting.size), True)
        prove_as_client(sock, secret, wire.PURPOSE)
        sock.sendall(first)
        answer = wire.decode_from_router(_exactly(sock, wire.frame_length(_exactly(sock, wire.LENGTH.size))))
        if not isinstance(answer, wire.Welcome):
            raise ConnectionError(f"the router answered with {answer}")
        return answer


class _Engine:
    """One engine, connected to the router and to its fronts. A heartbeat reports as many preemptions as there were
    heartbeats, so that the router counts them."""

    def __init__(self, router: tuple[str, int], secret: Secret, number: int) -> None:
        host = number // HOST_ENGINES
        source = f"127.0.{1 + host // 250}.{1 + host % 250}"
        role: Literal["prefill", "decode"] = "decode" if host % 2 else "prefill"
        card = wire.EngineCard(
            name=f"e{number}", role=role, host=f"h{host}", instance=f"i{number}", model="m", block_tokens=64,
            block_bytes=8 << 20, max_context_tokens=1 << 17, vocab_size=128_256, relay_address=f"{source}:7000",
            links_to_fronts=True,
        )  # fmt: skip
        self._report = _report(role == "prefill")
        self._sequence = self._placed = 0
        first = b"".join(wire.register_frames(card, self._report, []))
        self._router = _Connection(router, secret, source, first, None)
        fronts = [_Connection(router, secret, source, first, at) for at in range(self._router.welcome.fronts)]
        self.connections = [self._router, *fronts]

    def beat(self) -> None:
        """Send a heartbeat: all that changes with load has changed."""
        self._sequence += 1
        at = self._sequence
        self._report = msgspec.structs.replace(
            self._report, preemptions=at, tokens=at % 100_000, unfinished=at % 100, read_queue_tokens=at % 50_000,
            storage_bytes_per_s=4e10 + at % 1000 * 1e6, compute=(1e-3, 1e-5 + at % 1000 * 1e-9, 1e-10),
        )  # fmt: skip
        self._router.send(wire.frame(wire.Heartbeat(self._router.welcome.epoch, at, self._report, self._placed)))

    def take(self, connection: _Connection) -> None:
        """Read what arrived, and answer it. Raises ConnectionError when the router is gone."""
        for message in connection.messages():
            if isinstance(message, wire.Place):
                self._placed = max(self._placed, message.number)
                _answer(connection, message.placed)


def _report(prefill: bool) -> EngineReport:
    links = [
        LinkReport(relay=f"127.0.{at}.1:7000", direction="hand-off" if at % 2 else "read", load_bytes_per_s=1e9,
                   backlog_bytes=at << 20, bytes_per_s=2e10)
        for at in range(LINKS)
    ]  # fmt: skip
    return EngineReport(total_pages=20_000, compute=(1e-3, 1e-5, 1e-10), storage_bytes_per_s=4e10,
                        links=links if prefill else [])  # fmt: skip


def heartbeat_bytes() -> list[int]:
    """Lengths of a heartbeat of a prefill engine, and of a decode engine."""
    return [len(wire.frame(wire.Heartbeat(1, 1000, _report(prefill), 0))) for prefill in (True, False)]


def _answer(connection: _Connection, placed: PlacedRequest) -> None:
    decode = placed.part == "decode"
    event = wire.Event(
        placed.request_id, placed.attempt, placed.first_index + decode, [7], "length" if decode else "handed_over",
        report=wire.pack_report(ANSWERED),
    )  # fmt: skip
    for frame in wire.event_frames(connection.welcome.epoch, [event]):
        connection.send(frame)


def _exactly(sock: socket.socket, size: int) -> bytes:
    data = sock.recv(size, socket.MSG_WAITALL)
    if len(data) != size:
        raise ConnectionError("the router has closed the connection")
    return data


def serve(router: tuple[str, int], secret: Secret, count: int, beat_s: float) -> None:
    """Runs in a process of its own, until it is ended."""
    raise_file_limit()
    with ThreadPoolExecutor(AT_ONCE) as threads:
        engines = list(threads.map(partial(_registered, router, secret), range(count)))
    print(f"engines registered: {count}.", flush=True)
    by_file = {one.sock.fileno(): (engine, one) for engine in engines for one in engine.connections}
    ready = select.epoll()
    for file in by_file:
        ready.register(file, select.EPOLLIN)
    next_s, turn = time.monotonic(), 0
    while True:
        while next_s <= time.monotonic():
            engines[turn % count].beat()
            turn, next_s = turn + 1, next_s + beat_s / count
        for file, _ in ready.poll(max(0.0, next_s - time.monotonic())):
            engine, connection = by_file[file]
            engine.take(connection)


def _registered(router: tuple[str, int], secret: Secret, number: int) -> _Engine:
    for _ in range(ATTEMPTS - 1):
        with contextlib.suppress(OSError):  # on a busy machine a registration may take too long
            return _Engine(router, secret, number)
    return _Engine(router, secret, number)


if __name__ == "__main__":
    serve(parse_address(sys.argv[1]), Secret.read(Path(sys.argv[2])), int(sys.argv[3]), float(sys.argv[4]))
