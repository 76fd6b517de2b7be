"""A pool node and its client over real sockets: round trips, faults, deadlines, restarts, another's bytes."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from penstock.io.memory import aligned_buffer
from penstock.pool.api import PoolError
from penstock.pool.checksum import block_checksum
from penstock.pool.local.local_pool import LocalPool
from penstock.pool.members.header import HEADER_BYTES
from penstock.pool.net import wire
from penstock.pool.net.connect import connect_pool
from penstock.pool.net.nixl_agent import NixlAgent
from penstock.pool.net.node import PoolNode
from penstock.pool.net.remote import RemotePool
from penstock.pool.setup.open import open_local_pool
from penstock.units import parse_address
from tests.pool.helpers import Outcome, block_bytes, chain, key_of, new_block, read, staged, until, write
from tests.pool.net.one_sided_rig import WAYS, Arena, attach, use_registered_memory
from tests.waiting import read_until_ended

MIB = 1 << 20
IN_MESSAGES = pytest.mark.parametrize("setup", ["messages"], indirect=True)  # of staging memory and pace of messages


class Setup:
    """Nodes and clients; with an `arena`, which blocks are read into, those are read one-sided."""

    def __init__(self, folder: Path, arena: Arena | None = None) -> None:
        self._folder = folder
        self._arena = arena
        self._open: list[Callable[[], None]] = []

    def local(self, memory: int = 0, slab: int = 0) -> LocalPool:
        slabs = [(self._folder / "kv.slab", slab)] if slab else []
        pool = open_local_pool([memory] if memory else [], slabs, weights=[1.0] * (bool(memory) + bool(slab)))
        self._open.append(lambda: (pool.check_integrity(), pool.close(5.0))[1])
        return pool

    def node(self, pool: LocalPool, port: int = 0, pace: float | None = None, staging: int = 8 * MIB) -> PoolNode:
        agent = NixlAgent() if self._arena is not None and pace is None else None
        options = {"pace_bytes_per_s": pace, "staging_capacity_bytes": staging, "one_sided": agent}
        node = PoolNode(pool, "127.0.0.1", port, **options)  # type: ignore[arg-type]
        self._open.append(lambda: node.close(5.0))
        return node

    def client(self, node: PoolNode, connections: int = 1) -> RemotePool:
        client = RemotePool(*node.address, connections=connections)
        self._open.append(lambda: client.close(5.0))
        if self._arena is not None and node.one_sided:
            attach(client, self._arena.memory)
        return client

    def close(self) -> None:
        while self._open:
            self._open.pop()()


@pytest.fixture(params=WAYS)
def setup(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Setup]:
    one_sided = request.param == "one-sided"
    setup = Setup(tmp_path, use_registered_memory(monkeypatch, sys.modules[__name__]) if one_sided else None)
    yield setup
    setup.close()


@pytest.mark.parametrize("members", [{"memory": 8 * MIB}, {"slab": 8 * MIB}])
@pytest.mark.parametrize("connections", [1, 3])
def test_round_trips(setup: Setup, members: dict[str, int], connections: int) -> None:
    client = setup.client(setup.node(setup.local(**members)), connections)
    for size in (1, 4095, 4097, 100_000, 3 * MIB):
        assert [write(client, key_of(size), size_bytes=size), write(client, key_of(size), size_bytes=size)] == [
            "ok",
            "ok",
        ]
        assert read(client, key_of(size), size_bytes=size) == "ok"
    hit, miss = client.lookup([key_of(1), key_of("?")], 5.0)
    place = f"127.0.0.1:{client.address[1]}"
    name = "memory:0" if "memory" in members else "ssd:0"
    assert hit is not None and hit.route == (f"{name}@{place}", f"net@{place}") and hit.size_bytes == 1
    assert miss is None
    assert read(client, key_of("?")) == "missing"
    assert read(client, key_of(1), size_bytes=2) == "layout"
    assert client.stat(5.0).members[0].blocks == 5
    assert client.evict([key_of(1), key_of("?")]) == 1
    assert read(client, key_of(1), size_bytes=1) == "missing"
    assert client.lease(key_of(4095)) is None and client.host_buffers() == []


def test_many_lookups_are_split_into_messages(setup: Setup) -> None:
    client = setup.client(setup.node(setup.local(MIB)))
    assert write(client, key_of(5000)) == "ok"
    hits = client.lookup([key_of(i) for i in range(9000)], 10.0)
    assert len(hits) == 9000 and [i for i, hit in enumerate(hits) if hit] == [5000]


def test_wrong_arguments_end_as_layout(setup: Setup) -> None:
    client = setup.client(setup.node(setup.local(MIB)))
    outcomes = [Outcome() for _ in range(3)]
    client.read(key_of("a"), 8192, aligned_buffer(4096), 5.0, outcomes[0])
    client.write(new_block(key_of("a"), key_of("a")), aligned_buffer(4096), 5.0, outcomes[1])
    client.write(new_block(key_of("a"), size_bytes=8192), aligned_buffer(4096), 5.0, outcomes[2])
    assert [outcome.reason() for outcome in outcomes] == ["layout"] * 3
    assert write(client, key_of("a")) == "ok"


def test_a_block_larger_than_the_nodes_staging_is_refused_and_the_connection_lives(setup: Setup) -> None:
    client = setup.client(setup.node(setup.local(16 * MIB), staging=MIB))
    assert write(client, key_of("big"), size_bytes=2 * MIB, timeout_s=5.0) == "full"
    assert write(client, key_of("small"), size_bytes=MIB) == "ok"


def test_damage_on_the_slab_is_found_by_the_reader_and_the_node_drops_the_block(setup: Setup, tmp_path: Path) -> None:
    pool = setup.local(slab=MIB)
    client = setup.client(setup.node(pool))
    keys = [key for key, _ in chain("a", 10)]
    for key, parent in chain("a", 10):
        assert write(client, key, parent, size_bytes=5000) == "ok"
    with (tmp_path / "kv.slab").open("r+b", buffering=0) as slab:
        slab.seek(HEADER_BYTES)
        content = bytearray(slab.read(10 * 8192))
        for key in keys[:5]:
            content[content.index(block_bytes(key, 5000)[:64]) + 4999] ^= 0x10
        slab.seek(HEADER_BYTES)
        slab.write(content)
        os.fsync(slab.fileno())
    assert [read(client, key, size_bytes=5000) for key in keys] == ["checksum"] * 5 + ["ok"] * 5
    until(lambda: client.stat(5.0).checksum_errors == 5)
    assert [hit is not None for hit in client.lookup(keys, 5.0)] == [False] * 5 + [True] * 5


def test_a_port_that_is_taken_is_an_error(setup: Setup) -> None:
    pool = setup.local(MIB)
    node = setup.node(pool)
    with pytest.raises(OSError, match="in use"):
        PoolNode(pool, "127.0.0.1", node.address[1])


def test_nobody_there_is_an_error_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(PoolError, match="network"):
        connect_pool(f"127.0.0.1:{port}")


@pytest.mark.parametrize("text", ["", "host", "host:", ":70", "host:port", "host:70000"])
def test_malformed_addresses_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="HOST:PORT"):
        parse_address(text)


# --- peers that misbehave ---


class FakeNode:
    """A real socket that answers greetings and hellos, then does with reads what a test says."""

    def __init__(
        self, on_read: Callable[[socket.socket, wire.Read], None], version: int = wire.GREETING.version
    ) -> None:
        self._on_read, self._version = on_read, version
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        self.accepted = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self.accepted += 1
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        try:
            wire.receive_exactly(sock, memoryview(bytearray(wire.GREETING.size)))
            sock.sendall(replace(wire.GREETING, version=self._version).pack())
            frames = wire.FrameReader(sock)
            while True:
                request = wire.decode_request(frames.next()[0])
                if isinstance(request, wire.Hello):
                    sock.sendall(wire.frame(wire.Ready("fake")))
                elif isinstance(request, wire.Read):
                    self._on_read(sock, request)
        except OSError:
            sock.close()


@pytest.fixture
def fake() -> Iterator[Callable[..., tuple[FakeNode, RemotePool]]]:
    opened: list[FakeNode | RemotePool] = []

    def start(on_read: Callable[[socket.socket, wire.Read], None]) -> tuple[FakeNode, RemotePool]:
        node = FakeNode(on_read)
        client = RemotePool(*node.address)
        opened.extend([node, client])
        return node, client

    yield start
    for thing in reversed(opened):
        thing.close(5.0) if isinstance(thing, RemotePool) else thing.close()


def answer(sock: socket.socket, request: wire.Read, key: bytes, size: int, checksum: int = 0) -> None:
    sock.sendall(wire.frame(wire.Block(request.id, key, checksum), size) + b"x" * size)


def test_a_write_damaged_on_its_way_is_refused(setup: Setup) -> None:
    node = setup.node(setup.local(MIB))
    key, parent, data = b"k" * 16, b"p" * 16, b"y" * 4096
    with socket.create_connection(node.address, timeout=10.0) as sock:
        sock.sendall(wire.greeting() + wire.frame(wire.Hello("write")))
        wire.receive_exactly(sock, memoryview(bytearray(wire.GREETING.size)))
        frames = wire.FrameReader(sock)
        assert isinstance(wire.decode_reply(frames.next()[0]), wire.Ready)
        for number, (checksum, end) in enumerate(
            ((12345, wire.Failed), (block_checksum(key, memoryview(data)), wire.Written))
        ):
            sock.sendall(
                wire.frame(wire.Write(number, key, parent, len(data), 0, b"", 0.0, checksum, 5.0), len(data)) + data
            )
            reply = wire.decode_reply(frames.next()[0])
            assert isinstance(reply, end) and reply.id == number
            assert not isinstance(reply, wire.Failed) or reply.reason == "checksum"


def test_another_protocol_version_is_a_clear_error() -> None:
    node = FakeNode(lambda *_: None, version=9)
    with pytest.raises(PoolError, match="version 9"):
        RemotePool(*node.address)
    node.close()


def refused(address: tuple[str, int], sent: bytes) -> None:
    """Send these bytes and wait until the node has ended the connection, in whichever way it gets to us first."""
    with socket.create_connection(address) as sock, contextlib.suppress(ConnectionError):
        sock.settimeout(5.0)
        sock.sendall(sent)
        with contextlib.suppress(OSError):  # ENOTCONN: the node's reset was faster
            sock.shutdown(socket.SHUT_WR)
        read_until_ended(sock)


def test_the_node_refuses_strangers_and_lives(setup: Setup) -> None:
    node = setup.node(setup.local(MIB))
    client = setup.client(node)
    generator = random.Random(3)
    for first in (b"GET / HTTP/1.1\r\n\r\n", replace(wire.GREETING, version=7).pack(), generator.randbytes(4000)):
        refused(node.address, first)
    for _ in range(30):
        prefix = wire.PREFIX.pack(40, generator.choice((0, 1 << 31)))
        refused(node.address, wire.greeting() + prefix + generator.randbytes(200))
    assert write(client, key_of("a")) == "ok" and read(client, key_of("a")) == "ok"


@pytest.mark.parametrize("what", ["another key", "another size", "another id", "garbage", "end of stream"])
def test_answers_that_are_not_the_block_asked_for_are_never_accepted(
    fake: Callable[..., tuple[FakeNode, RemotePool]], what: str
) -> None:
    def on_read(sock: socket.socket, request: wire.Read) -> None:
        match what:
            case "another key":
                answer(sock, request, key_of("other"), request.size_bytes)
            case "another size":
                answer(sock, request, request.key, request.size_bytes + 1)
            case "another id":
                request.id += 1
                answer(sock, request, request.key, request.size_bytes)
            case "garbage":
                sock.sendall(b"\xff" * 64)
            case "end of stream":
                sock.shutdown(socket.SHUT_RDWR)

    _, client = fake(on_read)
    outcome, into = Outcome(), aligned_buffer(4096)
    client.read(key_of("a"), 4096, into, 5.0, outcome)
    assert outcome.reason() == "network"
    assert bytes(into) == bytes(4096)


def test_wrong_bytes_are_a_checksum_error(fake: Callable[..., tuple[FakeNode, RemotePool]]) -> None:
    node, client = fake(lambda sock, request: answer(sock, request, request.key, request.size_bytes, checksum=1))
    accepted = node.accepted
    assert [read(client, key_of(i)) for i in range(3)] == ["checksum"] * 3
    assert node.accepted == accepted, "a damaged block does not cost the connection"


def test_late_bytes_never_land_in_a_buffer_that_was_given_back(
    fake: Callable[..., tuple[FakeNode, RemotePool]],
) -> None:
    """The node sends half of a block, and the rest only after the client gave up and used the buffer again."""
    given_up, sent = threading.Event(), threading.Event()

    def on_read(sock: socket.socket, request: wire.Read) -> None:
        if request.key != key_of("slow"):
            answer(sock, request, request.key, request.size_bytes)
            return
        sock.sendall(wire.frame(wire.Block(request.id, request.key, 0), request.size_bytes) + b"x" * MIB)
        given_up.wait(10.0)
        try:
            sock.sendall(b"y" * (request.size_bytes - MIB))
        except OSError:
            pass
        finally:
            sent.set()

    _, client = fake(on_read)
    into, behind = aligned_buffer(4 * MIB), Outcome()
    slow = Outcome()
    client.read(key_of("slow"), 4 * MIB, into, 0.3, slow)
    client.read(key_of("behind"), 4096, aligned_buffer(4096), 10.0, behind)
    assert slow.reason(5.0) == "deadline"
    into[:] = b"z" * len(into)
    assert behind.reason(5.0) == "network", "what shares the cut connection fails too"
    given_up.set()
    assert sent.wait(5.0)
    until(lambda: read_reason(client, key_of("after")) != "network")
    assert bytes(into) == b"z" * len(into)


def read_reason(client: RemotePool, key: bytes) -> str:
    outcome = Outcome()
    client.read(key, 4096, aligned_buffer(4096), 5.0, outcome)
    return outcome.reason()


def test_reads_that_were_never_sent_end_by_their_deadline_without_a_cut(
    fake: Callable[..., tuple[FakeNode, RemotePool]],
) -> None:
    asked: list[wire.Read] = []
    node, client = fake(lambda _, request: asked.append(request))
    sent = [Outcome() for _ in range(32)]
    for i, outcome in enumerate(sent):
        client.read(key_of(i), 4096, aligned_buffer(4096), 30.0, outcome)
    waiting = [Outcome() for _ in range(5)]
    for i, outcome in enumerate(waiting):
        client.read(key_of(100 + i), 4096, aligned_buffer(4096), 0.1, outcome)
    assert [outcome.reason(5.0) for outcome in waiting] == ["deadline"] * 5
    assert node.accepted == 3 and all(outcome.pending() for outcome in sent)
    client.close(5.0)
    assert [outcome.reason(5.0) for outcome in sent] == ["closed"] * 32


def test_a_silent_node_fails_lookups_in_time(fake: Callable[..., tuple[FakeNode, RemotePool]]) -> None:
    _, client = fake(lambda *_: None)
    begin_s = time.monotonic()
    with pytest.raises(PoolError, match="deadline"):
        client.lookup([key_of("a")], 0.1)
    with pytest.raises(PoolError, match="deadline"):
        client.stat(0.1)
    assert time.monotonic() - begin_s < 60.0


# --- a node that goes and comes back ---


def start_node(*arguments: str) -> tuple[subprocess.Popen[str], str]:
    command = [sys.executable, "-m", "penstock", "pool", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert " ready on " in line, process.communicate()[1]
    return process, line.split(" ready on ")[1].split(": ")[0]


def test_a_killed_node_ends_every_read_by_its_deadline_and_its_slab_survives(tmp_path: Path) -> None:
    members = ["--memory", "8MiB", "--slab", f"{tmp_path}/kv.slab:32MiB", "--weight", "1", "--weight", "3"]
    process, address = start_node("--listen", "127.0.0.1:0", "--pace", "20MB/s", *members)
    client = connect_pool(address)
    for key, parent in chain("a", 24):
        assert write(client, key, parent, size_bytes=MIB) == "ok"
    on_slab = sum(
        hit is not None and "ssd" in hit.route[0] for hit in client.lookup([k for k, _ in chain("a", 24)], 5.0)
    )
    with sqlite3.connect(f"{tmp_path}/kv.slab.db") as table:  # a row follows its block in the background
        until(lambda: table.execute("SELECT count(*) FROM blocks").fetchone() == (on_slab,))
    outcomes = [Outcome() for _ in range(24)]
    buffers = [aligned_buffer(MIB) for _ in range(24)]
    for (key, _), outcome, buffer in zip(chain("a", 24), outcomes, buffers, strict=True):
        client.read(key, MIB, buffer, 200.0, outcome)
    assert outcomes[0].reason() == "ok"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    reasons = [outcome.reason(100.0) for outcome in outcomes[1:]]  # long before the deadline
    assert "network" in reasons and set(reasons) <= {"ok", "network"}
    begin_s = time.monotonic()
    assert read(client, key_of(("a", 0)), MIB, timeout_s=100.0) == "network"
    with pytest.raises(PoolError, match="network"):
        client.lookup([key_of("a")], 100.0)
    assert time.monotonic() - begin_s < 60.0, "while the node is down, calls do not wait for their deadlines"
    process, address = start_node("--listen", address, *members)
    until(lambda: read_reason(client, key_of("?")) == "missing")
    keys = [key for key, _ in chain("a", 24)]
    found = {key: read(client, key, MIB) for key in keys}
    assert list(found.values()).count("ok") == on_slab >= 17, "the slab's blocks are there, and right"
    client.close(5.0)
    process.send_signal(signal.SIGTERM)
    assert process.wait(15.0) == 0
    process.communicate()


def test_a_closing_client_ends_everything_as_closed(setup: Setup) -> None:
    node = setup.node(setup.local(8 * MIB), pace=1e6)
    client = setup.client(node)
    for key, parent in chain("a", 6):
        assert write(client, key, parent, size_bytes=MIB) == "ok"
    outcomes = [Outcome() for _ in range(6)]
    for (key, _), outcome in zip(chain("a", 6), outcomes, strict=True):
        client.read(key, MIB, aligned_buffer(MIB), 30.0, outcome)
    client.close(5.0)
    assert [outcome.reason(5.0) for outcome in outcomes] == ["closed"] * 6
    assert [read(client, key_of("a")), write(client, key_of("a"))] == ["closed", "closed"]
    with pytest.raises(PoolError, match="closed"):
        client.lookup([key_of("a")], 1.0)


@IN_MESSAGES
def test_a_paced_node_never_exceeds_its_rate_and_uses_it(setup: Setup) -> None:
    rate = 100e6
    node = setup.node(setup.local(64 * MIB), pace=rate)
    client = setup.client(node, connections=2)
    for key, parent in chain("a", 24):
        assert write(client, key, parent, size_bytes=MIB) == "ok"
    outcomes = [Outcome() for _ in range(24)]
    begin_s = time.monotonic()
    for (key, _), outcome in zip(chain("a", 24), outcomes, strict=True):
        client.read(key, MIB, aligned_buffer(MIB), 30.0, outcome)
    client.lookup([key_of("a")], 30.0)
    pending_at_lookup = sum(outcome.pending() for outcome in outcomes)
    assert [outcome.reason() for outcome in outcomes] == ["ok"] * 24
    elapsed_s = time.monotonic() - begin_s
    ideal_s = 24 * MIB / rate
    assert elapsed_s >= ideal_s - 0.005, "that it uses the whole rate is the pacer's own test, on a clock of its own"
    assert pending_at_lookup, "lookups are not paced: one passes the reads that wait"


@IN_MESSAGES
def test_slab_reads_do_not_hold_up_memory_reads_behind_them(setup: Setup) -> None:
    """All staging memory is taken, so slab reads cannot proceed; memory reads sent after them do."""
    pool = setup.local(MIB, slab=8 * MIB)
    node = setup.node(pool, staging=MIB)
    client = setup.client(node)
    for key, parent in chain("a", 20):
        assert write(client, key, parent) == "ok"
    keys = [key for key, _ in chain("a", 20)]
    names = [hit.route[0].partition("@")[0] for hit in client.lookup(keys, 5.0) if hit]
    on_slab = [key for key, name in zip(keys, names, strict=True) if name == "ssd:0"]
    in_memory = [key for key, name in zip(keys, names, strict=True) if name == "memory:0"]
    held = node.staging.take(MIB, time.monotonic() + 5.0)
    assert held is not None
    outcomes = [Outcome() for _ in on_slab]
    for key, outcome in zip(on_slab, outcomes, strict=True):
        client.read(key, 4096, aligned_buffer(4096), 20.0, outcome)
    assert [read(client, key) for key in in_memory] == ["ok"] * len(in_memory)
    assert all(outcome.pending() for outcome in outcomes)
    held.give()
    assert [outcome.reason() for outcome in outcomes] == ["ok"] * len(outcomes)


@IN_MESSAGES
def test_a_slow_slab_is_answered_as_deadline_by_the_node_and_costs_no_connection(setup: Setup) -> None:
    pool = setup.local(slab=8 * MIB)
    node = setup.node(pool, staging=MIB)
    client = setup.client(node)
    assert write(client, key_of("a")) == "ok"
    held = node.staging.take(MIB, time.monotonic() + 5.0)
    assert held is not None
    assert read(client, key_of("a"), timeout_s=0.5) == "deadline"
    held.give()
    assert read(client, key_of("a")) == "ok"
    assert write(client, key_of("b")) == "ok"


def test_a_client_that_vanishes_leaves_no_pins_and_no_staging_behind(setup: Setup) -> None:
    pool = setup.local(slab=32 * MIB)
    node = setup.node(pool, pace=5e6)
    client = setup.client(node)
    keys = [key for key, _ in chain("a", 16)]
    for key, parent in chain("a", 16):
        assert write(client, key, parent, size_bytes=MIB) == "ok"
    for key in keys:
        client.read(key, MIB, aligned_buffer(MIB), 30.0, Outcome())
    client.close(5.0)
    until(lambda: node.staging.free_bytes == node.staging.capacity_bytes)
    until(lambda: pool.evict(keys) >= 0 and pool.stat(1.0).members[0].blocks == 0)


def test_random_operations_of_two_clients_against_dictionaries(setup: Setup) -> None:
    pool = setup.local(24 * 4096, slab=40 * 4096 + HEADER_BYTES)
    node = setup.node(pool)
    failures: list[str] = []

    def work(number: int) -> None:
        client = RemotePool(*node.address, connections=2)
        generator = random.Random(number)
        stored: set[int] = set()
        for _ in range(250):
            i = generator.randrange(40)
            key, size = key_of((number, i)), 500 + 331 * i
            match generator.randrange(4):
                case 0 | 1:
                    outcome = write(client, key, key_of((number, i - 1)), size)
                    stored.add(i)
                    allowed = {"ok", "full"}
                case 2:
                    outcome = read(client, key, size)
                    allowed = {"ok", "missing"} if i in stored else {"missing"}
                case _:
                    client.evict([key])
                    outcome, allowed = read(client, key, size), {"missing"}
            if outcome not in allowed:
                failures.append(f"{i}: {outcome}, not one of {allowed}")
        client.close(5.0)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30.0)
    assert not failures and not any(thread.is_alive() for thread in threads)
    pool.check_integrity()


@IN_MESSAGES
def test_a_write_that_finds_no_staging_memory_ends_in_time(setup: Setup) -> None:
    """A write that the node cannot take in time ends as an error, and reads go on on their own connection."""
    pool = setup.local(slab=8 * MIB)
    node = setup.node(pool, staging=MIB)
    client = setup.client(node)
    assert write(client, key_of("a")) == "ok"
    held = node.staging.take(MIB, time.monotonic() + 5.0)
    assert held is not None
    outcome = Outcome()
    client.write(new_block(key_of("b"), size_bytes=5000), staged(key_of("b"), 5000), 0.4, outcome)
    assert outcome.reason(5.0) in ("dropped", "deadline")
    held.give()
    assert read(client, key_of("a")) == "ok"
    until(lambda: write(client, key_of("b"), size_bytes=5000) == "ok")
