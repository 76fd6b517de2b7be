"""A relay gets mutants of its protocol's messages, and numbers at their bounds, while an honest engine hands over."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from penstock.cluster.handoff.buffer import DecodeBuffer
from penstock.cluster.handoff.incoming import Incoming
from penstock.cluster.handoff.lending import Lending
from penstock.cluster.handoff.relay import RelayNode
from penstock.cluster.messages import PlacedRequest
from penstock.core.keys import KeyChain, root_key
from penstock.core.packed_tokens import pack_tokens
from penstock.engine.api import GenerationRequest, TokenEvent
from penstock.engine.runner import SamplingParams
from penstock.pool.checksum import block_checksum
from penstock.pool.losses import losses
from penstock.pool.net import wire
from penstock.pool.net.open_mover import open_mover
from penstock.pool.setup.open import open_local_pool
from penstock.process.guarded_thread import thread_failures
from tests.fuzz_messages import MESSAGES, SEED, Protocol
from tests.message_mutants import Piece, mutants
from tests.pool.net.node_rig import fit_span
from tests.process_figures import back_to, figures
from tests.waiting import wait_until

MIB = 1 << 20
BLOCK, BLOCK_BYTES, BLOCKS = 16, 4096, 64
WAIT_S = 60.0
REQUESTS = Protocol(
    "request", wire.Request, lambda raw: wire.decode_request(memoryview(raw)), wire.ProtocolError, fit=fit_span
)
ROUNDS = max(1, MESSAGES // 250_000)  # for each type of message


class Relay:
    """A relay with shared memory in front of a decode engine that takes what is handed over and generates nothing."""

    def __init__(self) -> None:
        self.begun: list[GenerationRequest] = []
        self.mover: Any = open_mover("shared-memory")
        self.pool = open_local_pool((1 << 20,), ())
        self.buffer = DecodeBuffer(BLOCK_BYTES, BLOCKS, self.pool, self.mover.allocate)

        def submit(request: GenerationRequest, on_event: Any) -> None:
            self.begun.append(request)
            on_event(TokenEvent(None, "length"))

        engine: Any = SimpleNamespace(
            check=lambda request: root_key(b"x", ""), config=SimpleNamespace(block_tokens=BLOCK),
            cancel=lambda name: None, submit=submit,
        )  # fmt: skip
        self.incoming = Incoming(engine, self.buffer, self.pool, 600.0, 2.0)
        self.node = RelayNode(self.buffer, self.incoming, "127.0.0.1", 0, mover=self.mover)

    def expect(self, name: str, blocks: int) -> tuple[list[bytes], list[TokenEvent]]:
        """The router names a hand-off; returns its keys, and what becomes of it."""
        tokens = [sum(name.encode()) * 7 + at for at in range(blocks * BLOCK + 1)]
        placed = PlacedRequest(
            request_id=name, epoch=1, prompt=pack_tokens(tokens), sampling=SamplingParams(max_tokens=8), part="decode",
            attempt=1, decode_relay="d:1",
        )  # fmt: skip
        events: list[TokenEvent] = []
        self.incoming.submit(placed, GenerationRequest(placed.hand_off_id, tokens, placed.sampling), events.append)
        return KeyChain(root_key(b"x", ""), BLOCK).extend(tokens), events

    def close(self) -> None:
        self.node.close(5.0)
        self.incoming.close(5.0)
        self.buffer.check_integrity()
        self.pool.close(5.0)


@pytest.fixture
def relay() -> Iterator[Relay]:
    made = Relay()
    yield made
    made.close()


class Peer:
    """A prefill engine's end of one connection."""

    def __init__(self, relay: Relay, lane: str = "control") -> None:
        self.sock = socket.create_connection(relay.node.address, timeout=WAIT_S)
        self.frames = wire.FrameReader(self.sock)
        self.sock.sendall(wire.greeting() + wire.frame(wire.Hello(lane)))
        wire.receive_exactly(self.sock, memoryview(bytearray(wire.GREETING.size)))
        assert isinstance(self.reply()[0], wire.Ready)

    def ask(self, message: wire.Request, payload: bytes = b"") -> Any:
        self.sock.sendall(wire.frame(message, len(payload)) + payload)
        return self.reply()[0]

    def reply(self) -> tuple[Any, bytes]:
        header, payload_bytes = self.frames.next()
        reply = wire.decode_reply(header)
        payload = bytearray(payload_bytes)
        wire.receive_exactly(self.sock, memoryview(payload))
        return reply, bytes(payload)


def hand_over(relay: Relay, peer: Peer, name: str, missing: int = 0, token: int = 5) -> list[TokenEvent]:
    """As an honest prefill engine does: open, write three blocks, read one back, close."""
    keys, events = relay.expect(name, 3)
    opened = peer.ask(wire.Open(1, f"{name}#1", False, 20.0))
    assert isinstance(opened, wire.Opened) and len(opened.blocks) == 3
    for number, key in enumerate(keys):
        data = bytes([number + 1]) * BLOCK_BYTES
        message = wire.Write(2, key, b"p" * 16, BLOCK_BYTES, 0, b"", 0.0, block_checksum(key, memoryview(data)), 20.0)
        assert isinstance(peer.ask(message, data), wire.Written)
    peer.sock.sendall(wire.frame(wire.Read(3, keys[1], BLOCK_BYTES, 20.0)))
    twos = b"\2" * BLOCK_BYTES
    assert peer.reply() == (wire.Block(3, keys[1], block_checksum(keys[1], memoryview(twos))), twos)
    assert isinstance(peer.ask(wire.HandedOver(4, f"{name}#1", token, missing, 20.0)), wire.Accepted)
    return events


class Honest:
    """Hands over again and again, until it is stopped."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._stopped = threading.Event()
        self.served = 0
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            peer = Peer(self._relay)
            while not self._stopped.is_set():
                assert hand_over(self._relay, peer, f"h{self.served}")[-1].finish_reason == "length"
                self.served += 1
            peer.sock.close()
        except BaseException as error:  # noqa: BLE001 (any failure is what the test looks for)
            self.error = error

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join(WAIT_S)


def attack(relay: Relay, rounds: int) -> None:
    for cls in REQUESTS.kinds:

        @seed(SEED)
        @settings(max_examples=rounds, database=None, suppress_health_check=[*HealthCheck])
        @given(REQUESTS.valid(cls), st.integers(0, 1 << 32))
        def run(base: list[Piece], number: int) -> None:
            draws = random.Random(number)
            made = list(mutants(base, 100, draws))
            draws.shuffle(made)
            for at in range(0, 24, 3):
                peer = Peer(relay)
                with contextlib.suppress(OSError):
                    for body in made[at : at + 3]:
                        peer.sock.sendall((struct.pack("<II", len(body), 0) + body).ljust(wire.HEAD_BYTES, b"\0"))
                    if draws.random() < 0.3:
                        peer.sock.settimeout(0.05)
                        peer.sock.recv(4096)
                peer.sock.close()

        run()


def test_a_relay_that_gets_mutants_serves_an_honest_engine(relay: Relay, caplog: pytest.LogCaptureFixture) -> None:
    failed = thread_failures()
    honest = Honest(relay)
    attack(relay, 1)
    before = figures()
    attack(relay, ROUNDS)
    back_to(before, 48 * MIB, lambda: relay.node.connections <= 1)
    honest.stop()
    assert honest.error is None and honest.served > 3
    assert relay.node.alive and thread_failures() == failed
    assert not [record for record in caplog.records if record.exc_info], "nothing raised"
    assert len(caplog.records) < 200
    assert relay.buffer.free_blocks == BLOCKS


def test_an_id_that_is_used_twice_to_borrow_keeps_no_block(relay: Relay) -> None:
    keys, _ = relay.expect("lent", 3)
    peer = Peer(relay)
    for key in keys:
        data = b"d" * BLOCK_BYTES
        message = wire.Write(1, key, b"p" * 16, BLOCK_BYTES, 0, b"", 0.0, block_checksum(key, memoryview(data)), 20.0)
        assert isinstance(peer.ask(message, data), wire.Written)
    for key in keys * 20:
        assert isinstance(peer.ask(wire.Lend(7, key, BLOCK_BYTES, wire.TIMEOUT_S_MAX)), wire.Lent)
    peer.sock.close()
    relay.incoming.cancel("lent#1")
    wait_until(lambda: relay.buffer.free_blocks >= BLOCKS, "no block stays lent", WAIT_S)


def test_what_is_lent_twice_by_one_id_is_given_back_once(relay: Relay) -> None:
    keys, _ = relay.expect("again", 1)
    data = b"d" * BLOCK_BYTES
    into = relay.buffer.begin_write(keys[0])
    assert isinstance(into, memoryview)
    into[:BLOCK_BYTES] = data
    relay.buffer.end_write(keys[0], (block_checksum(keys[0], memoryview(data)), b""))
    assert relay.node.lending is not None
    lending: Lending = relay.node.lending
    for _ in range(3):
        held = relay.buffer.hold(keys[0])
        assert held is not None and lending.lend(1, 1, held, time.monotonic() + 1e5) == relay.buffer.offset(held)
    lending.returned(1, 1)
    relay.incoming.cancel("again#1")
    assert relay.buffer.free_blocks == BLOCKS
    relay.buffer.check_integrity()


def test_a_count_of_missing_blocks_is_at_most_that_of_the_hand_off(relay: Relay) -> None:
    before = losses().get("blocks_not_handed_over", 0)
    peer = Peer(relay)
    events = hand_over(relay, peer, "few", missing=wire.PROMPT_BLOCKS_MAX)
    assert events[-1].finish_reason == "length" and relay.begun[-1].prompt_tokens[-1] == 5
    assert losses()["blocks_not_handed_over"] - before <= 3
    peer.sock.close()


def test_an_opening_a_day_long_ends_no_other_ones_deadline(relay: Relay) -> None:
    remote, local = Peer(relay), Peer(relay)
    for number in range(40):
        remote.sock.sendall(wire.frame(wire.Open(number, f"unknown {number}#1", True, wire.TIMEOUT_S_MAX)))
    answer = local.ask(wire.Open(1, "honest#1", False, 0.2))
    assert isinstance(answer, wire.Failed) and answer.reason == "deadline"
    assert len(hand_over(relay, local, "after")) == 1
    remote.sock.close()
    local.sock.close()
