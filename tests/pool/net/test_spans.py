"""Spans over real sockets: one message for several blocks, and a result for each of them."""

from __future__ import annotations

import logging
import queue
import random
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from penstock.core.keys import BlockKey
from penstock.core.layout import staging_bytes
from penstock.core.spans import SPAN_BLOCKS_MAX, SPAN_BYTES_MAX, parts
from penstock.io.memory import aligned_buffer
from penstock.pool.api import Pool, PoolError
from penstock.pool.authenticated import AuthenticatedPool
from penstock.pool.checksum import block_checksum
from penstock.pool.local.local_pool import LocalPool
from penstock.pool.mac import PoolKey, check_of
from penstock.pool.net import wire
from penstock.pool.net.connection import Connection
from penstock.pool.net.node_connection import IN_FLIGHT_MAX
from penstock.pool.net.remote import RemotePool
from penstock.pool.union.union_pool import UnionPool
from tests.authorities import new_authority
from tests.call_counts import python_calls
from tests.pool.helpers import WAIT_S, block_bytes, chain, key_of, member, new_block, read, staged, until, write
from tests.pool.net.node_rig import MIB, NodeRig
from tests.pool.net.one_sided_rig import BOTH_WAYS

KIB = 1 << 10


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[NodeRig]:
    made = NodeRig(tmp_path)
    with made.undo:
        yield made


def reasons(errors: Sequence[PoolError | None]) -> list[str]:
    return ["ok" if error is None else error.reason for error in errors]


def read_span(
    pool: Pool, keys: Sequence[BlockKey], size_bytes: int = 4096, timeout_s: float = 10.0, **options: object
) -> list[str]:
    """The result of each block; "ok" only where the right bytes came."""
    ended: queue.SimpleQueue[list[PoolError | None]] = queue.SimpleQueue()
    intos = [aligned_buffer(staging_bytes(size_bytes)) for _ in keys]
    pool.read_many(keys, size_bytes, intos, timeout_s, ended.put, **options)  # type: ignore[arg-type]
    found = reasons(ended.get(timeout=WAIT_S))
    for key, into, result in zip(keys, intos, found, strict=True):
        assert result != "ok" or bytes(into[:size_bytes]) == block_bytes(key, size_bytes), "wrong bytes were served"
    assert ended.empty(), "a span that ended twice"
    return found


def write_span(
    pool: Pool, pairs: Sequence[tuple[BlockKey, BlockKey]], size_bytes: int = 4096, first: int = 0
) -> list[str]:
    ended: queue.SimpleQueue[list[PoolError | None]] = queue.SimpleQueue()
    blocks = [new_block(key, parent, size_bytes, first + at) for at, (key, parent) in enumerate(pairs)]
    pool.write_many(blocks, [staged(key, size_bytes) for key, _ in pairs], 10.0, ended.put)
    return reasons(ended.get(timeout=WAIT_S))


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> list[wire.Request]:
    """The requests that clients send from now on."""
    sent: list[wire.Request] = []
    send = Connection.send

    def noted(self: Connection, pending: object) -> None:
        sent.append(pending.message)  # type: ignore[attr-defined]
        send(self, pending)  # type: ignore[arg-type]

    monkeypatch.setattr(Connection, "send", noted)
    return sent


def test_reading_a_span_costs_its_caller_as_many_calls_as_reading_two_blocks(rig: NodeRig) -> None:
    """Counted are calls of Python functions on the caller's thread, which is an engine's control thread."""
    client = rig.client(rig.node())
    pairs = chain("calls", SPAN_BLOCKS_MAX)
    assert set(write_span(client, pairs)) == {"ok"}
    keys = [key for key, _ in pairs]
    intos = [aligned_buffer(4096) for _ in keys]
    counts = []
    for blocks in (SPAN_BLOCKS_MAX, 2, SPAN_BLOCKS_MAX):
        ended: queue.SimpleQueue[list[PoolError | None]] = queue.SimpleQueue()
        counts.append(python_calls(partial(client.read_many, keys[:blocks], 4096, intos[:blocks], 10.0, ended.put)))
        assert reasons(ended.get(timeout=WAIT_S)) == ["ok"] * blocks
    assert max(counts) <= min(counts) + 4 and min(counts) < 40, counts


@pytest.mark.parametrize("size_bytes", [4096, 5000, 100])
@pytest.mark.parametrize("slab", [0, 16 * MIB])
def test_a_span_travels_in_one_message_each_way(
    rig: NodeRig, messages: list[wire.Request], slab: int, size_bytes: int
) -> None:
    client = rig.client(rig.node(rig.pool(0 if slab else 8 * MIB, slab)))
    pairs = chain("span", 40)
    assert write_span(client, pairs, size_bytes) == ["ok"] * 40
    keys = [key for key, _ in pairs]
    assert read_span(client, keys, size_bytes) == ["ok"] * 40
    assert [type(one).__name__ for one in messages] == ["WriteMany", "ReadMany"]
    assert read(client, keys[7], size_bytes) == "ok"  # and one on its own


@BOTH_WAYS
@pytest.mark.parametrize("slab", [0, 16 * MIB])
def test_every_block_has_a_result_of_its_own(rig: NodeRig, slab: int) -> None:
    client = rig.client(rig.node(rig.pool(0 if slab else 8 * MIB, slab)))
    keys = [key for key, _ in chain("some", 6)]
    assert write_span(client, chain("some", 3)) == ["ok"] * 3
    assert write(client, keys[4], size_bytes=8192) == "ok"
    assert read_span(client, keys) == ["ok", "ok", "ok", "missing", "layout", "missing"]
    assert write_span(client, [*chain("some", 3), (keys[4], keys[3]), (keys[5], keys[4])]) == [
        "ok", "ok", "ok", "layout", "ok",
    ]  # fmt: skip
    assert read_span(client, [key_of("nowhere"), key_of("either")]) == ["missing", "missing"]


@BOTH_WAYS
def test_a_damaged_block_fails_alone_and_is_reported(rig: NodeRig) -> None:
    pool = rig.pool()
    client = rig.client(rig.node(pool))
    pairs = chain("damaged", 5)
    write_span(client, pairs)
    opened = pool.open_block(pairs[2][0], 4096)
    assert not isinstance(opened, PoolError) and opened.view is not None
    opened.view[100] ^= 1
    opened.release()
    keys = [key for key, _ in pairs]
    assert read_span(client, keys) == ["ok", "ok", "checksum", "ok", "ok"]
    until(lambda: pool.stat(1.0).checksum_errors == 1)  # the node has verified the report
    assert read_span(client, keys) == ["ok", "ok", "missing", "ok", "ok"]


def test_a_span_that_is_damaged_on_its_way_in_is_stored_without_that_block(rig: NodeRig) -> None:
    by_hand = rig.by_hand(rig.node(), "write")
    blocks = [new_block(key, parent) for key, parent in chain("sent", 3)]
    datas = [block_bytes(block.key, 4096) for block in blocks]
    sums = [block_checksum(block.key, memoryview(data)) for block, data in zip(blocks, datas, strict=True)]
    sums[1] ^= 1
    message = wire.WriteMany.of(1, blocks, sums)
    message.timeout_s = 5.0
    by_hand.send(message, b"".join(datas))
    reply = by_hand.reply()
    assert isinstance(reply, wire.WrittenMany)
    assert reasons(wire.errors_of(reply.states, reply.detail)) == ["ok", "checksum", "ok"]


def test_the_node_s_staging_memory_bounds_a_span(rig: NodeRig, messages: list[wire.Request]) -> None:
    node = rig.node(rig.pool(0, 32 * MIB), staging_capacity_bytes=MIB)
    client = rig.client(node)
    pairs = chain("bound", 40)
    assert write_span(client, pairs, 32 * KIB) == ["ok"] * 40
    assert read_span(client, [key for key, _ in pairs], 32 * KIB) == ["ok"] * 40
    spans = [one.blocks for one in messages if isinstance(one, wire.ReadMany | wire.WriteMany)]
    assert sum(spans) == 80 and max(spans) == 8  # a quarter of the memory, so that a connection may have two
    until(lambda: node.staging.free_bytes == node.staging.capacity_bytes)


def test_more_than_the_node_allows_is_refused_and_the_connection_goes_on(rig: NodeRig) -> None:
    node = rig.node(rig.pool(0, 32 * MIB), staging_capacity_bytes=MIB)
    pairs = chain("greedy", 20)
    assert write_span(rig.client(node), pairs, 32 * KIB) == ["ok"] * 20
    reads, writes = rig.by_hand(node), rig.by_hand(node, "write")
    reads.send(wire.ReadMany(1, b"".join(key for key, _ in pairs), 32 * KIB, 5.0))
    reply = reads.reply()
    assert isinstance(reply, wire.Failed) and reply.reason == "layout" and "20 blocks" in reply.detail
    message = wire.WriteMany.of(2, [new_block(key, parent, 32 * KIB) for key, parent in pairs], [0] * 20)
    message.timeout_s = 5.0
    writes.send(message, bytes(20 * 32 * KIB))
    reply = writes.reply()
    assert isinstance(reply, wire.Failed) and reply.reason == "layout"
    for one in (reads, writes):
        one.send(wire.ReadMany(3, pairs[0][0] + pairs[1][0], 32 * KIB, 5.0))
        assert isinstance(one.reply(), wire.Blocks)
    until(lambda: node.staging.free_bytes == node.staging.capacity_bytes)


def test_a_span_announced_with_another_payload_ends_the_connection(rig: NodeRig) -> None:
    by_hand = rig.by_hand(rig.node(), "write")
    message = wire.WriteMany.of(1, [new_block(key_of("x")), new_block(key_of("y"))], [0, 0])
    by_hand.send(message, bytes(4096))
    by_hand.until_ended()


@BOTH_WAYS
def test_macs_are_verified_block_by_block(rig: NodeRig) -> None:
    node = rig.node()
    own, other = PoolKey(b"a" * 32), PoolKey(b"b" * 32)
    pairs = chain("mac", 4)
    keys = [key for key, _ in pairs]
    mine = AuthenticatedPool(rig.client(node), own)
    assert write_span(mine, [pairs[0], pairs[2]]) == ["ok", "ok"]
    assert write_span(AuthenticatedPool(rig.client(node), other), [pairs[1]]) == ["ok"]
    assert write_span(rig.client(node), [pairs[3]]) == ["ok"]  # without any
    assert read_span(mine, keys) == ["ok", "mac", "ok", "mac"]
    client = rig.client(node)
    assert read_span(client, keys, checks=[check_of(own, key) for key in keys]) == ["ok", "mac", "ok", "mac"]
    assert read_span(client, keys) == ["ok"] * 4


@BOTH_WAYS
def test_a_span_over_tls(rig: NodeRig, tmp_path: Path) -> None:
    files = new_authority(tmp_path / "ca").issue()
    node = rig.node(tls=files.tls)
    client = RemotePool(*node.address, tls=files.tls)
    rig.undo.callback(client.close, 5.0)
    pairs = chain("tls", 30)
    assert write_span(client, pairs, 20_000) == ["ok"] * 30
    assert read_span(client, [key for key, _ in pairs], 20_000) == ["ok"] * 30


def test_a_paced_node_sends_spans_at_its_pace(rig: NodeRig) -> None:
    client = rig.client(rig.node(pace_bytes_per_s=50e6))
    pairs = chain("paced", 60)
    assert write_span(client, pairs, 64 * KIB) == ["ok"] * 60
    assert read_span(client, [key for key, _ in pairs], 64 * KIB) == ["ok"] * 60


@BOTH_WAYS
@pytest.mark.parametrize("slab", [0, 16 * MIB])
def test_a_node_in_front_of_nodes_answers_spans_from_all(rig: NodeRig, slab: int) -> None:
    behind = rig.node(rig.pool(0 if slab else 8 * MIB, slab))
    front = UnionPool(rig.pool(), [RemotePool(*behind.address, own_only=True)], [1e9, 1e9])
    rig.undo.callback(front.close, 5.0)
    client = rig.client(rig.node(front))
    pairs = chain("both", 30)
    keys = [key for key, _ in pairs]
    assert write_span(client, pairs) == ["ok"] * 30
    assert all(client.lookup(keys, 5.0))
    assert {one.route[0].split(":")[0] for one in client.lookup(keys, 5.0) if one} >= {"memory"}
    assert read_span(client, [*keys, key_of("none")]) == ["ok"] * 30 + ["missing"]


def test_a_union_reads_and_writes_spans_of_several_nodes(rig: NodeRig, messages: list[wire.Request]) -> None:
    pools = [rig.pool(), rig.pool()]
    nodes = [rig.node(pool) for pool in pools]
    union = UnionPool(None, [RemotePool(*node.address) for node in nodes], [1e9, 1e9])
    rig.undo.callback(union.close, 5.0)
    pairs = chain("union", 40)
    keys = [key for key, _ in pairs]
    assert write_span(union, pairs) == ["ok"] * 40
    held = [[pool.lookup([key], 1.0)[0] is not None for key in keys] for pool in pools]
    assert [sum(one) for one in held] == [20, 20]
    assert all(a != b for a, b in zip(*held, strict=True))
    for pool in pools:  # each node's blocks are a chain there, so that it evicts leaves before roots
        pool.check_integrity()
        for key in [key for key in keys if pool.lookup([key], 1.0)[0]][:-1]:
            assert pool.evict([key]) == 1
    assert [sum(isinstance(one, wire.WriteMany) for one in messages)] == [2]
    write_span(union, pairs)
    messages.clear()
    assert read_span(union, [*keys, key_of("none")]) == ["ok"] * 40 + ["missing"]
    assert [type(one).__name__ for one in messages] == ["ReadMany", "ReadMany"]


@BOTH_WAYS
def test_blocks_that_a_node_has_no_room_for_go_to_the_next(rig: NodeRig) -> None:
    small, large = rig.pool(64 * KIB), rig.pool()
    for key, parent in chain("fill", 16):
        assert write(small, key, parent) == "ok"
    leases = [small.lease(key) for key, _ in chain("fill", 16)]  # nothing there can be evicted
    union = UnionPool(None, [RemotePool(*rig.node(pool).address) for pool in (small, large)], [1e9, 1e9])
    rig.undo.callback(union.close, 5.0)
    assert write_span(union, chain("over", 20)) == ["ok"] * 20
    assert member(large.stat(1.0), "memory:0").blocks == 20
    for lease in leases:
        assert lease is not None
        lease.release()


def test_a_deadline_ends_a_whole_span(rig: NodeRig, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    client = rig.client(rig.node(pace_bytes_per_s=1e5))
    pairs = chain("late", 8)
    assert write_span(client, pairs, 64 * KIB) == ["ok"] * 8
    assert read_span(client, [key for key, _ in pairs], 64 * KIB, timeout_s=0.3) == ["deadline"] * 8
    until(lambda: client.up)


@BOTH_WAYS
def test_a_load_that_raises_fails_its_block_only(rig: NodeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    node = rig.node(rig.pool(0, 16 * MIB))
    client = rig.client(node)
    pairs = chain("raises", 4)
    write_span(client, pairs)
    load = LocalPool.load

    def some(self: LocalPool, opened: object, *rest: object) -> None:
        if opened.key == pairs[1][0]:  # type: ignore[attr-defined]
            raise RuntimeError("a bug")
        load(self, opened, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(LocalPool, "load", some)
    assert read_span(client, [key for key, _ in pairs]) == ["ok", "device", "ok", "ok"]
    until(lambda: node.staging.free_bytes == node.staging.capacity_bytes)


def test_a_client_that_leaves_in_the_middle_of_a_span_leaves_nothing_behind(rig: NodeRig) -> None:
    pool = rig.pool(0, 32 * MIB)
    node = rig.node(pool)
    pairs = chain("gone", 32)
    assert write_span(rig.client(node), pairs, 32 * KIB) == ["ok"] * 32
    for number in range(20):
        by_hand = rig.by_hand(node)
        by_hand.send(wire.ReadMany(number, b"".join(key for key, _ in pairs), 32 * KIB, 5.0))
        by_hand.sock.close()
        half = rig.by_hand(node, "write")
        message = wire.WriteMany.of(
            number, [new_block(key_of((number, at)), size_bytes=32 * KIB) for at in range(9)], [0] * 9
        )
        half.send(message, bytes(40_000), payload_bytes=9 * 32 * KIB)
        half.sock.close()
    until(lambda: node.staging.free_bytes == node.staging.capacity_bytes)
    until(lambda: pool.evict([key for key, _ in pairs]) == 32)  # nothing is pinned
    assert read_span(rig.client(node), [pairs[0][0]]) == ["missing"]


class OddNode:
    """Greets as a node that takes spans, and answers each ReadMany with what `answer` makes of it."""

    def __init__(self, answer: Callable[[wire.ReadMany], bytes]) -> None:
        self._answer = answer
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
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
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        try:
            wire.receive_exactly(sock, memoryview(bytearray(wire.GREETING.size)))
            sock.sendall(wire.greeting())
            frames = wire.FrameReader(sock)
            while True:
                request = wire.decode_request(frames.next()[0])
                if isinstance(request, wire.Hello):
                    sock.sendall(wire.frame(wire.Ready("odd", b"", 0.0, 0, 0.0, SPAN_BYTES_MAX)))
                elif isinstance(request, wire.ReadMany):
                    sock.sendall(self._answer(request))
        except (OSError, wire.ProtocolError):
            sock.close()


def _blocks(request: wire.ReadMany, **change: object) -> wire.Blocks:
    keys = wire.split_keys(request.keys)
    sums = [block_checksum(key, memoryview(block_bytes(key, 4096))) for key in keys]
    reply = wire.Blocks(request.id, request.keys, bytes(len(keys)), wire.pack_checksums(sums), [])
    for name, value in change.items():
        setattr(reply, name, value)
    return reply


def _payload(request: wire.ReadMany) -> bytes:
    return b"".join(block_bytes(key, 4096) for key in wire.split_keys(request.keys))


ANSWERS: dict[str, tuple[Callable[[wire.ReadMany], bytes], list[str]]] = {
    "right": (lambda r: wire.frame(_blocks(r), 3 * 4096) + _payload(r), ["ok"] * 3),
    "bytes of each other": (lambda r: wire.frame(_blocks(r), 3 * 4096) + _payload(r)[::-1], ["checksum"] * 3),
    "keys in another order": (
        lambda r: wire.frame(_blocks(r, keys=r.keys[16:] + r.keys[:16]), 3 * 4096) + _payload(r), ["network"] * 3,
    ),
    "a block less": (lambda r: wire.frame(_blocks(r), 2 * 4096) + _payload(r), ["network"] * 3),
    "fewer states": (
        lambda r: wire.frame(_blocks(r, states=bytes(2), keys=r.keys[:32], checksums=bytes(16)), 2 * 4096)
        + _payload(r)[: 2 * 4096],
        ["network"] * 3,
    ),
    "an answer to a write": (lambda r: wire.frame(wire.WrittenMany(r.id, bytes(3))), ["network"] * 3),
    "a single block": (
        lambda r: wire.frame(wire.Block(r.id, r.keys[:16], 0), 4096) + bytes(4096), ["network"] * 3,
    ),
    "a request nobody made": (lambda r: wire.frame(_blocks(r, id=r.id + 9), 3 * 4096) + _payload(r), ["network"] * 3),
    "refused": (lambda r: wire.frame(wire.Failed(r.id, "dropped", "busy")), ["dropped"] * 3),
    "nothing is here": (
        lambda r: wire.frame(_blocks(r, states=bytes([1, 2, 6]))), ["missing", "deadline", "network"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ANSWERS)
def test_what_a_client_takes_for_the_answer_to_a_span(rig: NodeRig, name: str) -> None:
    answer, expected = ANSWERS[name]
    node = OddNode(answer)
    rig.undo.callback(node.close)
    client = RemotePool(*node.address)
    rig.undo.callback(client.close, 5.0)
    assert read_span(client, [key_of("a"), key_of("b"), key_of("c")]) == expected


def test_an_older_version_is_refused_with_a_clear_line(rig: NodeRig) -> None:
    with socket.create_connection(rig.node().address, 10.0) as sock:
        sock.sendall(b"PNSTCK\x03\x00")
        first = bytearray(wire.GREETING.size)
        wire.receive_exactly(sock, memoryview(first))
        assert int.from_bytes(first[6:8], "little") == wire.GREETING.version == 4
    with pytest.raises(wire.ProtocolError, match="peer speaks version 3 of the pool protocol, this side 4"):
        wire.check_greeting(b"PNSTCK\x03\x00")


def test_parts_are_spans() -> None:
    draws = random.Random(1)
    for _ in range(200):
        items = list(range(draws.randrange(300)))
        size = draws.choice((1, 4096, MIB, 20 * MIB, 40 * MIB))
        found = parts(items, size)
        assert [one for some in found for one in some] == items
        assert all(
            len(some) <= SPAN_BLOCKS_MAX and (len(some) * size <= SPAN_BYTES_MAX or len(some) == 1) for some in found
        )


def test_blocks_asked_for_at_the_same_time_are_sent_together_and_let_go(
    rig: NodeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted: sends of the node for requests that lay in its socket together."""
    pool = rig.pool(8 * MIB)
    node = rig.node(pool)
    pairs = chain("together", 24)
    keys = [key for key, _ in pairs]
    assert write_span(rig.client(node), pairs) == ["ok"] * 24
    by_hand, sends = rig.by_hand(node, "read"), 0
    real = wire.send_all

    def counted(sock: Any, *parts: Any, **options: Any) -> None:
        nonlocal sends
        sends += 1
        real(sock, *parts, **options)

    monkeypatch.setattr(wire, "send_all", counted)
    asked: list[wire.Request] = [wire.Read(number, key, 4096, WAIT_S) for number, key in enumerate(keys)]
    asked += [wire.ReadMany(100, b"".join(keys), 4096, WAIT_S), wire.Read(101, key_of("absent"), 4096, WAIT_S)]
    by_hand.sock.sendall(b"".join(map(wire.frame, asked)))
    replies = [by_hand.reply() for _ in asked]
    found = {reply.id for reply in replies if isinstance(reply, wire.Block | wire.Blocks)}
    assert found == {*range(24), 100} and [type(one) for one in replies].count(wire.Failed) == 1
    assert sends <= 13, "each of them alone, although they lay there together"
    until(lambda: pool.evict(keys) == 24)


def test_more_spans_in_all_than_a_connection_may_have_open(rig: NodeRig) -> None:
    node = rig.node(rig.pool(0, 32 * MIB))
    client = rig.client(node)
    pairs = chain("again", 16)
    assert write_span(client, pairs) == ["ok"] * 16
    for _ in range(IN_FLIGHT_MAX + 9):
        assert read_span(client, [key for key, _ in pairs]) == ["ok"] * 16
