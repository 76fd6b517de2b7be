"""Who waits for an answer reads it: no thread is started for it, and whoever does not wait delays nobody."""

from __future__ import annotations

import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue
from types import FrameType
from typing import Any

import pytest

from penstock.io.memory import aligned_buffer
from penstock.pool.api import PoolError
from penstock.pool.net import connection as connection_module
from penstock.pool.net import wire
from penstock.pool.net.link_watch import LinkWatch
from penstock.pool.net.pool_connection import PoolConnection
from penstock.pool.net.reply_reader import ReplyReader
from tests.call_counts import all_calls
from tests.pool.helpers import ROOT, Outcome, key_of, new_block, read, staged, until, write
from tests.pool.net.node_rig import WAIT_S, NodeRig


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[NodeRig]:
    made = NodeRig(tmp_path)
    with made.undo:
        yield made


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lanes whose receiver thread was started, from now on."""
    lanes: list[str] = []
    real = connection_module.Connection.start

    def start(self: connection_module.Connection) -> None:
        lanes.append(self.lane)
        real(self)

    monkeypatch.setattr(connection_module.Connection, "start", start)
    monkeypatch.setattr(connection_module, "PARK_S", 0.05)
    return lanes


def parked() -> bool:
    return not any(thread.name == "penstock-control-receive" for thread in threading.enumerate())


def test_lookups_one_after_the_other_start_no_thread(rig: NodeRig, started: list[str]) -> None:
    clients = [rig.client(rig.node(rig.pool(64 << 10))) for _ in range(4)]
    for number, client in enumerate(clients):
        assert write(client, key_of(number)) == "ok"
    until(parked, WAIT_S)
    started.clear()
    for _ in range(20):
        waits = [client.begin_lookup([key_of(n), key_of("?")], WAIT_S) for n, client in enumerate(clients)]
        for wait in waits:
            (hit, miss) = wait()
            assert hit is not None and miss is None
        assert clients[0].stat(WAIT_S).members and clients[1].evict([key_of("?")]) == 0
    assert "control" not in started and parked()


def test_a_lookup_costs_its_sender_few_calls_whatever_its_keys(rig: NodeRig, started: list[str]) -> None:
    """All of it is on the sender's thread: nobody else has a part in it."""
    client = rig.client(rig.node())
    keys = [key_of(number) for number in range(256)]
    for key in keys:
        assert write(client, key) == "ok"
    until(parked, WAIT_S)
    assert all(client.lookup(keys, WAIT_S))
    assert all_calls(lambda: client.lookup(keys[:16], WAIT_S)) < 102, "109 before"
    assert all_calls(lambda: client.lookup(keys, WAIT_S)) < 102


def test_more_keys_than_a_message_has_start_no_thread_either(rig: NodeRig, started: list[str]) -> None:
    client = rig.client(rig.node())
    assert write(client, key_of("a")) == "ok"
    until(parked, WAIT_S)
    started.clear()
    keys = [key_of(number) for number in range(2 * wire.KEYS_PER_MESSAGE)]
    found = client.lookup([*keys, key_of("a")], WAIT_S)
    assert found[-1] is not None and not any(found[:-1]) and "control" not in started


def test_answers_of_several_threads_come_to_each(rig: NodeRig, started: list[str]) -> None:
    client = rig.client(rig.node())
    names = [f"block {number}" for number in range(8)]
    for name in names:
        assert write(client, key_of(name)) == "ok"
    until(parked, WAIT_S)
    found: SimpleQueue[tuple[str, bool]] = SimpleQueue()

    def ask(name: str) -> None:
        for _ in range(25):
            hit, miss = client.lookup([key_of(name), key_of("?")], WAIT_S)
            found.put((name, hit is not None and miss is None))

    threads = [threading.Thread(target=ask, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    assert sorted(found.get(timeout=WAIT_S) for _ in range(200)) == [(name, True) for name in names for _ in range(25)]
    for thread in threads:
        thread.join(WAIT_S)
    until(parked, WAIT_S)  # and the next lookup needs no thread again
    started.clear()
    assert client.lookup([key_of(names[0])], WAIT_S)[0] is not None and "control" not in started


def test_an_answer_that_nobody_waits_for_harms_nobody(rig: NodeRig, started: list[str]) -> None:
    node = rig.node()
    client = rig.client(node)
    assert write(client, key_of("a")) == "ok"
    until(parked, WAIT_S)
    for _ in range(3):
        client.begin_lookup([key_of("a")], WAIT_S)
    assert client.lookup([key_of("a")], WAIT_S)[0] is not None
    client.begin_lookup([key_of("a")], WAIT_S)
    node.close(5.0)
    assert read(client, key_of("a")) == "network"
    with pytest.raises(PoolError, match="network"):
        client.lookup([key_of("a")], WAIT_S)
    until(lambda: not client.up, WAIT_S)


def test_after_an_answer_that_came_too_late_the_connection_is_watched_again(
    rig: NodeRig, started: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    go, real = threading.Event(), PoolConnection._control  # noqa: SLF001 (a node that is late)

    def late_answer(self: PoolConnection, request: wire.Lookup | wire.Evict | wire.Stat) -> wire.Reply:
        go.wait(WAIT_S)
        return real(self, request)

    node = rig.node()
    client = rig.client(node)
    until(parked, WAIT_S)
    monkeypatch.setattr(PoolConnection, "_control", late_answer)
    with pytest.raises(PoolError, match="deadline"):
        client.lookup([key_of("a")], 0.1)
    go.set()
    assert client.lookup([key_of("a")], WAIT_S) == [None]
    go.clear()
    with pytest.raises(PoolError, match="deadline"):
        client.lookup([key_of("a")], 0.1)
    until(parked, WAIT_S)
    go.set()
    node.close(5.0)
    until(lambda: not client.up, WAIT_S)


def test_an_end_that_comes_while_an_answer_is_read_is_noticed(
    rig: NodeRig, started: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its one event has passed by then: the connection is watched anew, and the watch says it again."""
    node = rig.node()
    client = rig.client(node)
    until(parked, WAIT_S)
    assert client.lookup([key_of("a")], WAIT_S) == [None]
    control, woken = client._link.control, threading.Event()  # noqa: SLF001 (of three lanes this one)
    assert isinstance(control, connection_module.Connection)
    next_reply, real_woken = ReplyReader.next, connection_module.Connection.woken

    def said(self: connection_module.Connection) -> None:
        real_woken(self)
        if self is control:
            woken.set()

    def ends_meanwhile(self: ReplyReader, until_s: float) -> tuple[bytes, int] | None:
        found = next_reply(self, until_s)
        monkeypatch.setattr(ReplyReader, "next", next_reply)
        node.close(5.0)
        assert woken.wait(WAIT_S)
        return found

    monkeypatch.setattr(connection_module.Connection, "woken", said)
    monkeypatch.setattr(ReplyReader, "next", ends_meanwhile)
    assert client.lookup([key_of("a")], WAIT_S) == [None]
    until(lambda: client._link.control is not control, WAIT_S)  # noqa: SLF001


def test_lookups_leave_the_watch_of_their_connection_alone(
    rig: NodeRig, started: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is watched for its end, also while somebody reads, so each lookup spares two calls of the system."""
    client = rig.client(rig.node())
    until(parked, WAIT_S)
    assert client.lookup([key_of("a")], WAIT_S) == [None]
    calls = Counter[int]()

    def counted(real: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: Any) -> None:
            calls[threading.get_ident()] += 1
            real(*arguments)

        return call

    for name in ("park", "watch_end", "unpark"):
        monkeypatch.setattr(LinkWatch, name, counted(getattr(LinkWatch, name)))
    for _ in range(5):
        assert client.lookup([key_of("a")], WAIT_S) == [None]
    assert calls[threading.get_ident()] == 0


def test_an_answer_has_one_item_where_all_blocks_lie_alike_and_that_was_asked_for(rig: NodeRig) -> None:
    node = rig.node()
    client, old = rig.client(node), rig.by_hand(node, "control")
    keys = [key_of(number) for number in range(40)]
    for key in keys:
        assert write(client, key) == "ok"
    assert len(set(client.lookup(keys, WAIT_S))) == 1
    for some, brief, items, alike in ((keys, True, 1, 40), (keys, False, 40, 0), ([*keys, key_of("?")], True, 41, 0)):
        old.send(wire.Lookup(7, WAIT_S, b"".join(some), brief=brief))
        found = old.reply()
        assert isinstance(found, wire.Found) and (len(found.sizes), found.alike) == (items, alike)
        hits = client.lookup(some, WAIT_S)
        assert [hit.size_bytes if hit else 0 for hit in hits] == found.sizes * (len(some) // items)


def test_a_client_that_is_closed_ends_who_waits(rig: NodeRig, started: list[str]) -> None:
    client = rig.client(rig.node())
    until(parked, WAIT_S)
    client.begin_lookup([key_of("a")], WAIT_S)  # nobody waits for this one
    begin_s = time.monotonic()
    client.close(WAIT_S)
    assert time.monotonic() - begin_s < WAIT_S / 2


def test_a_signal_that_interrupts_the_reader_ends_the_connection_and_not_the_link(
    rig: NodeRig, started: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = rig.client(rig.node())
    until(parked, WAIT_S)
    real = ReplyReader.next

    def interrupted(self: ReplyReader, until_s: float) -> None:
        monkeypatch.setattr(ReplyReader, "next", real)
        raise KeyboardInterrupt

    monkeypatch.setattr(ReplyReader, "next", interrupted)
    with pytest.raises(KeyboardInterrupt):
        client.lookup([key_of("a")], WAIT_S)
    until(lambda: client.up, WAIT_S)
    assert client.lookup([key_of("a")], WAIT_S) == [None]


def test_a_lookup_costs_its_node_few_calls(rig: NodeRig) -> None:
    """Of the one thread that reads the request and answers it: nobody else has a part in it, but to fall asleep."""
    lookups = 20
    counts: Counter[str] = Counter()

    def called(frame: FrameType, event: str, arg: Any) -> None:
        counts[threading.current_thread().name] += event in ("call", "c_call")

    keys, ended = [key_of(number) for number in range(90)], Outcome()
    blocks = [
        new_block(key, parent, position=at) for at, (key, parent) in enumerate(zip(keys, [ROOT, *keys], strict=False))
    ]
    threading.setprofile(called)
    try:
        client = rig.client(rig.node())
        client.write_many(
            blocks, [staged(key, 4096) for key in keys], WAIT_S, lambda errors: ended(next(filter(None, errors), None))
        )
        assert ended.reason(WAIT_S) == "ok" and all(client.lookup(keys, WAIT_S))
        counts.clear()
        for _ in range(lookups):
            client.lookup(keys, WAIT_S)
    finally:
        threading.setprofile(None)
    of_node = [count for name, count in counts.items() if name.startswith("penstock-node-127")]
    assert sum(count > 2 * lookups for count in of_node) == 1 and sum(of_node) < 210 * lookups, "217 before"


def test_a_large_block_costs_both_sides_few_calls(rig: NodeRig) -> None:
    """Beside its bytes: of the thread that receives and verifies it, and of the node's that sends it."""
    blocks, size = 20, 4 << 20
    counts: Counter[str] = Counter()

    def called(frame: FrameType, event: str, arg: Any) -> None:
        counts[threading.current_thread().name] += event in ("call", "c_call")

    threading.setprofile(called)
    try:
        node = rig.node(rig.pool(8 * size))
        client = rig.client(node)
        buffer = aligned_buffer(size)
        assert write(client, key_of("large"), size_bytes=size) == "ok" and read(client, key_of("large"), size) == "ok"
        counts.clear()
        for _ in range(blocks):
            ended = Outcome()
            client.read(key_of("large"), size, buffer, WAIT_S, ended)
            assert ended.reason(WAIT_S) == "ok"
    finally:
        threading.setprofile(None)
    of_client = counts["penstock-read-receive"]
    of_node = sum(count for name, count in counts.items() if name.startswith("penstock-node-127"))
    assert 0 < of_client < 130 * blocks, "186 before, in pieces of 256 KiB"
    assert 0 < of_node < 140 * blocks


# --- the reader alone ---


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, ReplyReader]]:
    here, there = socket.socketpair()
    with here, there:
        yield there, ReplyReader(here)


def late(s: float = 0.02) -> float:
    return time.monotonic() + s


def test_replies_that_come_together_or_in_pieces_are_each_found(pair: tuple[socket.socket, ReplyReader]) -> None:
    sock, reader = pair
    frames = [wire.frame(wire.Evicted(number, number)) for number in range(5)]
    large = wire.frame(wire.Failed(9, "network", "x" * 4000))
    data = b"".join([*frames, large, frames[0]])
    assert reader.next(late()) is None and not reader.partial
    for cut in (len(frames[0]) + 3, len(data) - 70):
        sock.sendall(data[:cut])
        found = []
        while (one := reader.next(late())) is not None:
            found.append(one)
        assert reader.partial
        sock.sendall(data[cut:])
        while (one := reader.next(late())) is not None:
            found.append(one)
        replies = [wire.decode_reply(header) for header, payload_bytes in found if not payload_bytes]
        assert [type(reply) for reply in replies] == [*[wire.Evicted] * 5, wire.Failed, wire.Evicted]
        assert not reader.partial


@pytest.mark.parametrize("limit", ["STALL_S", "HEADER_S"])
def test_a_reply_that_stops_or_drips_ends(
    pair: tuple[socket.socket, ReplyReader], monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    sock, reader = pair
    monkeypatch.setattr(wire, limit, 0.1)
    for byte in wire.frame(wire.Evicted(1, 1))[:8]:
        sock.sendall(bytes([byte]))
        assert reader.next(late()) is None
        if limit == "HEADER_S" and reader.partial:
            break
    with pytest.raises(TimeoutError, match="stalled"):
        reader.next(late(WAIT_S))


def test_the_end_and_what_is_no_frame_are_errors(pair: tuple[socket.socket, ReplyReader]) -> None:
    sock, reader = pair
    sock.sendall(b"\xff" * wire.HEAD_BYTES)
    with pytest.raises(wire.ProtocolError):
        reader.next(late())
    sock.close()
    with pytest.raises(ConnectionError):
        ReplyReader(reader._sock).next(late())  # noqa: SLF001 (the same socket, with nothing left over)


@pytest.mark.parametrize("piece_bytes", [1, 1000, 4096, 1 << 20])
def test_bytes_are_handed_over_in_pieces_as_they_come(piece_bytes: int) -> None:
    here, there = socket.socketpair()
    data = bytes(range(256)) * 40
    with here, there:
        there.sendall(data)
        into = memoryview(bytearray(len(data)))
        pieces = [bytes(piece) for piece in wire.receive_pieces(here, into, piece_bytes)]
        assert b"".join(pieces) == bytes(into) == data and max(map(len, pieces)) <= piece_bytes
        there.sendall(b"x")
        there.close()
        with pytest.raises(ConnectionError):
            list(wire.receive_pieces(here, into, piece_bytes))
