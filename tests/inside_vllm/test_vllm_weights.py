"""Weights that are replaced while vLLM runs: KV of the old ones is not loaded, and none is saved under their keys."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.inside_vllm.vllm_rig import BLOCK, PoolProcess, VllmEngine, prompt_of, running

PROMPTS = [prompt_of(seed, BLOCK * 6 + 9) for seed in range(500, 503)]
LOADABLE = 3 * 6 * BLOCK


def train(model: torch.nn.Module, seed: int = 7) -> None:
    """Other weights in place, as a trainer would put them there."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" in name:
                parameter.mul_(1 + 0.8 * torch.randn(parameter.shape, generator=generator))


def update(engine: VllmEngine) -> None:
    engine.llm.apply_model(train)


@pytest.fixture(scope="module")
def trained(llama: Path) -> list[list[int]]:
    """What stock vLLM answers with the new weights."""
    with running(llama, None, enable_prefix_caching=False) as engine:
        update(engine)
        return engine.ask(PROMPTS)


def core_of(engine: VllmEngine) -> Any:
    return engine.llm.llm_engine.engine_core.engine_core


def reset_all(engine: VllmEngine) -> None:
    """What a pause with `clear_cache` and sleep do."""
    core_of(engine)._reset_caches()  # noqa: SLF001 (vLLM's own)


def reset(engine: VllmEngine) -> None:
    assert engine.llm.reset_prefix_cache(reset_connector=True)


@pytest.mark.parametrize(("scheduler", "clear"), [(True, reset_all), (False, reset)])
def test_after_a_reset_nothing_of_the_weights_before_is_loaded(
    llama: Path,
    computed: Callable[..., list[list[int]]],
    trained: list[list[int]],
    clear: Callable[[VllmEngine], None],
    scheduler: bool,
) -> None:
    assert trained != computed("llama", PROMPTS)
    with running(llama, {"memory": ["64MiB"]}, scheduler=scheduler) as engine:
        assert engine.ask(PROMPTS) == computed("llama", PROMPTS)
        assert engine.again(PROMPTS, LOADABLE) == computed("llama", PROMPTS)
        engine.forget()
        update(engine)
        clear(engine)
        before = engine.counts()
        assert engine.ask(PROMPTS) == trained
        assert (engine.counts() - before).external == 0
        assert engine.again(PROMPTS, LOADABLE) == trained, "KV of the new weights is kept as usual"


def test_engines_with_the_weights_before_never_get_kv_of_the_new_ones(
    llama: Path,
    computed: Callable[..., list[list[int]]],
    trained: list[list[int]],
    pool_process: Callable[..., PoolProcess],
) -> None:
    pool = pool_process("--memory", "64MiB")
    with running(llama, {"pool": pool.address}) as engine:
        update(engine)
        reset(engine)
        assert engine.ask(PROMPTS) == trained
        pool.wait_for_blocks(LOADABLE // BLOCK)
    with running(llama, {"pool": pool.address}) as engine:
        assert engine.ask(PROMPTS) == computed("llama", PROMPTS)
        assert engine.again(PROMPTS, LOADABLE) == computed("llama", PROMPTS)
    with running(llama, {"pool": pool.address}) as engine:
        before = engine.counts()
        assert engine.ask(PROMPTS) == computed("llama", PROMPTS)
        assert (engine.counts() - before).external >= LOADABLE, "what was computed with the files' weights is shared"


def test_engines_that_are_told_the_same_version_share_it(
    llama: Path, trained: list[list[int]], pool_process: Callable[..., PoolProcess]
) -> None:
    pool = pool_process("--memory", "64MiB")
    found = []
    for run, version in (("run 7", "1"), ("run 7", "1"), ("run 7", "2"), ("run 8", "1")):
        with running(llama, {"pool": pool.address, "weight_version": run}) as engine:
            update(engine)
            reset(engine)
            engine.llm.update_weight_version(version)
            engine.ask([prompt_of(999, 5)], 1)  # the step that says so
            before = engine.counts()
            assert engine.ask(PROMPTS) == trained
            found.append((engine.counts() - before).external)
            engine.forget()
    assert found == [0, LOADABLE, 0, 0]


def test_a_version_that_changes_without_a_reset_is_noticed(llama: Path, trained: list[list[int]]) -> None:
    """From the results of the step behind it; vLLM's own cache is emptied as soon as no request uses it."""
    with running(llama, {"memory": ["64MiB"]}) as engine:
        engine.ask(PROMPTS)
        update(engine)
        engine.llm.update_weight_version("1")
        engine.ask([prompt_of(999, 5)], 2)
        before = engine.counts()
        assert engine.ask(PROMPTS) == trained
        seen = engine.counts() - before
        assert (seen.local, seen.external) == (0, 0)
        assert engine.again(PROMPTS, LOADABLE) == trained


@pytest.mark.parametrize("preempt", [True, False])
def test_weights_that_change_under_running_requests(llama: Path, trained: list[list[int]], preempt: bool) -> None:
    """With `reset_running_requests` they begin anew. Without it vLLM goes on from KV of both weights: its reset says
    False, and none of that KV gets into the pool."""
    from vllm import SamplingParams

    with running(llama, {"memory": ["64MiB"]}) as engine:
        inner = engine.llm.llm_engine
        sampling = SamplingParams(temperature=0, max_tokens=3 * BLOCK, ignore_eos=True)
        for number, prompt in enumerate(PROMPTS):
            inner.add_request(str(number), {"prompt_token_ids": prompt}, sampling)
        for _ in range(BLOCK):
            inner.step()
        update(engine)
        done = core_of(engine).reset_prefix_cache(preempt, True)
        assert done is preempt
        while inner.has_unfinished_requests():
            inner.step()
        engine.forget()
        assert engine.ask(PROMPTS) == trained, "from the pool, or computed: of the new weights"
        engine.forget()
        before = engine.counts()
        assert engine.ask(PROMPTS) == trained
        assert (engine.counts() - before).external == LOADABLE


def test_a_reset_while_loads_are_under_way_ends_them(
    llama: Path, trained: list[list[int]], pool_process: Callable[..., PoolProcess]
) -> None:
    """vLLM cannot reset its own cache then, and says so; what it computes meanwhile stays out of the pool."""
    from vllm import SamplingParams

    pool = pool_process("--memory", "64MiB", "--pace", "200KB/s")  # a block has 128 KiB
    with running(llama, {"pool": pool.address}) as engine:
        engine.ask(PROMPTS)
        pool.wait_for_blocks(LOADABLE // BLOCK)
        engine.forget()
        inner, side = engine.llm.llm_engine, engine.connector.side
        sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
        for number, prompt in enumerate(PROMPTS):
            inner.add_request(str(number), {"prompt_token_ids": prompt}, sampling)
        while not side.host.ask(lambda scheduler: scheduler.gauges()["granted_blocks"]):
            inner.step()
        update(engine)
        assert core_of(engine).reset_prefix_cache(False, True) is False
        while inner.has_unfinished_requests():
            inner.step()
        engine.forget()  # vLLM's own cache is empty now, and with it the reset is complete
        before = engine.counts()
        assert engine.ask(PROMPTS) == trained
        assert (engine.counts() - before).external == 0
