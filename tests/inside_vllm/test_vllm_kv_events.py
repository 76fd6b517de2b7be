"""KV events in vLLM's form: vLLM's own classes read them, and vLLM publishes those of Penstock's pool with its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from penstock.core.new_block import NewBlock
from penstock.engine.kv_publisher import KvPublisher
from penstock.pool.kv_events import BlockRemoved, EventBatch, KvEventLog
from tests.inside_vllm.vllm_rig import BLOCK, prompt_of, running, wait_until

WAIT_MS = 20_000


@pytest.fixture
def context() -> Iterator[Any]:
    context = zmq.Context()
    yield context
    context.destroy(linger=0)


def events_of(clears: bool) -> KvEventLog:
    log = KvEventLog(clears=clears)
    come_and_go(log, b"k" * 16, (1, 2), "CPU")
    return log


def come_and_go(log: KvEventLog, key: bytes, tokens: tuple[int, ...], medium: str) -> None:
    """A first block of a prompt."""
    log.stored(NewBlock(key, b"r" * 16, 1, int.from_bytes(key[-4:], "little"), tokens=tokens), medium)
    log.gone(key)


def test_vllm_s_classes_read_what_penstock_publishes() -> None:
    from vllm.distributed.kv_events import KVEventBatch

    from penstock.vllm.kv_events import vllm_events

    ours = events_of(clears=True).take(10)
    read = msgspec.msgpack.decode(msgspec.msgpack.encode(EventBatch(1.5, ours)), type=KVEventBatch)
    assert [type(event).__name__ for event in read.events] == ["AllBlocksCleared", "BlockStored", "BlockRemoved"]
    assert read.ts == 1.5 and read.events[1].token_ids == [1, 2] and read.events[1].parent_block_hash is None
    assert (read.events[1].medium, read.events[1].locality, read.events[1].ownership) == ("CPU", "LOCAL", None)
    theirs = vllm_events(events_of(clears=False))
    assert theirs == read.events[1:]
    assert isinstance(ours[2], BlockRemoved) and read.events[2].block_hashes == ours[2].block_hashes


def test_vllm_s_sockets_read_penstock_s_publisher(context: Any) -> None:
    """Live events by the socket that vLLM makes for a subscriber, the earlier ones by one that asks for them again."""
    from vllm.distributed.kv_events import KVEventBatch, ZmqEventPublisher
    from vllm.utils.network_utils import make_zmq_socket

    log = events_of(clears=True)
    publisher = KvPublisher(log, "tcp://127.0.0.1:0", "tcp://127.0.0.1:0")
    try:
        wait_until(lambda: publisher.batches == 1, "the first events are published")
        again = make_zmq_socket(context, publisher.replay_address, zmq.DEALER, bind=False)
        again.setsockopt(zmq.RCVTIMEO, WAIT_MS)
        again.send_multipart([b"", (0).to_bytes(8, "big")])
        _, topic, sequence, payload = again.recv_multipart()
        first = msgspec.msgpack.decode(payload, type=KVEventBatch)
        assert (topic, int.from_bytes(sequence, "big")) == (b"", 0)
        assert [type(event).__name__ for event in first.events] == ["AllBlocksCleared", "BlockStored", "BlockRemoved"]
        assert again.recv_multipart()[2] == ZmqEventPublisher.END_SEQ
        live = make_zmq_socket(context, publisher.address, zmq.SUB)
        live.subscribe(b"")
        heard: list[Any] = []

        def hears() -> bool:
            """Events from when the subscription has arrived on."""
            come_and_go(log, b"j" * 16, (3, 4), "STORAGE")
            if live.poll(50):
                heard.append(live.recv_multipart())
            return bool(heard)

        wait_until(hears, "a live event arrives")
        topic, sequence, payload = heard[0]
        batch = msgspec.msgpack.decode(payload, type=KVEventBatch)
        assert topic == b"" and int.from_bytes(sequence, "big") >= 1 and batch.ts > first.ts
        stored = next(event for event in batch.events if type(event).__name__ == "BlockStored")
        assert (stored.token_ids, stored.medium, stored.parent_block_hash) == ([3, 4], "STORAGE", None)
    finally:
        publisher.close()


@pytest.mark.timeout(900)
def test_vllm_publishes_what_comes_into_the_pool(
    llama: Path, computed: Callable[..., list[list[int]]], context: Any, tmp_path: Path
) -> None:
    """What a reader of vLLM's publisher gets."""
    from vllm.config.kv_events import KVEventsConfig
    from vllm.distributed.kv_events import BlockStored, KVEventBatch
    from vllm.utils.network_utils import make_zmq_socket

    prompt = prompt_of(77, 4 * BLOCK + 3)
    expected = computed("llama", [prompt])
    stored: list[Any] = []
    endpoint = f"ipc://{tmp_path}/events"
    reader = make_zmq_socket(context, endpoint, zmq.SUB)
    reader.subscribe(b"")
    config = KVEventsConfig(enable_kv_cache_events=True, publisher="zmq", endpoint=endpoint)

    def all_published() -> bool:
        engine.ask([prompt_of(78, 5)])  # vLLM publishes with its steps
        while reader.poll(100):
            read = msgspec.msgpack.decode(reader.recv_multipart()[2], type=KVEventBatch)
            stored.extend(event for event in read.events if isinstance(event, BlockStored) and event.medium == "CPU")
        return len(stored) >= 4

    with running(llama, {"memory": ["64MiB"]}, kv_events_config=config) as engine:
        assert engine.ask([prompt]) == expected
        wait_until(all_published, "four blocks of the prompt are published")
    assert {event.block_size for event in stored} == {BLOCK} and {event.locality for event in stored} == {"LOCAL"}
    tokens = [event.token_ids for event in stored]
    assert sorted(tokens) == sorted(prompt[at : at + BLOCK] for at in range(0, 4 * BLOCK, BLOCK))
    hashes = {tuple(event.token_ids): event.block_hashes[0] for event in stored}
    parents = [event.parent_block_hash for event in stored]
    assert parents == [None, *(hashes[tuple(one)] for one in tokens[:-1])]
