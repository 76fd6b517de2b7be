"""KV events in vLLM's form: vLLM's own classes read them, and vLLM publishes those of Penstock's pool with its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

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
def test_vllm_publishes_what_comes_into_the_pool(llama: Path, computed: Callable[..., list[list[int]]]) -> None:
    from vllm.config.kv_events import KVEventsConfig
    from vllm.distributed.kv_events import BlockStored, KVEventBatch

    prompt = prompt_of(77, 4 * BLOCK + 3)
    expected = computed("llama", [prompt])
    context = zmq.Context()
    socket = context.socket(zmq.SUB)
    socket.subscribe(b"")
    port = socket.bind_to_random_port("tcp://127.0.0.1")  # vLLM connects to an address that is not a wildcard
    config = KVEventsConfig(enable_kv_cache_events=True, publisher="zmq", endpoint=f"tcp://127.0.0.1:{port}")
    stored: list[Any] = []

    def heard() -> bool:
        while socket.poll(0):
            events = msgspec.msgpack.decode(socket.recv_multipart()[2], type=KVEventBatch).events
            stored.extend(event for event in events if isinstance(event, BlockStored) and event.medium == "CPU")
        return len(stored) >= 4

    def step_and_hear() -> bool:
        engine.ask([prompt_of(78, 5)])  # vLLM publishes with its steps
        return heard()

    try:
        with running(llama, {"memory": ["64MiB"]}, kv_events_config=config) as engine:
            assert engine.ask([prompt]) == expected
            wait_until(step_and_hear, "four blocks of the prompt are published")
    finally:
        context.destroy(linger=0)
    assert {event.block_size for event in stored} == {BLOCK} and {event.locality for event in stored} == {"LOCAL"}
    tokens = [event.token_ids for event in stored]
    assert sorted(tokens) == sorted(prompt[at : at + BLOCK] for at in range(0, 4 * BLOCK, BLOCK))
    hashes = {tuple(event.token_ids): event.block_hashes[0] for event in stored}
    parents = [event.parent_block_hash for event in stored]
    assert parents == [None, *(hashes[tuple(one)] for one in tokens[:-1])]
