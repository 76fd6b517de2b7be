"""Numbers and lengths of messages have bounds: what lies outside ends its own connection, and nothing else."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.spans import SPAN_BLOCKS_MAX, SPAN_BYTES_MAX
from penstock.pool.api import PoolError
from penstock.pool.net import wire
from penstock.pool.net.node import PoolNode
from penstock.pool.net.remote import RemotePool
from penstock.pool.setup.open import open_local_pool
from tests.pool.helpers import Outcome, chain, key_of, new_block, read, staged, until, write
from tests.pool.net.node_rig import MIB, WAIT_S, HandMade, NodeRig

KEY, OTHER = b"k" * 16, b"p" * 16


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[NodeRig]:
    made = NodeRig(tmp_path)
    with made.undo:
        yield made


def a_write(**changed: Any) -> wire.Write:
    fields: dict[str, Any] = {
        "id": 1,
        "key": KEY,
        "parent": OTHER,
        "size_bytes": 4096,
        "position": 0,
        "tenant": b"",
        "rebuild_s": 0.0,
        "checksum": 0,
        "timeout_s": 5.0,
    }
    return wire.Write(**(fields | changed))


BAD_SECONDS = (1e300, math.inf, -math.inf, math.nan, -1.0, 86_401.0)
BAD_KEYS = (b"", b"k" * 15, b"k" * 17, b"k" * 65536)


def a_read() -> wire.ReadMany:
    return wire.ReadMany(1, KEY * 2, 4096, 1.0)


def a_span() -> wire.WriteMany:
    return wire.WriteMany(1, KEY * 2, KEY * 2, 4096, [1, 2], b"", [0.0, 0.5], bytes(16), [], 1.0)


def the_blocks() -> wire.Blocks:
    return wire.Blocks(1, KEY * 2, bytes(2), bytes(16), [])


def changed(message: Any, **fields: Any) -> Any:
    """Another value in a field: a record that was made with it would be refused here."""
    for name, value in fields.items():
        setattr(message, name, value)
    return message


BAD_REQUESTS: list[wire.Request] = [
    *(a_write(timeout_s=bad) for bad in BAD_SECONDS),
    *(a_write(rebuild_s=bad) for bad in (math.inf, -math.inf, math.nan, -1.0, 1e300)),
    *(a_write(key=bad) for bad in BAD_KEYS),
    *(a_write(parent=bad) for bad in BAD_KEYS),
    *(a_write(size_bytes=bad) for bad in (0, -1, (1 << 30) + 1, (1 << 64) - 1)),
    *(a_write(position=bad) for bad in (-1, (1 << 64) - 1)),
    *(a_write(checksum=-1), a_write(tenant=bytes(9)), a_write(id=-1), a_write(id=(1 << 64) - 1)),
    *(wire.Read(1, KEY, 4096, bad) for bad in BAD_SECONDS),
    *(wire.Read(1, bad, 4096, 1.0) for bad in BAD_KEYS),
    *(wire.Read(1, KEY, bad, 1.0) for bad in (0, -1, 1 << 40)),
    *(wire.Lookup(1, bad, KEY) for bad in BAD_SECONDS),
    *(wire.Evict(1, bad, KEY) for bad in BAD_SECONDS),
    *(wire.Stat(1, bad) for bad in BAD_SECONDS),
    *(wire.Corrupt(bad, 1) for bad in BAD_KEYS),
    wire.Lookup(1, 1.0, bytes(16 * (wire.KEYS_PER_MESSAGE + 1))),
    wire.Corrupt(KEY, -1),
    wire.Corrupt(KEY, 1, bytes(33)),
    a_write(mac=bytes(33)),
    wire.Offer(1, b"c", KEY, 4096, 0, 0, 1.0, bytes(33)),
    wire.Probe(1, -1),
    wire.Hello("x" * 65),
    wire.Hello("read", bytes(17)),
    *(wire.Open(1, "name", True, bad) for bad in BAD_SECONDS),
    *(wire.HandedOver(1, "name", 1, 0, bad) for bad in BAD_SECONDS),
    wire.HandedOver(1, "name", 1 << 40, 0, 1.0),
    wire.HandedOver(1, "name", 1, -1, 1.0),
    wire.Open(1, "x" * 5000, True, 1.0),
    *(wire.Attach(1, b"c", "kind", b"", bad) for bad in BAD_SECONDS),
    *(wire.Lend(1, KEY, 4096, bad) for bad in BAD_SECONDS),
    *(wire.LendMany(1, KEY, [4096], bad) for bad in BAD_SECONDS),
    wire.LendMany(1, KEY, [4096], 1.0, [-1]),
    wire.LendMany(1, KEY, [4096], 1.0, [1] * (wire.LEND_BLOCKS_MAX + 1)),
    *(wire.Grant(1, 1, 4096, bad) for bad in BAD_SECONDS),
    *(changed(wire.Grant(1, 1, 4096, 1.0), blocks=bad) for bad in (-1, 0, SPAN_BLOCKS_MAX + 1)),
    changed(wire.Grant(1, 2, 4096, 1.0), size_bytes=SPAN_BYTES_MAX // 2 + 1),
    *(wire.Commit(1, 1, a_span(), bad) for bad in BAD_SECONDS),
    wire.Commit(1, -1, a_span(), 1.0),
    wire.Commit(1, 1, changed(a_span(), checksums=bytes(8)), 1.0),
    *(wire.Lend(1, bad, 4096, 1.0) for bad in BAD_KEYS),
    *(wire.Offer(1, b"c", KEY, 4096, 0, 0, bad) for bad in BAD_SECONDS),
    wire.Offer(1, b"c", KEY, 4096, 0, -1, 1.0),
    wire.Offer(1, b"c", KEY, -1, 0, 0, 1.0),
    wire.Return(-1),
    *(changed(a_read(), timeout_s=bad) for bad in BAD_SECONDS),
    *(changed(a_read(), keys=bad) for bad in (*BAD_KEYS, KEY * 65, KEY * 2 + b"k")),
    *(changed(a_read(), size_bytes=bad) for bad in (0, -1, 17 << 20)),
    *(changed(a_span(), timeout_s=bad) for bad in BAD_SECONDS),
    *(changed(a_span(), keys=bad) for bad in (b"", KEY, KEY * 3, KEY * 65)),
    *(changed(a_span(), parents=bad) for bad in (b"", KEY, KEY * 3, KEY + b"k" * 17)),
    *(changed(a_span(), size_bytes=bad) for bad in (0, -1, 17 << 20)),
    *(changed(a_span(), positions=bad) for bad in ([], [1], [1, -1], [1] * 65)),
    *(changed(a_span(), rebuilds_s=bad) for bad in ([], [1.0], [1.0, math.nan], [1.0, 1e7])),
    *(changed(a_span(), checksums=bad) for bad in (b"", bytes(8), bytes(17), bytes(24))),
    *(changed(a_span(), macs=bad) for bad in ([b""], [b"", bytes(33)], [b""] * 3)),
    changed(a_span(), tenant=bytes(9)),
]
BAD_REPLIES: list[wire.Reply] = [
    *(wire.Ready("node", b"", bad) for bad in (math.nan, math.inf, -1.0)),
    *(wire.Ready("node", b"", 1.0, 0, bad) for bad in (math.nan, math.inf, -1.0, 1e300)),
    wire.Ready("node", bytes(17)),
    wire.Ready("node", b"", 1.0, -1),
    wire.Block(1, KEY[:-1], 0),
    wire.Block(-1, KEY, 0),
    wire.Block(1, KEY, 0, bytes(33)),
    wire.Failed(1, "x" * 65, ""),
    wire.Evicted(1, -1),
    wire.Lent(1, 0, -1),
    wire.LentMany(1, -1, []),
    wire.Granted(1, -1),
    wire.Granted(1, 0, -1),
    wire.Granted(1, 0, 1, wire.REGIONS_MAX),
    wire.Granted(1, 0, 1, 0, -1),
    wire.LentMany(1, 0, [wire.LentBlock(wire.LEND_BLOCKS_MAX)]),
    wire.LentMany(1, 0, [wire.LentBlock(0, 1, wire.REGIONS_MAX)]),
    wire.LentMany(1, 0, [wire.LentBlock(0, 1, 0, -1)]),
    wire.LentMany(1, 0, [wire.LentBlock(0)] * (wire.LEND_BLOCKS_MAX + 1)),
    wire.Lent(1, 0, 0, bytes(33)),
    *(changed(the_blocks(), states=bad) for bad in (b"", bytes(1), bytes(3), bytes([0, 99]), bytes(65))),
    *(changed(the_blocks(), checksums=bad) for bad in (b"", bytes(8), bytes(24))),
    *(changed(the_blocks(), keys=bad) for bad in (b"", KEY, KEY * 65)),
    *(changed(the_blocks(), macs=bad) for bad in ([b""], [b"", bytes(33)], [b""] * 65)),
    wire.Ready("node", b"", 1.0, 0, 0.0, -1),
    *(changed(wire.Found(1, [5], [0], [["a"]]), alike=bad) for bad in (-1, wire.KEYS_PER_MESSAGE + 1)),
    *(changed(wire.Found(1, [5], [0], [["a"]], [], 2), sizes=bad) for bad in ([], [0], [5, 5])),
    changed(wire.Found(1, [5], [0], [["a"]], [], 2), members=[1]),
    *(changed(wire.WrittenMany(1, b"\0"), states=bad) for bad in (b"", bytes(65), bytes([11]))),
]


def encoded(message: object) -> memoryview:
    return memoryview(msgspec.msgpack.encode(message))


@pytest.mark.parametrize("request_", BAD_REQUESTS, ids=repr)
def test_a_request_out_of_bounds_is_not_understood(request_: wire.Request) -> None:
    with pytest.raises(wire.ProtocolError, match="request not understood"):
        wire.decode_request(encoded(request_))


@pytest.mark.parametrize("reply", BAD_REPLIES, ids=repr)
def test_a_reply_out_of_bounds_is_not_understood(reply: wire.Reply) -> None:
    with pytest.raises(wire.ProtocolError, match="reply not understood"):
        wire.decode_reply(encoded(reply))


@pytest.mark.parametrize(
    ("sizes", "members", "routes"),
    [([1], [], [["a"]]), ([1], [1], [["a"]]), ([1], [0], []), ([-1], [0], [["a"]]), ([1], [-1], [["a"]])],
)
def test_hits_that_name_no_route_are_not_understood(
    sizes: list[int], members: list[int], routes: list[list[str]]
) -> None:
    with pytest.raises(wire.ProtocolError):
        wire.decode_reply(memoryview(msgspec.msgpack.encode([24, 1, sizes, members, routes])))


def test_what_is_within_bounds_is_understood() -> None:
    for message in (
        a_write(checksum=(1 << 64) - 1, timeout_s=86_400.0, rebuild_s=1e6, tenant=bytes(8), mac=bytes(32)),
        wire.Corrupt(KEY, 1, bytes(32), True),
        wire.Lookup(1, 0.0, bytes(16 * wire.KEYS_PER_MESSAGE)),
        wire.HandedOver(1, "n", -1, 0, 1.0),
        wire.Hello("control", bytes(16), True),
        wire.Alive(),
        wire.ReadMany(1, KEY * 64, 4096, 0.0),
        wire.ReadMany(1, KEY * 32, 1 << 20, 1.0),
        changed(a_span(), macs=[b"", bytes(32)], tenant=bytes(8)),
    ):
        assert wire.decode_request(encoded(message)) == message
    found = wire.Found(1, [0, 5], [0, 1], [["a"], ["b", "c"]])
    assert wire.decode_reply(encoded(found)) == found
    blocks = wire.Blocks(1, KEY * 2, bytes([0, 10]), bytes(16), [bytes(32), b""], "closed")
    assert wire.decode_reply(encoded(blocks)) == blocks
    assert [error and error.reason for error in wire.errors_of(blocks.states, "x")] == [None, "closed"]


NUMBERS = st.one_of(
    st.floats(), st.integers(-(1 << 63), (1 << 64) - 1), st.sampled_from([0, 1, -1, 1 << 30, 1 << 62, 1e300, math.nan])
)
VALUES = st.recursive(
    st.one_of(NUMBERS, st.binary(max_size=40), st.text(max_size=8), st.none(), st.booleans(), st.just(KEY)),
    lambda inner: st.lists(inner, max_size=4),
    max_leaves=6,
)
MESSAGES = st.tuples(st.integers(0, 32), st.lists(VALUES, max_size=10)).map(lambda made: [made[0], *made[1]])


@pytest.mark.slow
@settings(max_examples=2000, deadline=None)
@given(MESSAGES)
def test_any_message_is_understood_within_bounds_or_refused(message: list[Any]) -> None:
    for decode in (wire.decode_request, wire.decode_reply):
        try:
            found = decode(encoded(message))
        except wire.ProtocolError:
            continue
        for value in vars_of(found):
            assert not isinstance(value, float) or 0 <= value <= 1e18
            assert not isinstance(value, int) or -1 <= value < 1 << 64


def vars_of(message: msgspec.Struct) -> list[Any]:
    return [getattr(message, name) for name in message.__struct_fields__]


def test_bad_messages_end_their_connections_and_the_node_serves_the_others(
    rig: NodeRig, caplog: pytest.LogCaptureFixture
) -> None:
    node = rig.node(rig.pool(4 * MIB, slab=4 * MIB))
    client = rig.client(node)
    for key, parent in chain("a", 10):
        assert write(client, key, parent) == "ok"
    for bad in BAD_REQUESTS:
        stranger = rig.by_hand(node, "write")
        stranger.send(bad, bytes(4096) if isinstance(bad, wire.Write) else b"")
        stranger.until_ended()
    assert [read(client, key) for key, _ in chain("a", 10)] == ["ok"] * 10
    assert write(client, key_of("after")) == "ok"
    until(lambda: node.connections == 3, WAIT_S)
    assert node.alive
    assert not [record for record in caplog.records if record.exc_info], "no thread failed"
    lines = [record for record in caplog.records if "request not understood" in record.getMessage()]
    assert 0 < len(lines) <= len(BAD_REQUESTS) // 2, "what is alike is said once"


@settings(max_examples=60, deadline=None)
@given(st.lists(MESSAGES, min_size=1, max_size=4))
def test_a_node_lives_through_any_messages(messages: list[list[Any]]) -> None:
    node, client = fuzzed()
    stranger = node.by_hand_made()
    for message in messages:
        header = msgspec.msgpack.encode(message)
        frame = (struct.pack("<II", len(header), 0) + header).ljust(wire.HEAD_BYTES, b"\0")
        try:
            stranger.sock.sendall(frame)
        except OSError:
            break
    stranger.sock.close()
    assert read(client, key_of("kept")) == "ok" and node.node.alive


class _Fuzzed:
    """One node for all examples; it ends with the process."""

    def __init__(self) -> None:
        self.node = PoolNode(open_local_pool([4 * MIB], []), "127.0.0.1", 0)
        self.client = RemotePool(*self.node.address)
        assert write(self.client, key_of("kept")) == "ok"

    def by_hand_made(self) -> HandMade:
        return HandMade(self.node.address, "control")


_FUZZED: list[_Fuzzed] = []


def fuzzed() -> tuple[_Fuzzed, Any]:
    if not _FUZZED:
        _FUZZED.append(_Fuzzed())
    return _FUZZED[0], _FUZZED[0].client


def test_a_block_that_takes_no_time_that_is_a_number_is_refused_everywhere(rig: NodeRig) -> None:
    """Of an embedded pool, and before it goes to a node."""
    pool = rig.pool(4 * MIB, slab=4 * MIB)
    for where in (pool, rig.client(rig.node(pool))):
        for bad in (math.nan, math.inf, -1.0):
            outcome = Outcome()
            block = new_block(key_of("bad"), rebuild_s=bad)
            where.write(block, staged(key_of("bad"), 4096), 5.0, outcome)
            assert outcome.reason() == "layout"
        assert write(where, key_of("good")) == "ok"


@pytest.mark.parametrize("timeout_s", [1e300, math.inf, math.nan, -5.0])
def test_a_clients_own_odd_timeout_costs_neither_its_threads_nor_its_connections(
    rig: NodeRig, timeout_s: float
) -> None:
    client = rig.client(rig.node())
    assert write(client, key_of("a")) == "ok"
    outcome = Outcome()
    client.write(new_block(key_of("b")), staged(key_of("b"), 4096), timeout_s, outcome)
    assert outcome.reason() in ("ok", "deadline", "network")
    try:
        client.lookup([key_of("a")], timeout_s)
    except PoolError as error:
        assert error.reason in ("deadline", "network")
    until(lambda: client.up and read(client, key_of("a")) == "ok", WAIT_S)
    outcome = Outcome()
    held = Outcome()
    client.read(key_of("?"), 4096, staged(key_of("?"), 4096), 5.0, held)
    client.read(key_of("a"), 4096, staged(key_of("a"), 4096), 5.0, outcome)
    assert outcome.reason() == "ok" and held.reason() == "missing"
