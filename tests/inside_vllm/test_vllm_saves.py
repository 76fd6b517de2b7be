"""What reaches the pool: every full block once, as long as vLLM has room to keep it; and what a key stands for."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.inside_vllm.vllm_rig import BLOCK, MIB, PoolProcess, VllmEngine, prompt_of, running

PROMPTS = [prompt_of(seed, BLOCK * 5 + 9) for seed in range(400, 403)]
BLOCKS = 3 * 5


def counted(engine: VllmEngine, name: str) -> int:
    return int(engine.connector.side.host.ask(lambda scheduler: scheduler.counters.get(name, 0)))


def test_a_block_is_written_once(
    llama: Path, computed: Callable[..., list[list[int]]], pool_process: Callable[..., PoolProcess]
) -> None:
    """Asked again with the prefix in vLLM, with the prefix from the pool, and by a vLLM that knows of nothing."""
    expected = computed("llama", PROMPTS)
    pool = pool_process("--memory", "64MiB")
    for already in (0, BLOCKS):
        with running(llama, {"pool": pool.address}) as engine:
            for _ in range(2):
                assert engine.ask(PROMPTS) == expected
            pool.wait_for_blocks(BLOCKS)
            assert engine.again(PROMPTS, BLOCKS * BLOCK) == engine.ask(PROMPTS) == expected
            assert counted(engine, "saved_blocks") == BLOCKS - already
    assert pool.blocks() == BLOCKS


def test_no_block_is_left_out_over_a_slow_link(llama: Path, pool_process: Callable[..., PoolProcess]) -> None:
    """Prompts computed much faster than they are written: blocks keep their place in vLLM until their turn."""
    pool = pool_process("--memory", "64MiB", "--pace", "4MB/s")
    with running(llama, {"pool": pool.address}, kv_cache_memory_bytes=16 * MIB) as engine:
        for seed in range(410, 414):
            engine.ask([prompt_of(seed, 20 * BLOCK + 1)])
        pool.wait_for_blocks(80)
        assert counted(engine, "saves_dropped") == 0


def test_an_engine_that_is_closed_in_good_order_says_nothing(
    llama: Path, computed: Callable[..., list[list[int]]], caplog: pytest.LogCaptureFixture
) -> None:
    """Nor while it works."""
    expected = computed("llama", PROMPTS)
    with caplog.at_level(logging.WARNING), running(llama, {"memory": ["64MiB"]}) as engine:
        assert engine.ask(PROMPTS) == expected
        assert engine.again(PROMPTS, BLOCKS * BLOCK) == expected
    assert not [record.getMessage() for record in caplog.records if "penstock" in record.name]


def test_the_scheduler_fits_vllms_way_to_schedule(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM on CPU has no asynchronous scheduling, so that the class for it is made but not run here."""
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    from penstock.vllm.scheduler import PenstockScheduler, PenstockSyncScheduler

    with running(llama, {"memory": ["64MiB"]}, async_scheduling=True) as engine:
        config = engine.llm.llm_engine.vllm_config
        if not config.scheduler_config.async_scheduling:
            assert type(engine.llm.llm_engine.engine_core.engine_core.scheduler) is PenstockSyncScheduler
        monkeypatch.setattr(config.scheduler_config, "async_scheduling", True)
        ahead = PenstockScheduler.__new__(PenstockScheduler, vllm_config=config)
        assert isinstance(ahead, AsyncScheduler) and type(ahead) is PenstockScheduler


def test_vllm_goes_on_when_penstock_fails_in_the_middle_of_loads(
    llama: Path, computed: Callable[..., list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = computed("llama", PROMPTS)
    with running(llama, {"memory": ["64MiB"]}) as engine:
        assert engine.ask(PROMPTS) == expected
        engine.forget()
        host = engine.connector.side.host
        decide, begun = host.scheduler.decide, []

        def fails_later(now: float) -> Any:
            if host.scheduler.gauges()["granted_blocks"]:
                begun.append(now)
                if len(begun) > 2:
                    raise RuntimeError("a defect")
            return decide(now)

        monkeypatch.setattr(host.scheduler, "decide", fails_later)
        assert engine.ask(PROMPTS) == expected
        assert host.fatal is not None and "a defect" in host.fatal
        engine.forget()
        assert engine.ask(PROMPTS) == expected


def test_parallelism_types_and_weights_are_part_of_a_key(llama: Path) -> None:
    """What every block's key begins with, of a real engine's configuration and of ones that differ in one thing."""
    from penstock.vllm import compat

    with running(llama, {"memory": ["64MiB"]}) as engine:
        config = engine.llm.llm_engine.vllm_config
        kv_cache = engine.llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config
        layouts = engine.connector.side.host.layout

        def identity(model_id: str = "", **changes: Any) -> str:
            changed = copy.copy(config)
            changed.parallel_config = copy.copy(config.parallel_config)
            changed.cache_config = copy.copy(config.cache_config)
            for name, value in changes.items():
                part = changed.parallel_config if name.endswith("_size") else changed.cache_config
                object.__setattr__(part, name, value)
            return compat.model_identity(changed, kv_cache, layouts, model_id)

        known = [
            identity(),
            identity(tensor_parallel_size=2),
            identity(pipeline_parallel_size=2),
            identity(cache_dtype="fp8"),
            identity("other weights"),
            compat.model_identity(config, kv_cache, [*layouts, *layouts], ""),
        ]
        assert len(set(known)) == len(known) and identity() == known[0]
