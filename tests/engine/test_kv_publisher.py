"""KV events over real ZMQ sockets: live and again, for readers that come late, ask nonsense or do not read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import zmq

from penstock.core.config import ConfigError
from penstock.core.keys import KeyChain, root_key
from penstock.engine.build import RunningEngine, build_engine
from penstock.engine.config import EngineConfig
from penstock.engine.kv_publisher import END_SEQUENCE, KvPublisher
from penstock.pool.kv_events import BlockStored, Event, EventBatch, KvEventLog, hash_of
from tests.asking import wait_until
from tests.engine.engine_rig import Rig
from tests.pool.test_kv_events import Reader, named

WAIT_MS = 20_000
ANY = "tcp://127.0.0.1:0"
BLOCK = 16


@pytest.fixture
def context() -> Iterator[Any]:
    context = zmq.Context()
    yield context
    context.destroy(linger=0)


@pytest.fixture
def running() -> Iterator[RunningEngine]:
    config = EngineConfig(
        executor="modelled",
        bytes_divisor=1024,
        time_factor=0.01,
        memory=(8 << 20,),
        kv_memory_bytes=1 << 20,
        staging_bytes=1 << 20,
        block_tokens=BLOCK,
        kv_events=ANY,
        kv_events_replay=ANY,
    )
    running = build_engine(config)
    yield running
    running.close()


def replayed(context: Any, address: str | None, first: bytes) -> list[tuple[int, list[Event]]]:
    """The batches that a publisher sends again."""
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.RCVTIMEO, WAIT_MS)
    socket.connect(address)
    socket.send_multipart([b"", first])
    found = []
    while (frames := socket.recv_multipart())[2] != END_SEQUENCE:
        batch = msgspec.msgpack.decode(frames[3], type=EventBatch)
        found.append((int.from_bytes(frames[2], "big"), batch.events))
    return found


def test_what_an_engine_saves_is_published_with_its_tokens(running: RunningEngine, context: Any) -> None:
    publisher = running.publisher
    assert publisher is not None
    live = context.socket(zmq.SUB)
    live.setsockopt(zmq.RCVTIMEO, WAIT_MS)
    live.subscribe(b"")
    live.connect(publisher.address)
    rig, prompt = Rig(running.engine), list(range(100, 100 + 5 * BLOCK))
    rig.ask(prompt)
    rig.settle()
    keys = KeyChain(root_key(running.engine.fingerprint, ""), BLOCK).extend(prompt)
    batches: list[tuple[int, list[Event]]] = []

    def all_there() -> bool:
        batches[:] = replayed(context, publisher.replay_address, (0).to_bytes(8, "big"))
        return sum(isinstance(event, BlockStored) for _, events in batches for event in events) == len(keys)

    wait_until(all_there, "every block is announced")
    reader, stored = Reader(), list[BlockStored]()
    assert [sequence for sequence, _ in batches] == list(range(len(batches)))
    for _, events in batches:
        reader.hear(events)
        stored += [event for event in events if isinstance(event, BlockStored)]
    assert reader.known == {hash_of(key): "CPU" for key in keys}
    tokens = {event.block_hashes[0]: event.token_ids for event in stored}
    assert [tokens[hash_of(key)] for key in keys] == [prompt[at : at + BLOCK] for at in range(0, 5 * BLOCK, BLOCK)]
    parents = {event.block_hashes[0]: event.parent_block_hash for event in stored}
    assert [parents[hash_of(key)] for key in keys] == [None, *map(hash_of, keys[:-1])]
    rig.ask(list(range(500, 500 + BLOCK)))
    rig.settle()
    topic, sequence, payload = live.recv_multipart()
    batch = msgspec.msgpack.decode(payload, type=EventBatch)
    assert topic == b"" and len(sequence) == 8 and batch.events and batch.ts > 1e9
    assert rig.counter("kv_events_dropped") == 0


def test_readers_that_ask_nonsense_or_do_not_read_stop_nobody(context: Any) -> None:
    log = KvEventLog()
    publisher = KvPublisher(log, ANY, ANY, topic="kv")
    try:
        deaf = context.socket(zmq.SUB)
        deaf.setsockopt(zmq.RCVHWM, 1)
        deaf.subscribe(b"")
        deaf.connect(publisher.address)
        strange = context.socket(zmq.DEALER)
        strange.connect(publisher.replay_address)
        for frames in ([b""], [b"", b"x"], [b"", b"x" * 8, b"y"], [b"", b"\xff" * 8], [b"x" * 10_000]):
            strange.send_multipart(frames)
        for name in range(3000):
            log.stored(named(name, 1)[0], "CPU")
        wait_until(lambda: not log.changed.is_set(), "everything is published")
        batches = replayed(context, publisher.replay_address, (0).to_bytes(8, "big"))
        assert sum(len(events) for _, events in batches) == 3001 and log.dropped == 0
        assert replayed(context, publisher.replay_address, (1 << 40).to_bytes(8, "big")) == []
    finally:
        publisher.close()


def test_an_address_that_cannot_be_had_is_refused() -> None:
    for address in ("tcp://203.0.113.7:5557", "nonsense", "tcp://127.0.0.1:port"):
        with pytest.raises(ConfigError, match=r"kv_events is .*; allowed: tcp://"):
            KvPublisher(KvEventLog(), address, None)
    with pytest.raises(ConfigError, match=r"kv_events_replay is set without kv_events"):
        EngineConfig(executor="modelled", kv_events_replay=ANY)
    with pytest.raises(ConfigError, match=r"kv_events is set together with no_pool"):
        EngineConfig(executor="modelled", kv_events=ANY, no_pool=True)


@pytest.mark.parametrize(("address", "warned"), [("tcp://0.0.0.0:0", ["kv_events"]), (ANY, [])])
def test_an_address_that_others_reach_is_warned_of(
    address: str, warned: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING", "penstock.engine.kv_publisher"):
        KvPublisher(KvEventLog(), address, ANY).close()
    assert [record.args[0] for record in caplog.records if isinstance(record.args, tuple)] == warned
    assert all("token ids" in record.getMessage() for record in caplog.records)
