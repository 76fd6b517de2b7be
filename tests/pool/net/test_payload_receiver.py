"""Payloads in pieces over TCP: their bytes, their ends, and how seldom the receiving thread wakes up."""

from __future__ import annotations

import os
import resource
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from penstock.core.layout import staging_bytes
from penstock.core.new_block import NewBlock
from penstock.io.memory import aligned_buffer
from penstock.pool.api import PoolError
from penstock.pool.net import wire
from penstock.pool.net.payload_receiver import PIECE_BYTES, WAKE_BYTES_MIN, PayloadLimits, PayloadReceiver
from penstock.pool.net.remote import RemotePool
from tests.pool.helpers import key_of, write
from tests.pool.net.node_rig import MIB, WAIT_S, NodeRig

WARM, READS = 4, 8
Pair = tuple[socket.socket, socket.socket]  # the end that sends, the end that receives


@pytest.fixture
def pair() -> Iterator[Pair]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        there = socket.create_connection(listener.getsockname(), WAIT_S)
        here, _ = listener.accept()
    with here, there:
        wire.set_timeouts(here)
        yield there, here


def generous() -> PayloadLimits:
    return PayloadLimits(time.monotonic() + WAIT_S, wire.MinimumRate(WAIT_S, 1.0))


def wakes_at(sock: socket.socket) -> int:
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT)


def sending(sock: socket.socket, data: bytes, part_bytes: int, pause_s: float = 0.0) -> threading.Thread:
    def send() -> None:
        for at in range(0, len(data), part_bytes):
            sock.sendall(data[at : at + part_bytes])
            time.sleep(pause_s)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


@pytest.mark.parametrize("size", [1, 1000, WAKE_BYTES_MIN + 1, 3 * PIECE_BYTES, 2 * PIECE_BYTES + 17])
def test_a_payload_and_a_message_behind_it_arrive(pair: Pair, size: int) -> None:
    there, here = pair
    data, receiver = os.urandom(size), PayloadReceiver(here)
    sender = sending(there, data + b"next", 100_000)
    into = memoryview(bytearray(size))
    pieces = [bytes(piece) for piece in receiver.pieces(into)]
    receiver.end()
    assert b"".join(pieces) == bytes(into) == data and max(map(len, pieces)) <= PIECE_BYTES
    assert wakes_at(here) == 1 and here.recv(4, socket.MSG_WAITALL) == b"next"
    sender.join(WAIT_S)


@pytest.mark.parametrize("sizes", [[5, 7], [WAKE_BYTES_MIN, 9, 300_000], [PIECE_BYTES // 2] * 5])
def test_views_are_filled_in_order_in_several_parts(pair: Pair, sizes: list[int]) -> None:
    there, here = pair
    datas, receiver = [os.urandom(size) for size in sizes], PayloadReceiver(here)
    views = [memoryview(bytearray(size)) for size in sizes]
    sender = sending(there, b"".join(datas) + b"next", 70_001)
    receiver.fill(views[:2])
    receiver.fill(views[2:])
    receiver.end()
    assert [bytes(view) for view in views] == datas
    assert wakes_at(here) == 1 and here.recv(4, socket.MSG_WAITALL) == b"next"
    sender.join(WAIT_S)


@pytest.mark.parametrize(
    "sizes",
    [
        [1], [32 << 10, 5], [WAKE_BYTES_MIN - 1], [PIECE_BYTES, 1], [PIECE_BYTES + WAKE_BYTES_MIN + 1, 0, 3],
        [70_000] * 40, [3 * PIECE_BYTES - 1],
    ],
)  # fmt: skip
@pytest.mark.parametrize("part_bytes", [70_001, 8 << 20])
def test_no_end_of_a_payload_waits_for_the_look_at_its_rate(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, sizes: list[int], part_bytes: int
) -> None:
    """The kernel is never told to wait for more than comes: who waited for it would wake up too late by far."""
    monkeypatch.setattr(wire, "LOOK_S", 2 * WAIT_S)
    monkeypatch.setattr(wire, "STALL_S", 2 * WAIT_S)
    there, here = pair
    datas, receiver = [os.urandom(size) for size in sizes], PayloadReceiver(here)
    views, moved = [memoryview(bytearray(size)) for size in sizes], list[int]()
    sender = sending(there, b"".join(datas), part_bytes)
    begin_s = time.monotonic()
    receiver.fill_within(views, generous(), moved.append)
    assert time.monotonic() - begin_s < WAIT_S and sum(moved) == sum(sizes)
    receiver.end()
    assert [bytes(view) for view in views] == datas and wakes_at(here) == 1
    sender.join(WAIT_S)


def test_a_payload_that_comes_too_slowly_or_too_late_is_an_error(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "LOOK_S", 0.02)
    there, here = pair
    sender = sending(there, bytes(100_000), 100, pause_s=0.001)
    into, moved = memoryview(bytearray(PIECE_BYTES)), list[int]()
    slow = PayloadLimits(time.monotonic() + WAIT_S, wire.MinimumRate(0.1, 100e6))
    with pytest.raises(TimeoutError, match="less than"):
        PayloadReceiver(here).fill_within([into], slow, moved.append)
    assert 0 < sum(moved) < 100_000
    late = PayloadLimits(time.monotonic() + 0.1, wire.MinimumRate(WAIT_S, 1.0))
    with pytest.raises(TimeoutError, match="in time"):
        PayloadReceiver(here).fill_within([into], late, moved.append)
    sender.join(WAIT_S)


def test_a_slow_peer_shows_life_before_a_piece_is_whole(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "LOOK_S", 0.02)
    there, here = pair
    into = memoryview(bytearray(PIECE_BYTES))
    pieces = PayloadReceiver(here).pieces(into)
    for at in range(0, 3000, 1000):
        there.sendall(bytes([at // 1000]) * 1000)
        assert len(next(pieces)) == 1000
    assert bytes(into[:3000]) == b"".join(bytes([number]) * 1000 for number in range(3))


@pytest.mark.parametrize("sent", [0, 1000])
def test_a_peer_that_stalls_is_an_error(pair: Pair, monkeypatch: pytest.MonkeyPatch, sent: int) -> None:
    monkeypatch.setattr(wire, "STALL_S", 0.1)
    there, here = pair
    there.sendall(bytes(sent))
    with pytest.raises(TimeoutError, match="sent nothing"):
        list(PayloadReceiver(here).pieces(memoryview(bytearray(PIECE_BYTES))))
    with pytest.raises(TimeoutError, match="sent nothing"):
        PayloadReceiver(here).fill([memoryview(bytearray(PIECE_BYTES))])
    with pytest.raises(TimeoutError, match="sent nothing"):
        PayloadReceiver(here).fill_within([memoryview(bytearray(PIECE_BYTES))], generous(), lambda _: None)


@pytest.mark.parametrize("end", ["close", "shutdown"])
def test_the_end_of_the_stream_is_an_error_at_once(pair: Pair, end: str) -> None:
    there, here = pair
    there.sendall(bytes(1000))
    cut = threading.Timer(0.05, there.close if end == "close" else lambda: here.shutdown(socket.SHUT_RDWR))
    cut.start()
    begin_s = time.monotonic()
    with pytest.raises(ConnectionError):
        list(PayloadReceiver(here).pieces(memoryview(bytearray(PIECE_BYTES))))
    assert time.monotonic() - begin_s < wire.STALL_S
    cut.join()


@pytest.mark.parametrize("within", [False, True])
def test_a_receiver_wakes_once_for_a_piece_that_comes_in_eight_packets(pair: Pair, within: bool) -> None:
    """At most: where it runs late, it does not wait at all."""
    there, here = pair
    pieces, packets = 16, 8
    data = bytes(pieces * PIECE_BYTES)
    into = memoryview(bytearray(len(data)))

    receiver = PayloadReceiver(here)
    sender = sending(there, data, PIECE_BYTES // packets, pause_s=0.002)
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
    if within:
        receiver.fill_within([into], generous(), lambda _: None)
    else:
        list(receiver.pieces(into))
    sender.join(WAIT_S)
    waits = resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw - before
    assert waits <= 2 * pieces + 8, "1 for each piece, and locks of the interpreter"
    receiver.end()


class Spanned:
    """Takes the results of a span."""

    def __init__(self) -> None:
        self.ended = threading.Event()
        self.errors: list[PoolError | None] = []

    def done(self, errors: list[PoolError | None]) -> None:
        self.errors = errors
        self.ended.set()


class Counted(NodeRig):
    """Counts the calls of the system that receiving threads make for READS requests: those of a client's reads, or
    (`of_node`) of a node that takes writes."""

    def counted(self, of_node: bool, begin: Callable[[RemotePool, int, Spanned], None]) -> Counter[str]:
        counts: Counter[str] = Counter()
        thread = "penstock-node-127.0.0.1" if of_node else "penstock-read-receive"

        def called(frame: FrameType, event: str, arg: Any) -> None:
            if event == "c_call" and threading.current_thread().name.startswith(thread):
                counts[arg.__name__] += 1

        threading.setprofile(called)
        try:
            client = self.client(self.node(self.pool(80 * MIB)))
            for number in range(WARM + READS):
                if number == WARM:  # the thread runs, and the kernel has given the connection its memory
                    counts.clear()
                outcome = Spanned()
                begin(client, number, outcome)
                assert outcome.ended.wait(WAIT_S) and not any(outcome.errors)
        finally:
            threading.setprofile(None)
        return counts

    def reads(self, blocks: int, size: int) -> Counter[str]:
        keys, buffers = [key_of(number) for number in range(blocks)], [aligned_buffer(size) for _ in range(blocks)]

        def begin(client: RemotePool, number: int, outcome: Spanned) -> None:
            if not number:
                assert [write(client, key, size_bytes=size) for key in keys] == ["ok"] * blocks
            client.read_many(keys, size, buffers, WAIT_S, outcome.done)

        return self.counted(False, begin)

    def writes(self, blocks: int, size: int) -> Counter[str]:
        datas = [aligned_buffer(staging_bytes(size)) for _ in range(blocks)]

        def begin(client: RemotePool, number: int, outcome: Spanned) -> None:
            keys = [key_of(blocks * number + one) for one in range(blocks)]
            new = [NewBlock(key, bytes(16), size, 0) for key in keys]
            client.write_many(new, datas, WAIT_S, outcome.done)

        return self.counted(True, begin)


@pytest.mark.parametrize("way", ["reads", "writes"])
@pytest.mark.parametrize(("blocks", "size"), [(1, 4 * MIB), (8, 128 << 10), (12, 500_000)])
def test_a_payload_costs_two_calls_of_the_system_for_each_piece(
    tmp_path: Path, way: str, blocks: int, size: int
) -> None:
    rig = Counted(tmp_path)
    with rig.undo:
        counts = rig.reads(blocks, size) if way == "reads" else rig.writes(blocks, size)
    pieces = READS * -(-blocks * size // PIECE_BYTES)
    received = counts["recv_into"] + counts["recvmsg_into"]
    heads = 3 * READS  # the header of a span comes in two, and the beginning of a write alone
    assert READS <= received <= 1.5 * pieces + heads, "a piece comes in two where memory is short"
    assert way == "reads" or counts["recvmsg_into"] >= READS, "the payload of a write is awaited in pieces too"
    assert counts["poll"] <= 1.5 * pieces + heads
    assert counts["setsockopt"] <= 3 * READS + pieces // 2
