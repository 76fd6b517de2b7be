"""A pool node gets thousands of mutants of its protocol's messages, and serves an honest client all the while."""

from __future__ import annotations

import contextlib
import logging
import random
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from penstock.pool.checksum import block_checksum
from penstock.pool.net import wire
from penstock.pool.net.node import PoolNode
from penstock.pool.net.remote import RemotePool
from penstock.process.guarded_thread import thread_failures
from tests.fuzz_messages import MESSAGES, SEED, Protocol
from tests.message_mutants import mutants
from tests.pool.helpers import key_of, read, write
from tests.pool.net.node_rig import MIB, HandMade, NodeRig, fit_span
from tests.process_figures import back_to, figures

REQUESTS = Protocol(
    "request", wire.Request, lambda raw: wire.decode_request(memoryview(raw)), wire.ProtocolError, fit=fit_span
)
ROUNDS = max(2, MESSAGES // 100_000)  # for each type of message
PER_ROUND = 24
PER_CONNECTION = 3
KEPT = [key_of(f"kept {n}") for n in range(32)]
SIZE = 4096


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[NodeRig]:
    made = NodeRig(tmp_path)
    with made.undo:
        yield made


class Honest:
    """Reads what it has written, and writes more, until it is stopped."""

    def __init__(self, client: RemotePool) -> None:
        self._client = client
        self._stopped = threading.Event()
        self.served = 0
        self.wrong: list[str] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopped.is_set():
            key = KEPT[self.served % len(KEPT)]
            if (outcome := read(self._client, key, SIZE)) != "ok":  # which compares the bytes too
                self.wrong.append(f"read {outcome}")
            if (stored := write(self._client, key_of(f"new {self.served % 64}"), size_bytes=SIZE)) != "ok":
                self.wrong.append(f"write {stored}")
            self.served += 1

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join(60.0)


def framed(header: bytes, payload: bytes = b"", payload_bytes: int | None = None) -> bytes:
    size = len(payload) if payload_bytes is None else payload_bytes
    return (struct.pack("<II", len(header), size) + header).ljust(wire.HEAD_BYTES, b"\0") + payload


def payload_for(body: bytes, draws: random.Random) -> tuple[bytes, int]:
    """Bytes that go behind a message, and how many it says there are: mostly those of the write that it may be."""
    try:
        message = wire.decode_request(memoryview(body))
    except wire.ProtocolError:
        return b"", 0
    if not isinstance(message, wire.Write) or draws.random() < 0.1:
        return b"", int(draws.random() * 3)
    size = message.size_bytes
    return bytes(min(size, 1 << 16)), size


def send_to(node: PoolNode, bodies: list[bytes], draws: random.Random) -> None:
    """On one connection, which then ends: by the node, or here in the middle of whatever it does."""
    stranger = HandMade(node.address, "control")
    with contextlib.suppress(OSError):
        for body in bodies:
            payload, payload_bytes = payload_for(body, draws)
            stranger.sock.sendall(framed(body, payload, payload_bytes))
        if draws.random() < 0.3:
            stranger.sock.settimeout(0.05)
            stranger.sock.recv(4096)
    stranger.sock.close()


def attack(node: PoolNode, protocol: Protocol, rounds: int) -> None:
    for cls in protocol.kinds:

        @seed(SEED)
        @settings(max_examples=rounds, database=None, suppress_health_check=[*HealthCheck])
        @given(protocol.valid(cls), st.integers(0, 1 << 32))
        def run(base: list[object], number: int) -> None:
            draws = random.Random(number)
            made = list(mutants(base, 4 * PER_ROUND, draws))  # type: ignore[arg-type]
            draws.shuffle(made)
            for at in range(0, PER_ROUND, PER_CONNECTION):
                send_to(node, made[at : at + PER_CONNECTION], draws)

        run()


@pytest.mark.slow
def test_a_node_that_gets_mutants_serves_honest_clients(rig: NodeRig, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    failed = thread_failures()
    pool = rig.pool(8 * MIB, slab=8 * MIB)
    node = rig.node(pool)
    client = rig.client(node)
    for key in KEPT:
        assert write(client, key, size_bytes=SIZE) == "ok"
    honest = Honest(client)
    attack(node, REQUESTS, 1)  # what the first of each kind makes, caches and stacks of threads, is no growth
    before = figures()
    attack(node, REQUESTS, ROUNDS)
    back_to(before, 48 * MIB, lambda: node.connections <= 3)
    honest.stop()
    assert honest.served > 10 and honest.wrong == []
    assert node.alive and thread_failures() == failed
    pool.check_integrity()
    assert node.staging.free_bytes == node.staging.capacity_bytes, "staging memory that nobody gave back"
    assert not [record for record in caplog.records if record.exc_info], "nothing raised"
    assert len(caplog.records) < 100 and max(len(record.getMessage()) for record in caplog.records) < 1000


ABSURD: list[dict[str, Any]] = [
    {"timeout_s": wire.TIMEOUT_S_MAX, "rebuild_s": 1e6, "position": 1 << 62, "id": (1 << 63) - 1},
    {"timeout_s": 0.0, "rebuild_s": 0.0, "position": 0, "id": 0},
    {"timeout_s": 5e-324, "rebuild_s": 5e-324, "tenant": b"\xff" * 8},
    {"timeout_s": wire.TIMEOUT_S_MAX, "tenant": b"\0" * 3},
    {"timeout_s": 5.0, "parent": b""},  # a block that is its own parent
    {"timeout_s": 5.0, "size_bytes": 1},
    {"timeout_s": 5.0, "position": (1 << 62) - 1, "rebuild_s": 1e6, "size_bytes": 8191},
]


@pytest.mark.slow
def test_values_at_their_bounds_harm_only_their_sender(rig: NodeRig, caplog: pytest.LogCaptureFixture) -> None:
    """Blocks that are stored with the largest numbers there are, ids that are used twice, deadlines a day away: among
    honest writes to the same slab, whose rows share commits with theirs."""
    pool = rig.pool(0, slab=16 * MIB)
    node = rig.node(pool)
    client = rig.client(node)
    stranger = rig.by_hand(node, "write")
    failed = thread_failures()
    for turn in range(40):
        for number, odd in enumerate(ABSURD):
            key = key_of(f"odd {turn} {number}")
            fields: dict[str, Any] = {"id": 7, "key": key, "parent": key_of("p"), "size_bytes": 4096, "position": 1,
                      "tenant": b"", "rebuild_s": 0.0, "checksum": 0, "timeout_s": 5.0} | odd  # fmt: skip
            fields["parent"] = fields["parent"] or key
            data = bytes(int(str(fields["size_bytes"])))
            fields["checksum"] = block_checksum(key, memoryview(data))
            stranger.send(wire.Write(**fields), data)
            stranger.send(wire.Read(7, key, len(data), wire.TIMEOUT_S_MAX))
            stranger.send(wire.Lookup(7, wire.TIMEOUT_S_MAX, key * wire.KEYS_PER_MESSAGE))
        stranger.send(wire.Corrupt(key_of("unknown"), (1 << 64) - 1))
        honest = key_of(f"honest {turn}")
        assert write(client, honest) == "ok" and read(client, honest) == "ok"
        for _ in range(3 * len(ABSURD)):
            assert isinstance(stranger.reply(), wire.Written | wire.Failed | wire.Block | wire.Found)
    assert [read(client, key_of(f"honest {turn}")) for turn in range(40)] == ["ok"] * 40
    pool.check_integrity()
    assert node.alive and thread_failures() == failed
    assert not [record for record in caplog.records if record.exc_info], "nothing raised"
    stranger.sock.close()


def test_a_corrupt_of_two_megabytes_ends_its_connection_with_one_short_line(
    rig: NodeRig, caplog: pytest.LogCaptureFixture
) -> None:
    node = rig.node()
    client = rig.client(node)
    assert write(client, KEPT[0]) == "ok"
    for _ in range(50):
        stranger = rig.by_hand(node, "control")
        with contextlib.suppress(OSError):
            stranger.sock.sendall(framed(msgspec.msgpack.encode([7, b"k" * (1 << 19), 0])))
        stranger.until_ended()
    too_long = rig.by_hand(node, "control")
    with contextlib.suppress(OSError):
        too_long.sock.sendall(framed(msgspec.msgpack.encode([7, b"k" * (2 << 20), 0])))
    too_long.until_ended()
    assert read(client, KEPT[0]) == "ok"
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2 and max(map(len, lines)) < 300, "one for each kind of mistake"
