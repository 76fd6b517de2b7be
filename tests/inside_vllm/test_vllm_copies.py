"""Copies between vLLM's pages and the pool when something fails in the middle of them: no output changes, nothing wrong
is saved, and vLLM goes on."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from penstock.vllm.flags import connector_config
from penstock.vllm.link import Link, Message, Upload
from penstock.vllm.losses import LOSSES
from penstock.vllm.metrics import COUNTER_HELP
from tests.inside_vllm.vllm_rig import (
    BLOCK,
    KV_BYTES,
    MAX_TOKENS,
    MIB,
    VLLM_BLOCK,
    PoolProcess,
    prompt_of,
    running,
    wait_until,
)

PROMPTS = [prompt_of(seed, BLOCK * 5 + 9) for seed in range(700, 703)]


def counted(engine: Any, name: str) -> int:
    return int(engine.connector.side.host.ask(lambda scheduler: scheduler.counters.get(name, 0)))


def test_vllm_goes_on_when_a_workers_link_thread_fails_in_the_middle_of_a_load(
    llama: Path, computed: Callable[..., list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is told when the link is gone goes with a step; before that nothing of the load is believed."""
    expected = computed("llama", PROMPTS)
    with running(llama, {"memory": ["64MiB"]}) as engine:
        assert engine.ask(PROMPTS) == expected
        engine.forget()
        receive, uploads = Link.receive, []

        def defect(link: Link, timeout_s: float | None = None) -> Message:
            message = receive(link, timeout_s)
            if isinstance(message, Upload):
                uploads.append(message)
                if len(uploads) == 2:
                    raise RuntimeError("a defect")
            return message

        monkeypatch.setattr(Link, "receive", defect)
        assert engine.ask(PROMPTS) == expected
        assert len(uploads) == 2 and engine.connector.side.host.fatal is not None
        engine.forget()
        assert engine.ask(PROMPTS) == expected


def test_blocks_of_a_step_that_raised_are_not_saved(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(llama, {"memory": ["64MiB"]}) as engine:
        executor = engine.llm.llm_engine.engine_core.engine_core.model_executor
        runner = executor.driver_worker.worker.model_runner

        def fails(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("out of memory (injected)")

        monkeypatch.setattr(runner, "_model_forward", fails)
        with pytest.raises(RuntimeError, match="injected"):
            engine.ask(PROMPTS[:1])
        wait_until(lambda: counted(engine, "saves_failed") + counted(engine, "saved_blocks") == 5, "all saves ended")
        assert counted(engine, "saved_blocks") == 0


def test_a_reset_does_not_wait_for_a_pool_that_hangs(llama: Path, pool_process: Callable[..., PoolProcess]) -> None:
    pool = pool_process("--memory", "64MiB")
    extra = {"pool": pool.address, "save_timeout_s": 600.0, "lookup_timeout_s": 0.5, "fetch_window": "1B"}
    with running(llama, extra, kv_cache_memory_bytes=16 * MIB) as engine:
        pool.send(signal.SIGSTOP)
        try:
            engine.ask([prompt_of(710, 20 * BLOCK + 1)], 1)
            assert engine.llm.reset_prefix_cache(), "what has not begun to be saved gives way"
            assert counted(engine, "saves_dropped") > 0
        finally:
            pool.send(signal.SIGCONT)


def test_an_outer_connector_that_only_produces_is_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With several steps at a time vLLM would give loads blocks that a step still writes."""
    from vllm import LLM
    from vllm.config import KVTransferConfig, VllmConfig
    from vllm.distributed.kv_transfer.kv_transfer_state import ensure_kv_transfer_shutdown
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    inner = connector_config({"memory": ["64MiB"], "staging": "64MiB"}) | {"kv_role": "kv_both"}

    def start(role: str) -> None:
        outer = KVTransferConfig(
            kv_connector="MultiConnector",
            kv_role=role,
            kv_load_failure_policy="recompute",
            kv_connector_extra_config={"connectors": [inner]},
        )
        LLM(
            model=str(llama),
            dtype="float32",
            block_size=VLLM_BLOCK,
            kv_cache_memory_bytes=KV_BYTES,
            max_model_len=MAX_TOKENS,
            enforce_eager=True,
            kv_transfer_config=outer,
        )

    monkeypatch.setattr(VllmConfig, "max_concurrent_batches", property(lambda config: 2))
    with pytest.raises(Exception, match=r"kv_producer.*allowed: kv_role 'kv_both'"):
        start("kv_producer")
    ensure_kv_transfer_shutdown()
    cleanup_dist_env_and_memory()


def test_every_loss_has_a_metric() -> None:
    assert set(LOSSES) | {"given_up"} <= set(COUNTER_HELP)
