"""Every message of the pool protocol has bounds, and no bytes do more to its decoders than to be refused."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import msgspec
import pytest
from msgspec import Meta

import penstock
from penstock.pool.api import AMOUNT_MAX, Located, MemberStat, PoolError, PoolStat
from penstock.pool.net import wire
from penstock.pool.net.nixl_mover import AgentMemory
from penstock.pool.net.node import PoolNode
from penstock.pool.net.pool_lending import NodeMemory, Region, decode_node_memory
from penstock.pool.net.remote import RemotePool
from penstock.pool.net.shared_memory import MemoryFile, SharedMemoryMover
from penstock.pool.net.verbs_messages import QueueEnd, RemotePart, decode_ends, decode_parts, encode
from penstock.pool.setup.open import open_local_pool
from penstock.server.template_renderer import Answer
from tests.fuzz_messages import MESSAGES, Protocol, fuzz_kind
from tests.pool.helpers import Outcome, key_of, staged
from tests.pool.net.node_rig import fit_span

SHARE = 0.5  # of PENSTOCK_FUZZ_MESSAGES; the cluster's and vLLM's have the rest
REQUESTS = Protocol(
    "request", wire.Request, lambda raw: wire.decode_request(memoryview(raw)), wire.ProtocolError, fit=fit_span
)
REPLIES = Protocol(
    "reply", wire.Reply, lambda raw: wire.decode_reply(memoryview(raw)), wire.ProtocolError, fit=fit_span
)
KINDS = [(protocol, cls) for protocol in (REQUESTS, REPLIES) for cls in protocol.kinds]
NO_MESSAGES = {
    "text of no UTF-8": b"\x92\x01\xa2\xff\xfe",
    "deep nesting behind the last field": b"\x95\x01\xa4read\xc4\x00\xc2" + b"\x91" * 500_000 + b"\xc0",
    "deep nesting in an unknown message": b"\x92\x63" + b"\x91" * 500_000 + b"\xc0",
    "a list that is longer than memory": b"\x95\x18\x01\xdd\xff\xff\xff\xff",
    "a text that is longer than the message": b"\x92\x01\xdb\xff\xff\xff\xff",
    "nothing": b"",
}
DECODING = {  # modules that decode what another process sends, each fuzzed or tested by itself; framing: for others
    "cluster/agent_wire.py", "cluster/router/fronts/wire.py", "cluster/wire.py", "framing.py",
    "pool/net/nixl_mover.py", "pool/net/pool_lending.py", "pool/net/shared_memory.py",
    "pool/net/verbs_messages.py", "pool/net/wire.py",
    "server/template_process.py", "server/template_renderer.py",
    "vllm/link.py",
}  # fmt: skip


class Inner(msgspec.Struct):
    figure: Annotated[float, Meta(ge=0.0)]


class Loose(msgspec.Struct, tag=1):
    id: int
    key: bytes
    good: Annotated[bytes, Meta(max_length=4)]
    names: Annotated[list[str], Meta(max_length=4)]
    inner: list[Inner]
    counts: dict[Annotated[str, Meta(max_length=4)], bool]
    raw: msgspec.Raw
    anything: Any
    half: Annotated[int, Meta(ge=0)]
    word: Annotated[int, Meta(ge=0, extra={"bits": 64})]


@pytest.mark.parametrize("protocol", [REQUESTS, REPLIES], ids=lambda one: one.name)
def test_every_field_has_bounds(protocol: Protocol) -> None:
    assert len(protocol.kinds) > 10 and protocol.missing_bounds() == []


@pytest.mark.parametrize("record", [MemoryFile, AgentMemory, NodeMemory, QueueEnd, RemotePart, Answer])
def test_every_field_of_what_travels_within_messages_has_bounds(record: type) -> None:
    assert Protocol(record.__name__, record, lambda raw: None, ValueError).missing_bounds() == []


def test_a_field_without_bounds_is_found() -> None:
    found = Protocol("loose", Loose, lambda raw: None, ValueError).missing_bounds()
    places = [one.split(":")[0].removeprefix("loose Loose.") for one in found]
    assert places == ["id", "key", "names[]", "inner", "inner[].figure", "counts", "raw", "anything", "half"]


@pytest.mark.parametrize(("protocol", "cls"), KINDS, ids=lambda one: getattr(one, "__name__", one))
def test_mutants_of_each_message_are_refused_or_within_bounds(protocol: Protocol, cls: type) -> None:
    made, understood = fuzz_kind(protocol, cls, int(MESSAGES * SHARE / len(KINDS)))
    assert made > 0 and 0 < understood < made


@pytest.mark.parametrize("body", NO_MESSAGES.values(), ids=NO_MESSAGES.keys())
def test_bytes_that_are_no_message_are_refused_in_few_words(body: bytes) -> None:
    for protocol in (REQUESTS, REPLIES):
        with pytest.raises(wire.ProtocolError) as refused:
            protocol.decode(body)
        assert len(str(refused.value)) < 500


def test_every_module_that_decodes_messages_is_known_here() -> None:
    """A new decoder joins the protocols that are fuzzed, then this list. Files, which nobody sends, are msgspec.json,
    tomllib or json."""
    package = Path(penstock.__file__).parent
    found = set()
    for path in package.rglob("*.py"):
        text = path.read_text()
        if not any(module in text for module in ("msgpack", "pickle", "marshal")):
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in (
                "msgspec.msgpack.Decoder", "msgspec.msgpack.decode", "pickle.loads", "pickle.load", "marshal.loads",
            ):  # fmt: skip
                found.add(str(path.relative_to(package)))
    assert found == DECODING


def test_descriptions_of_memory_are_refused_or_attached() -> None:
    mover = SharedMemoryMover()
    good = mover.export(mover.allocate(4096))
    mover.attach(good).close()
    record = msgspec.msgpack.decode(good)
    others: tuple[Any, ...] = (-1, 0, 1 << 63, "x" * 70, "\0", None, 1.5, b"", [[]], "../../etc")
    bad = [[*record[:at], other, *record[at + 1 :]] for at in range(len(record)) for other in others]
    cut = [good[:at] for at in range(len(good))]
    nested = b"\x97" + good[1:] + b"\x91" * 100_000 + b"\xc0"
    for description in [*map(msgspec.msgpack.encode, bad), *cut, nested, b"\x96\xa1\xff" + good[2:]]:
        with pytest.raises(PoolError) as refused:
            mover.attach(description).close()
        assert refused.value.reason == "network" and len(str(refused.value)) < 500
    mover.close()


def test_descriptions_of_a_nodes_memory_are_refused_or_understood() -> None:
    good = msgspec.msgpack.encode(NodeMemory(b"metadata", [Region(4096, 8192)], 3))
    assert decode_node_memory(good).regions == [Region(4096, 8192)]
    record = msgspec.msgpack.decode(good)
    others: tuple[Any, ...] = (
        -1,
        "x",
        None,
        1.5,
        [[]],
        [[1, 0]],
        [[-1, 5]],
        [[0, 1 << 40]],
        b"m" * (wire.DESCRIPTION_BYTES_MAX + 1),
    )
    bad = [[*record[:at], other, *record[at + 1 :]] for at in range(len(record)) for other in others]
    for description in [
        *map(msgspec.msgpack.encode, bad),
        *(good[:at] for at in range(len(good))),
        b"\x93" + b"\x91" * 100_000,
    ]:
        with pytest.raises(wire.ProtocolError) as refused:
            decode_node_memory(description)
        assert len(str(refused.value)) < 500


@pytest.mark.parametrize(
    ("good", "decode"),
    [(QueueEnd(17, 99, 0, b"g" * 16, 5, 16), decode_ends), (RemotePart(4096, 8192, [7, 8]), decode_parts)],
    ids=["queue pairs", "registered memory"],
)
def test_descriptions_of_verbs_are_refused_or_understood(
    good: QueueEnd | RemotePart, decode: Callable[[bytes], list[Any]]
) -> None:
    assert decode(encode([good])) == [good] and decode(encode([])) == []
    record = msgspec.msgpack.decode(encode([good]))[0]
    others: tuple[Any, ...] = (-1, "x", None, 1.5, [[]], [-1], [1 << 32], list(range(9)), b"g" * 17)
    changed = [[*record[:at], other, *record[at + 1 :]] for at in range(len(record)) for other in others]
    cut = [encode([good])[:at] for at in range(len(encode([good])))]
    for description in [*(msgspec.msgpack.encode([one]) for one in changed), *cut, b"\x91" * 100_000]:
        with pytest.raises(wire.ProtocolError) as refused:
            decode(description)
        assert len(str(refused.value)) < 500
    with pytest.raises(wire.ProtocolError):
        decode(encode([good] * 5000))


def test_a_hit_that_cannot_travel_costs_itself_and_not_those_beside_it() -> None:
    good = Located(4096, ("memory:0",))
    bad = [
        Located(wire.PAYLOAD_BYTES_MAX + 1, ("memory:0",)),
        Located(4096, ("x" * 2000,)),
        Located(4096, tuple(map(str, range(wire.ROUTE_LINKS_MAX + 1)))),
    ]
    sent = wire.found(1, [good, *bad, None, good])
    assert wire.decode_reply(memoryview(msgspec.msgpack.encode(sent))) == sent
    assert sent.sizes == [4096, 0, 0, 0, 0, 4096] and sent.routes == [["memory:0"]]


def test_a_figure_beyond_its_bounds_costs_nobody_the_rest_of_the_statistics() -> None:
    member = MemberStat("m" * 5000, "memory", 1 << 70, -1, 1, True, float("nan"), 1, 1, 1, "ok", float("inf"))
    stat = PoolStat((member,), 1 << 63, -5, 2, tenants=(("t", 1 << 64),), losses=(("kind", 7), ("other", 1 << 65)))
    with pytest.raises((wire.ProtocolError, OverflowError)):
        wire.decode_reply(memoryview(msgspec.msgpack.encode(wire.Stats(1, stat))))
    sent = wire.Stats(1, stat.bounded())
    assert wire.decode_reply(memoryview(msgspec.msgpack.encode(sent))) == sent
    found = sent.stat
    assert found.losses == (("kind", 7), ("other", AMOUNT_MAX)) and found.checksum_errors == 2
    assert found.members[0].weight == 0.0 and found.members[0].capacity_bytes == AMOUNT_MAX
    assert found.bounded() == found


def test_a_block_of_a_prompt_is_here_or_readable_or_absent() -> None:
    good = wire.Opened(1, b"\0\1\2")
    assert wire.decode_reply(memoryview(msgspec.msgpack.encode(good))) == good
    for blocks in (b"\0\3", bytes(wire.PROMPT_BLOCKS_MAX + 1)):
        with pytest.raises(wire.ProtocolError):
            wire.decode_reply(memoryview(msgspec.msgpack.encode([28, 1, blocks])))


def test_an_error_that_cannot_be_encoded_or_is_long_is_told_all_the_same(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path may be no UTF-8, and an error may name it."""
    pool = open_local_pool([1 << 20], [])
    failed = PoolError("device", "read of /pool/\udcff.slab failed " + "x" * 100_000)
    monkeypatch.setattr(pool, "open_block", lambda key, size_bytes: failed)
    node = PoolNode(pool, "127.0.0.1", 0)
    client = RemotePool(*node.address)
    outcome = Outcome()
    client.read(key_of("a"), 4096, staged(key_of("a"), 4096), 20.0, outcome)
    error = outcome.get()
    assert error is not None and error.reason == "device" and error.detail.startswith("read of /pool/?.slab failed x")
    assert len(error.detail) <= wire.DETAIL_CHARACTERS_MAX and client.up
    assert not [record for record in caplog.records if record.exc_info]
    client.close(5.0)
    node.close(5.0)
    pool.close(5.0)


def test_a_detail_beyond_its_bound_is_no_message() -> None:
    with pytest.raises(wire.ProtocolError):
        wire.decode_reply(memoryview(msgspec.msgpack.encode([22, 1, "full", "x" * 70_000])))
