"""KV events in vLLM's form: vLLM's own classes read them, and vLLM publishes those of Penstock's pool with its own."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from penstock.core.new_block import NewBlock
from penstock.pool.kv_events import BlockRemoved, EventBatch, KvEventLog
from tests.inside_vllm.vllm_rig import BLOCK, prompt_of, running, wait_until


def events_of(clears: bool) -> KvEventLog:
    log = KvEventLog(clears=clears)
    key = b"k" * 16
    log.stored(NewBlock(key, b"r" * 16, 1, int.from_bytes(key[-4:], "little"), tokens=(1, 2)), "CPU")
    log.gone(key)
    return log


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


@pytest.mark.timeout(900)
def test_vllm_publishes_what_comes_into_the_pool(
    llama: Path, computed: Callable[..., list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What vLLM's publisher is given, as its readers get it."""
    from vllm.config.kv_events import KVEventsConfig
    from vllm.distributed.kv_events import BlockStored, KVEventBatch, ZmqEventPublisher

    prompt = prompt_of(77, 4 * BLOCK + 3)
    expected = computed("llama", [prompt])
    stored: list[Any] = []
    publish = ZmqEventPublisher.publish

    def heard(publisher: ZmqEventPublisher, batch: KVEventBatch) -> None:
        publish(publisher, batch)
        read = msgspec.msgpack.decode(msgspec.msgpack.encode(batch), type=KVEventBatch)
        stored.extend(event for event in read.events if isinstance(event, BlockStored) and event.medium == "CPU")

    monkeypatch.setattr(ZmqEventPublisher, "publish", heard)
    with socket.create_server(("127.0.0.1", 0)) as free:
        endpoint = f"tcp://127.0.0.1:{free.getsockname()[1]}"  # vLLM connects there: nobody listens
    config = KVEventsConfig(enable_kv_cache_events=True, publisher="zmq", endpoint=endpoint)

    def all_published() -> bool:
        engine.ask([prompt_of(78, 5)])  # vLLM publishes with its steps
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
