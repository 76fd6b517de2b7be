"""Engines with a pool key around a real pool node that somebody with its secret poisons: the same tokens, whatever lies
there."""

from __future__ import annotations

import contextlib
import logging
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from penstock.core.keys import BlockKey, block_keys
from penstock.core.layout import staging_bytes
from penstock.core.new_block import NewBlock
from penstock.engine.api import GenerationRequest
from penstock.engine.build import RunningEngine, build_engine
from penstock.engine.config import EngineConfig
from penstock.engine.engine import new_request_id
from penstock.engine.runner import SamplingParams
from penstock.io.memory import aligned_buffer
from penstock.pool.api import PoolError
from penstock.pool.net.connect import connect_pool
from tests.asking import WAIT_S, Answer, prompt_of, wait_until
from tests.engine.test_kv_over_nodes import Node, start  # noqa: F401  (a fixture)

BLOCK, BLOCKS, MIB = 16, 12, 1 << 20
PROMPT = prompt_of(611, BLOCKS * BLOCK + 5)


@contextlib.contextmanager
def engine(tiny: Callable[[str], Path], node: str, **more: Any) -> Iterator[RunningEngine]:
    """As `penstock serve` builds it."""
    given: dict[str, Any] = {"pool": (node,)} | more
    running = build_engine(
        EngineConfig(
            model=str(tiny("llama")),
            block_tokens=BLOCK,
            dtype="float32",
            device="cpu",
            kv_memory_bytes=8 * MIB,
            staging_bytes=4 * MIB,
            **given,
        )
    )
    try:
        yield running
        assert running.engine.wait_idle(WAIT_S)
    finally:
        running.close(5.0)


def ask(running: RunningEngine, prompt: list[int] = PROMPT) -> Answer:
    answer = Answer()
    sampling = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    running.engine.submit(GenerationRequest(new_request_id(), prompt, sampling), answer)
    assert answer.wait().finish_reason == "length", answer.last
    assert running.engine.wait_idle(WAIT_S)
    return answer


@pytest.fixture
def key_file(tmp_path: Path) -> Callable[[str], str]:
    def made(name: str) -> str:
        path = tmp_path / name
        path.touch(0o600)
        path.write_text(f"the pool key of the group {name:>20}\n")
        return str(path)

    return made


def poison(node: str, keys: list[BlockKey], size_bytes: int) -> list[BlockKey]:
    """Replace blocks as somebody who reaches the node can: the checksum of the other bytes is right. Returns those that
    were there."""
    client = connect_pool(node)
    found = [key for key, hit in zip(keys, client.lookup(keys, WAIT_S), strict=True) if hit is not None]
    left = len(found)

    def evicted() -> bool:
        nonlocal left
        left -= client.evict(found)
        return left == 0

    wait_until(evicted, "nobody reads them any more")
    ends: list[PoolError | None] = []
    junk = aligned_buffer(staging_bytes(size_bytes))
    junk[:size_bytes] = struct.pack("<f", 3.0) * (size_bytes // 4)
    for key in found:
        client.write(NewBlock(key, b"r" * 16, size_bytes), junk, WAIT_S, ends.append)
    wait_until(lambda: len(ends) == len(found), "the forged blocks are written")
    assert ends == [None] * len(found)
    client.close(5.0)
    return found


def keys_of(running: RunningEngine) -> list[BlockKey]:
    """What the engine's blocks of the prompt are called: known to who reads them off the wire or the node's disk."""
    return block_keys(PROMPT, running.engine.fingerprint, "", BLOCK)


def test_a_poisoned_node_costs_the_blocks_and_never_the_answer(
    tiny: Callable[[str], Path],
    computed: Callable[..., list[int]],
    start: Callable[..., Node],  # noqa: F811
    key_file: Callable[[str], str],
) -> None:
    node, key = start().address, key_file("one")
    want = computed(PROMPT)
    with engine(tiny, node, pool_key_file=key) as running:
        assert ask(running).tokens == want
        keys, size = keys_of(running), running.engine.config.block_bytes
    with engine(tiny, node, pool_key_file=key) as running:
        loaded = ask(running)
        assert loaded.tokens == want and loaded.report.loaded_bytes == BLOCKS * size
        assert not loaded.report.load_failures
    assert poison(node, keys, size) == keys
    with engine(tiny, node, pool_key_file=key) as running:
        poisoned = ask(running)
        assert poisoned.tokens == want, "forged KV was computed with"
        assert set(poisoned.report.load_failures) == {"mac"} and poisoned.report.loaded_bytes == 0
        assert running.engine.stats().labelled["load_failures"]["mac"] >= 1
    with engine(tiny, node, pool_key_file=key) as running:  # blocks that were read and refused are replaced
        wait_until(lambda: ask(running).tokens == want, "an answer")
    for _ in range(BLOCKS + 1):
        with engine(tiny, node, pool_key_file=key) as running:
            healed = ask(running)
            assert healed.tokens == want
            if healed.report.loaded_bytes == BLOCKS * size:
                break
    assert healed.report.loaded_bytes == BLOCKS * size and not healed.report.load_failures, "it heals"


def test_without_a_key_the_same_node_is_believed_and_a_line_says_so(
    tiny: Callable[[str], Path],
    computed: Callable[..., list[int]],
    start: Callable[..., Node],  # noqa: F811
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What a key is for."""
    node, want = start().address, computed(PROMPT)
    with engine(tiny, node) as running:
        assert ask(running).tokens == want
        keys, size = keys_of(running), running.engine.config.block_bytes
    said = [record.message for record in caplog.records if "there is no pool key" in record.message]
    assert len(said) == 1 and caplog.records[0].levelno == logging.WARNING
    assert poison(node, keys, size) == keys
    with engine(tiny, node) as running:
        believed = ask(running)
        assert not believed.report.load_failures and believed.report.loaded_bytes == BLOCKS * size
        assert believed.tokens != want, "the forged KV was good enough: the test shows nothing"


def test_groups_with_keys_of_their_own_share_a_node_and_leave_each_other_alone(
    tiny: Callable[[str], Path],
    computed: Callable[..., list[int]],
    start: Callable[..., Node],  # noqa: F811
    key_file: Callable[[str], str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    node, want = start().address, computed(PROMPT)
    groups: list[dict[str, str]] = [{"pool_key_file": key_file("one")}, {"pool_key_file": key_file("two")}, {}]
    for group in groups:
        with engine(tiny, node, **group) as running:
            first = ask(running)
            assert first.tokens == want and not first.report.cached_tokens and not first.report.load_failures
    for group in groups:
        with engine(tiny, node, **group) as running:
            again = ask(running)
            assert again.tokens == want and again.report.loaded_bytes == BLOCKS * running.engine.config.block_bytes
            assert not again.report.load_failures
    assert "group" not in caplog.text, "a key was printed"


def test_a_key_with_memory_and_slab_of_its_own(
    tiny: Callable[[str], Path], computed: Callable[..., list[int]], key_file: Callable[[str], str], tmp_path: Path
) -> None:
    own: dict[str, Any] = {"pool": (), "memory": (MIB,), "slab": ((str(tmp_path / "kv.slab"), 8 * MIB),)}
    prompts = [[number, *PROMPT[1:]] for number in range(6, 12)]  # the first block of one or the other is on the slab
    with engine(tiny, "", pool_key_file=key_file("one"), **own) as running:
        for prompt in prompts:
            assert ask(running, prompt).tokens == computed(prompt)
    with engine(tiny, "", pool_key_file=key_file("one"), **own) as running:
        again = [ask(running, prompt) for prompt in prompts]
    assert [one.tokens for one in again] == [computed(prompt) for prompt in prompts]
    assert not any(one.report.load_failures for one in again)
    assert sum(one.report.loaded_bytes for one in again) > 0


def test_a_key_file_that_cannot_be_used_ends_the_start_in_one_line(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("x" * 40)
    path.chmod(0o644)
    with pytest.raises(ValueError, match="mode 644"), engine(tiny, "127.0.0.1:1", pool_key_file=str(path)):
        pass
    with (
        pytest.raises(ValueError, match="cannot be read"),
        engine(tiny, "127.0.0.1:1", pool_key_file=str(tmp_path / "absent")),
    ):
        pass
