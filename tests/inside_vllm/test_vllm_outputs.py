"""The same tokens however a prefix comes: computed, from vLLM's cache, from memory, a slab or a pool node."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.inside_vllm.vllm_rig import BLOCK, PoolProcess, prompt_of, running, wait_until

ARCHITECTURES = ("llama", "qwen3", "sliding")
LENGTHS = (BLOCK * 7 + 13, BLOCK * 5, BLOCK * 3 + 63, 20)
LOADABLE = BLOCK * (7 + 4 + 3)  # full blocks, less the last token, which is always computed
PROMPTS = [prompt_of(seed, tokens) for seed, tokens in enumerate(LENGTHS)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_memory(architecture: str, model: Callable[[str], Path], computed: Callable[..., list[list[int]]]) -> None:
    expected = computed(architecture, PROMPTS)
    longer = [prompt + answer + prompt_of(77, 50) for prompt, answer in zip(PROMPTS, expected, strict=True)]
    longer_expected = computed(architecture, longer)
    with running(model(architecture), {"memory": ["64MiB"]}) as engine:
        assert engine.ask(PROMPTS) == expected
        cold = engine.counts()
        assert cold.local == cold.external == 0
        assert engine.ask(PROMPTS) == expected
        assert engine.counts().local > 0 and engine.counts().external == 0
        assert engine.again(PROMPTS, LOADABLE) == expected
        assert engine.ask(longer) == longer_expected
        assert engine.again(longer, LOADABLE) == longer_expected


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_slab_over_a_restart_of_vllm(
    architecture: str, model: Callable[[str], Path], computed: Callable[..., list[list[int]]], tmp_path: Path
) -> None:
    extra, expected = {"slab": [f"{tmp_path}/kv.slab:64MiB"]}, computed(architecture, PROMPTS)
    with running(model(architecture), extra) as engine:
        engine.ask(PROMPTS)
        assert engine.again(PROMPTS, LOADABLE) == expected
    with running(model(architecture), extra) as engine:
        assert engine.again(PROMPTS, LOADABLE) == expected


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_pool_node_that_two_vllms_share(
    architecture: str,
    model: Callable[[str], Path],
    computed: Callable[..., list[list[int]]],
    pool_process: Callable[..., PoolProcess],
) -> None:
    pool, expected = pool_process("--memory", "64MiB"), computed(architecture, PROMPTS)
    with running(model(architecture), {"pool": pool.address}) as engine:
        engine.ask(PROMPTS)
        pool.wait_for_blocks(LOADABLE // BLOCK)
    with running(model(architecture), {"pool": pool.address}) as engine:
        assert engine.again(PROMPTS, LOADABLE) == expected


def test_a_pool_node_of_two_processes_by_the_address_of_one(
    llama: Path, computed: Callable[..., list[list[int]]], pool_process: Callable[..., PoolProcess]
) -> None:
    pool, expected = pool_process("--memory", "64MiB", "--processes", "2"), computed("llama", PROMPTS)
    with running(llama, {"pool": pool.address}) as engine:
        engine.ask(PROMPTS)
        pool.wait_for_blocks(LOADABLE // BLOCK)
    with running(llama, {"pool": pool.address}) as engine:
        assert engine.again(PROMPTS, LOADABLE) == expected


def test_stock_scheduler_of_vllm(llama: Path, computed: Callable[..., list[list[int]]]) -> None:
    expected = computed("llama", PROMPTS)
    with running(llama, {"memory": ["64MiB"]}, scheduler=False) as engine:
        engine.ask(PROMPTS)
        assert engine.again(PROMPTS, LOADABLE) == expected


def test_sliding_window_models_keep_their_allocator(model: Callable[[str], Path]) -> None:
    with running(model("sliding"), {"memory": ["64MiB"]}) as engine:
        config = engine.llm.llm_engine.vllm_config
        assert config.scheduler_config.disable_hybrid_kv_cache_manager is False
        core = engine.llm.llm_engine.engine_core.engine_core
        assert len(core.scheduler.kv_cache_config.kv_cache_groups) == 2


def test_a_pool_node_that_restarts_gives_its_hits_again(
    llama: Path, computed: Callable[..., list[list[int]]], pool_process: Callable[..., PoolProcess], tmp_path: Path
) -> None:
    """vLLM goes on all the time: with hits, without while the node is away, with hits again."""
    expected = computed("llama", PROMPTS)
    pool = pool_process("--slab", f"{tmp_path}/kv.slab:64MiB")
    with running(llama, {"pool": pool.address}) as engine:
        engine.ask(PROMPTS)
        pool.wait_for_blocks(LOADABLE // BLOCK)
        assert engine.again(PROMPTS, LOADABLE) == expected
        pool.stop()
        before = engine.counts().external
        assert engine.again(PROMPTS, 0) == expected
        assert engine.counts().external == before
        pool.start()

        def hits() -> bool:
            engine.forget()
            had = engine.counts().external
            assert engine.ask(PROMPTS) == expected
            return engine.counts().external - had >= LOADABLE

        wait_until(hits, "hits from the node that came back")


@pytest.mark.parametrize(
    "other",
    [
        {"dtype": "bfloat16"},
        {"block_size": 64},
        {"hf_overrides": {"rms_norm_eps": 1e-4}},
    ],
    ids=lambda change: "-".join(change),
)
def test_another_type_layout_or_model_is_a_miss(
    other: dict[str, Any], llama: Path, computed: Callable[..., list[list[int]]], pool_process: Callable[..., Any]
) -> None:
    pool, expected = pool_process("--memory", "64MiB"), computed("llama", PROMPTS)
    with running(llama, {"pool": pool.address}, **other) as engine:
        engine.ask(PROMPTS)
        engine.again(PROMPTS, LOADABLE)
    with running(llama, {"pool": pool.address}) as engine:
        assert engine.ask(PROMPTS) == expected
        assert engine.counts().external == 0


def test_tenants_do_not_share(llama: Path, computed: Callable[..., list[list[int]]]) -> None:
    expected = computed("llama", PROMPTS)
    with running(llama, {"memory": ["64MiB"]}) as engine:
        assert engine.ask(PROMPTS, salt="a") == expected
        engine.forget()
        assert engine.ask(PROMPTS, salt="b") == engine.ask(PROMPTS) == expected
        assert engine.counts().external == 0
        assert engine.again(PROMPTS, LOADABLE, salt="a") == expected


def test_a_producer_saves_only_and_a_consumer_loads_only(
    llama: Path, computed: Callable[..., list[list[int]]], pool_process: Callable[..., PoolProcess]
) -> None:
    expected = computed("llama", PROMPTS)
    pool = pool_process("--memory", "64MiB")
    with running(llama, {"pool": pool.address}, role="kv_consumer") as engine:
        assert engine.ask(PROMPTS) == engine.again(PROMPTS, 0) == expected
        assert engine.counts().external == 0 and pool.blocks() == 0
    with running(llama, {"pool": pool.address}, role="kv_producer") as engine:
        assert engine.ask(PROMPTS) == expected
        pool.wait_for_blocks(LOADABLE // BLOCK)
        assert engine.again(PROMPTS, 0) == expected
        assert engine.counts().external == 0
    with running(llama, {"pool": pool.address}, role="kv_consumer") as engine:
        assert engine.again(PROMPTS, LOADABLE) == expected
