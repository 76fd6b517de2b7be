"""The modelled runner: bytes are real, times are the profile's, and the engine cannot tell it from a model."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.core.config import ConfigError
from penstock.engine.api import GenerationRequest
from penstock.engine.build import build_engine
from penstock.engine.config import EngineConfig
from penstock.engine.modelled_runner import ModelledRunner
from penstock.engine.profile import load_profile
from penstock.engine.runner import Chunk, SamplingParams
from penstock.pacing import Pacer
from penstock.pool.api import Pool
from penstock.pool.setup.open import open_local_pool
from tests.asking import Answer, prompt_of
from tests.engine.engine_rig import WatchedPool, serving

GREEDY = SamplingParams(temperature=0.0)
_sleep = time.sleep
BLOCK = 64


def runner_at(divisor: int = 256, time_factor: float = 1.0, pages: int = 32) -> ModelledRunner:
    made = ModelledRunner(load_profile("h100-llama-3.1-8b").scaled(divisor, time_factor), BLOCK)
    made.allocate(pages)
    return made


@pytest.fixture
def runner() -> Iterator[ModelledRunner]:
    made = runner_at()
    yield made
    made.close()


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that this thread asked of `time.sleep`: what a modelled time adds, on a machine however slow."""
    asked: list[float] = []
    here = threading.get_ident()

    def sleep(seconds: float) -> None:
        if threading.get_ident() == here:
            asked.append(seconds)
        _sleep(seconds)

    monkeypatch.setattr(time, "sleep", sleep)
    return asked


def pattern(seed: int, size: int) -> memoryview:
    return memoryview(bytearray((seed * 31 + i * 7) % 256 for i in range(size)))


def test_bytes_go_up_and_come_down(runner: ModelledRunner) -> None:
    size = runner.layout.full_block_bytes
    assert size == BLOCK * 131072 // 256
    blocks = [(pattern(i, size), page) for i, page in enumerate((5, 0, 31))]
    runner.upload(runner.start_upload(blocks))
    for block, page in blocks:
        into = memoryview(bytearray(size))
        runner.download(page, into)
        assert into == block


def test_a_batch_takes_what_the_profile_says(slept: list[float]) -> None:
    runner = runner_at(time_factor=4.0)
    batch = [Chunk("r", [7] * 200, 1000, [0] * 20, GREEDY), Chunk("s", [8], 500, [0] * 9)]
    expected_s = runner.profile.compute_cost().seconds([(200, 1000), (1, 500)])
    started_s = time.monotonic()
    sampled = runner.run(batch)
    took_s = time.monotonic() - started_s
    assert expected_s > 0.05
    assert took_s >= expected_s >= sum(slept)
    assert isinstance(sampled[0], int) and 0 <= sampled[0] < runner.vocab_size and sampled[1] is None


def test_tokens_depend_on_position_and_text_only(runner: ModelledRunner) -> None:
    whole = runner.run([Chunk("a", [7, 8, 9], 0, [0], GREEDY)])
    assert whole == runner.run([Chunk("b", [9], 2, [3], GREEDY)])
    assert whole != runner.run([Chunk("a", [9], 3, [0], GREEDY)])


def test_uploads_take_turns_on_the_link(slept: list[float]) -> None:
    runner = runner_at(divisor=256, time_factor=400.0)
    size = runner.layout.full_block_bytes
    expected_s = 6 * size / runner.profile.upload_bytes_per_s
    started_s = time.monotonic()
    for page in (0, 2, 4):
        runner.upload(runner.start_upload([(pattern(page, size), page), (pattern(page, size), page + 1)]))
    took_s = time.monotonic() - started_s
    assert expected_s > 0.1
    assert took_s >= expected_s >= sum(slept)


def test_a_modelled_link_does_not_add_up_lateness(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [100.0]

    def oversleep(seconds: float) -> None:
        now_s[0] += seconds + 0.01

    monkeypatch.setattr(time, "monotonic", lambda: now_s[0])
    monkeypatch.setattr(time, "sleep", oversleep)
    clock = Pacer(1e6, credit_s=math.inf)
    for _ in range(50):
        clock.wait(1000, 100.0)  # all of them were asked for at the beginning
    assert 0.05 <= now_s[0] - 100.0 < 0.05 + 0.011, "late by one sleep, not by fifty"


@pytest.mark.parametrize("mode", ["penstock", "coupled"])
def test_the_engine_loads_real_bytes_with_modelled_compute(mode: str) -> None:
    runner = runner_at(pages=40)
    pool: Pool = open_local_pool((32 << 20,), ())
    prompt = prompt_of(1, 8 * BLOCK + 9)
    with serving(runner, None, l1_pages=40, max_batch_tokens=2048) as rig:
        expected = rig.ask(prompt).tokens
    for loaded in (0, 8):
        watched = WatchedPool(pool)
        with serving(runner, watched, l1_pages=40, max_batch_tokens=2048, mode=mode) as rig:
            answer = rig.ask(prompt)
            assert answer.tokens == expected
            assert answer.report.loaded_bytes == loaded * runner.layout.full_block_bytes
            assert sum(watched.reads.values()) == loaded
            assert answer.report.measured_compute_s >= runner.profile.a_s
    pool.close(5.0)


def test_built_from_a_configuration(tmp_path: Path) -> None:
    config = EngineConfig(
        executor="modelled", bytes_divisor=1024, memory=(8 << 20,), kv_memory_bytes=1 << 20, staging_bytes=1 << 20
    )
    built = build_engine(config)
    try:
        answer = Answer()
        built.engine.submit(GenerationRequest("r", prompt_of(1, 200), SamplingParams(max_tokens=3)), answer)
        assert answer.wait().finish_reason == "length" and len(answer.tokens) == 3
        report = answer.report
        assert report.predicted_compute_s == pytest.approx(
            load_profile(config.profile).compute_cost().seconds([(200, 0)])
        )
    finally:
        built.close()
    with pytest.raises(ConfigError, match="bytes_divisor is 3"):
        build_engine(EngineConfig(executor="modelled", bytes_divisor=3))
    with pytest.raises(ConfigError, match="profile is 'none'"):
        build_engine(EngineConfig(executor="modelled", profile="none"))
