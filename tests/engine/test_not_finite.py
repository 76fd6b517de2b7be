"""Prompts that the model has no numbers for: they end alone, and nothing of them reaches anybody else, ever."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from penstock.core.keys import block_keys
from penstock.core.layout import staging_bytes
from penstock.core.new_block import NewBlock
from penstock.core.operations import ChunkFault
from penstock.engine.hf_runner import HFRunner
from penstock.engine.runner import Chunk, SamplingParams
from penstock.io.memory import aligned_buffer
from penstock.pool.api import Pool, PoolError
from penstock.testing.tiny_models import build_tiny
from tests.asking import prompt_of, wait_until
from tests.engine.engine_rig import BLOCK, Rig, WatchedRunner, serving

BAD_TOKEN = 375  # no prompt of `prompt_of` has it
PAGES = 24
GREEDY = SamplingParams(max_tokens=1, temperature=0.0)
START = prompt_of(200, 5 * BLOCK)
BAD = [*START, BAD_TOKEN, *prompt_of(201, 6 * BLOCK)]
GOOD = [prompt_of(210 + i, 70 + 3 * i) for i in range(5)] + [START + prompt_of(220, 30)]


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HFRunner]:
    """A runner of a checkpoint with one damaged row of embeddings."""
    torch.set_num_threads(1)
    folder = build_tiny("llama", tmp_path_factory.mktemp("poisoned") / "model", seed=5)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][BAD_TOKEN] = float("inf")
    if "lm_head.weight" in weights:
        weights["lm_head.weight"][BAD_TOKEN] = 0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    runner = new_runner(folder)
    yield runner
    runner.close()


def new_runner(folder: Path) -> HFRunner:
    runner = HFRunner(str(folder), block_tokens=BLOCK, dtype="float32", device="cpu", layerwise=False)
    runner.allocate(PAGES)
    return runner


@pytest.fixture(scope="module")
def truth(poisoned: HFRunner) -> list[list[int]]:
    """The tokens of the good prompts, asked one by one of pages that nobody had."""
    runner = new_runner(poisoned.folder)
    with serving(runner, None, l1_pages=PAGES) as rig:
        tokens = [rig.ask(prompt, 20).tokens for prompt in GOOD]
    runner.close()
    return tokens


def ask_bad(rig: Rig) -> None:
    end = rig.start(BAD).wait()
    assert end.finish_reason == "error" and "not numbers" in str(end.error)


def test_pages_carry_nothing_to_their_next_owner(poisoned: HFRunner, truth: list[list[int]]) -> None:
    with serving(poisoned, None, l1_pages=PAGES) as rig:
        for _ in range(3):
            ask_bad(rig)
            for prompt, expected in zip(GOOD, truth, strict=True):
                assert rig.ask(prompt, 20).tokens == expected
        assert rig.counter("failed_chunks") == 3 and rig.engine.healthy() == (True, "ok")


@pytest.mark.parametrize("max_batch_tokens", [64, 1024])
def test_requests_in_its_batch_get_their_tokens(
    max_batch_tokens: int, poisoned: HFRunner, truth: list[list[int]]
) -> None:
    runner = WatchedRunner(poisoned)
    with serving(runner, None, l1_pages=PAGES, max_batch_tokens=max_batch_tokens) as rig:
        runner.run_gate.shut()
        bad = [rig.start(BAD) for _ in range(2)]
        good = [rig.start(prompt, 20) for prompt in GOOD]
        wait_until(lambda: rig.gauges()["requests_prefill"] >= 2, "admission")
        runner.run_gate.open()
        for answer, expected in zip(good, truth, strict=True):
            assert answer.wait().finish_reason == "length" and answer.tokens == expected
        assert {answer.wait().finish_reason for answer in bad} == {"error"}


def test_its_blocks_are_neither_cached_nor_saved(poisoned: HFRunner, truth: list[list[int]], memory_pool: Pool) -> None:
    """Chunks of three blocks: several are computed, and full, before the one whose logits show it."""
    with serving(poisoned, memory_pool, l1_pages=PAGES, max_batch_tokens=3 * BLOCK) as rig:
        ask_bad(rig)
        rig.settle()
        assert rig.counter("unusable_blocks") > 0
        keys = block_keys(BAD, poisoned.layout.fingerprint(poisoned.model_id), "", BLOCK)
        found = memory_pool.lookup(keys, 1.0)
        assert [hit is not None for hit in found[:3]] == [True] * 3, "blocks before it are kept"
        for key, hit in zip(keys, found, strict=True):
            if hit is not None:
                lease = memory_pool.lease(key)
                assert lease is not None
                assert np.isfinite(np.frombuffer(lease.view, np.float32)).all()
                lease.release()
        shared = rig.ask(GOOD[-1], 20)
        assert shared.tokens == truth[-1] and shared.report.cached_tokens >= 3 * BLOCK
        ask_bad(rig)


def test_blocks_of_the_pool_that_are_not_finite_are_dropped_and_computed(
    poisoned: HFRunner, truth: list[list[int]], memory_pool: Pool
) -> None:
    """As an engine that did not look saved them; two requests at once find them."""
    prompt, expected = GOOD[-1], truth[-1]
    with serving(poisoned, memory_pool, l1_pages=PAGES) as rig:
        rig.ask(prompt, 20)
    keys = block_keys(prompt, poisoned.layout.fingerprint(poisoned.model_id), "", BLOCK)
    spoil(memory_pool, poisoned, keys[2], keys[1])
    with serving(poisoned, memory_pool, l1_pages=PAGES) as rig:
        answers = [rig.start(prompt, 20) for _ in range(2)]
        for answer in answers:
            assert answer.wait().finish_reason == "length" and answer.tokens == expected
        rig.settle()
        assert rig.counter("distrusted_blocks") >= 1 and rig.counter("finished_error") == 0
        found = memory_pool.lookup(keys, 1.0)
        assert all(found), "what was dropped is saved again"
    with serving(poisoned, memory_pool, l1_pages=PAGES) as rig:
        answer = rig.ask(prompt, 20)
        assert answer.tokens == expected and answer.report.cached_tokens == len(keys) * BLOCK
        assert rig.counter("distrusted_blocks") == 0


def spoil(pool: Pool, runner: HFRunner, key: bytes, parent: bytes) -> None:
    """Write a block of NaN under the key."""
    assert pool.evict([key]) == 1
    size = runner.layout.full_block_bytes
    data = aligned_buffer(staging_bytes(size))
    np.frombuffer(data, np.float32)[:] = np.nan
    ended: list[PoolError | None] = []
    pool.write(NewBlock(key, parent, size), data, 5.0, ended.append)
    wait_until(lambda: bool(ended), "the write")
    assert ended == [None]


def test_a_chunk_says_which_of_its_blocks_are_not_finite(poisoned: HFRunner) -> None:
    pages = list(range(14))
    fine, spoiled = poisoned.run(
        [Chunk("a", prompt_of(230, 2 * BLOCK), 0, [20, 21], GREEDY), Chunk("b", BAD[: 4 * BLOCK], 0, pages)]
    )
    assert isinstance(fine, int) and spoiled is None
    (fault,) = poisoned.run([Chunk("b", BAD[4 * BLOCK : 7 * BLOCK], 4 * BLOCK, pages)])
    assert isinstance(fault, ChunkFault) and fault.error is None and fault.unusable >= {5, 6}
    (fault,) = poisoned.run([Chunk("b", BAD[7 * BLOCK :], 7 * BLOCK, pages, GREEDY)])
    assert isinstance(fault, ChunkFault) and fault.token is None and "not numbers" in str(fault.error)
