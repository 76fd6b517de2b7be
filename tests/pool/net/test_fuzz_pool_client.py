"""A client of a node that sends mutants of replies: each request ends once, and other nodes go on serving."""

from __future__ import annotations

import contextlib
import logging
import queue
import random
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import msgspec
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from penstock.core.spans import SPAN_BYTES_MAX
from penstock.pool.api import PoolError
from penstock.pool.net import wire
from penstock.pool.net.remote import RemotePool
from penstock.process.guarded_thread import thread_failures
from tests.fuzz_messages import MESSAGES, SEED, Protocol
from tests.message_mutants import Piece, mutants
from tests.pool.helpers import Outcome, key_of, new_block, read, staged, write
from tests.pool.net.node_rig import MIB, NodeRig, fit_span
from tests.process_figures import back_to, figures

REPLIES = Protocol(
    "reply", wire.Reply, lambda raw: wire.decode_reply(memoryview(raw)), wire.ProtocolError, fit=fit_span
)
ROUNDS = max(1, MESSAGES // 500_000)  # for each type of message


class OddNode:
    """Says Ready as a node does, and answers every request with the next of `bodies`, whatever was asked; with the id
    and the key of what was asked where the body is a reply that has them."""

    def __init__(self, bodies: list[bytes], draws: random.Random, share_named: float = 0.8) -> None:
        self._bodies, self._draws, self._share_named = bodies, draws, share_named
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(30.0)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                thread = threading.Thread(target=self._serve, args=(sock,), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _serve(self, sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError, wire.ProtocolError):
            wire.receive_exactly(sock, memoryview(bytearray(wire.GREETING.size)))
            sock.sendall(wire.greeting())
            frames = wire.FrameReader(sock)
            while True:
                header, payload_bytes = frames.next()
                request = wire.decode_request(header)
                wire.receive_exactly(sock, memoryview(bytearray(payload_bytes)))
                if isinstance(request, wire.Hello):
                    sock.sendall(wire.frame(wire.Ready("odd", b"o" * 16, 0.0, 0, 0.0, SPAN_BYTES_MAX)))
                elif not isinstance(request, wire.Alive | wire.Corrupt | wire.Return):
                    body = self._answer(request)
                    odd_bytes = self._share_named < 1.0 and self._draws.random() < 0.5
                    size = getattr(request, "size_bytes", 0) if odd_bytes else 0
                    head = (struct.pack("<II", len(body), size) + body).ljust(wire.HEAD_BYTES, b"\0")
                    sock.sendall(head + bytes(size))

    def _answer(self, request: wire.Request) -> bytes:
        body = self._bodies[int(self._draws.random() * len(self._bodies))]
        try:
            reply = wire.decode_reply(memoryview(body))
        except wire.ProtocolError:
            return body
        if self._draws.random() < self._share_named and hasattr(reply, "id"):
            reply.id = request.id
            if isinstance(reply, wire.Block) and isinstance(request, wire.Read):
                reply.key = request.key
            if isinstance(reply, wire.Blocks) and isinstance(request, wire.ReadMany):
                reply.keys = request.keys
        return msgspec.msgpack.encode(reply)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[NodeRig]:
    made = NodeRig(tmp_path)
    with made.undo:
        yield made


def use(address: tuple[str, int]) -> None:
    """Every method, once; whatever the node answers."""
    client = RemotePool(*address, must_connect=False)
    outcomes = [Outcome(), Outcome()]
    client.read(key_of("a"), 4096, staged(key_of("a"), 4096), 0.5, outcomes[0])
    client.write(new_block(key_of("b")), staged(key_of("b"), 4096), 0.5, outcomes[1])
    spans: queue.SimpleQueue[list[PoolError | None]] = queue.SimpleQueue()
    keys, datas = [key_of("a"), key_of("c")], [staged(key_of("a"), 4096), staged(key_of("c"), 4096)]
    client.read_many(keys, 4096, datas, 0.5, spans.put)
    client.write_many([new_block(key) for key in keys], datas, 0.5, spans.put)
    for ask in (lambda: client.lookup([key_of("a"), key_of("b")], 0.5), lambda: client.stat(0.5)):
        with contextlib.suppress(PoolError):
            ask()
    for outcome in outcomes:
        assert outcome.reason(30.0) in (*PoolError.REASONS, "ok")
    assert [len(spans.get(timeout=30.0)) for _ in range(2)] == [2, 2]
    client.close(5.0)
    assert spans.empty() and all(outcome.pending() for outcome in outcomes), "a request that ended twice"


WRONG = [
    wire.Written(1), wire.Evicted(1, 1), wire.Accepted(1), wire.Lent(1, 0, 0), wire.Opened(1, b""),
    wire.Found(1, [4096, 0], [0, 0], [["memory:0"]]), wire.Attached(1, b""),
]  # fmt: skip


@pytest.mark.parametrize("reply", WRONG, ids=lambda one: type(one).__name__)
def test_an_answer_of_another_kind_is_none(reply: wire.Reply) -> None:
    """A read that is answered "written" must not count as a block that came; a write answered otherwise is not stored.
    Each ended with success, or never."""
    node = OddNode([msgspec.msgpack.encode(reply)], random.Random(1), share_named=1.0)
    client = RemotePool(*node.address)
    outcomes = [Outcome(), Outcome()]
    client.read(key_of("a"), 4096, staged(key_of("a"), 4096), 20.0, outcomes[0])
    client.write(new_block(key_of("b")), staged(key_of("b"), 4096), 20.0, outcomes[1])
    stored = "ok" if isinstance(reply, wire.Written) else "network"
    assert [outcome.reason(30.0) for outcome in outcomes] == ["network", stored]
    assert "answered Read with" in client.down_reason or "answered Write with" in client.down_reason
    client.close(5.0)
    node.close()


def test_every_request_that_is_answered_says_by_what() -> None:
    silent = {wire.Hello, wire.Corrupt, wire.Return, wire.Alive, wire.ReturnMany}
    assert set(wire.ANSWERS) | silent == set(get_args(wire.Request)) and not silent & set(wire.ANSWERS)


def attack(rounds: int) -> None:
    for cls in REPLIES.kinds:

        @seed(SEED)
        @settings(max_examples=rounds, database=None, suppress_health_check=[*HealthCheck])
        @given(REPLIES.valid(cls), st.integers(0, 1 << 32))
        def run(base: list[Piece], number: int) -> None:
            draws = random.Random(number)
            made = list(mutants(base, 300, draws))
            draws.shuffle(made)
            node = OddNode(made, draws)
            try:
                for _ in range(3):
                    use(node.address)
            finally:
                node.close()

        run()


@pytest.mark.slow
def test_a_client_of_a_node_that_sends_mutants_ends_every_request(
    rig: NodeRig, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR, "penstock")
    failed = thread_failures()
    honest = rig.client(rig.node(rig.pool(8 * MIB)))
    assert write(honest, key_of("kept")) == "ok"
    attack(1)
    before = figures()
    attack(2 * ROUNDS)
    back_to(before, 32 * MIB)
    assert read(honest, key_of("kept")) == "ok"
    assert thread_failures() == failed
    assert not [record for record in caplog.records if record.exc_info], "nothing raised"
