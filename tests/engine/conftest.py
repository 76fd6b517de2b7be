"""Checkpoints, runners and pools for the engine's tests. Runners are shared: a new engine starts with an empty L1."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from penstock.engine.hf_runner import HFRunner
from penstock.pool.setup.open import open_local_pool
from penstock.testing.tiny_models import ARCHITECTURES, build_tiny
from tests.engine.engine_rig import serving

L1_PAGES = 128


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkpoint of an architecture, built when first asked for."""
    base = tmp_path_factory.mktemp("tiny")
    built: dict[str, Path] = {}

    def folder(architecture: str) -> Path:
        assert architecture in ARCHITECTURES
        if architecture not in built:
            built[architecture] = build_tiny(architecture, base / architecture, seed=5)
        return built[architecture]

    return folder


@pytest.fixture(scope="session")
def runner_of(tiny: Callable[[str], Path]) -> Iterator[Callable[[str], HFRunner]]:
    """A runner of an architecture with pages of 16 tokens, on one thread."""
    runners: dict[str, HFRunner] = {}

    def runner(architecture: str) -> HFRunner:
        if architecture not in runners:
            torch.set_num_threads(1)
            made = HFRunner(str(tiny(architecture)), block_tokens=16, dtype="float32", device="cpu", layerwise=False)
            made.allocate(L1_PAGES)
            runners[architecture] = made
        return runners[architecture]

    yield runner
    for made in runners.values():
        made.close()


@pytest.fixture(scope="session")
def computed(tiny: Callable[[str], Path]) -> Iterator[Callable[..., list[int]]]:
    """Greedy tokens of a prompt computed from nothing, in one chunk, without a pool, by a runner of its own."""
    runners: dict[str, HFRunner] = {}
    known: dict[tuple[str, tuple[int, ...], int], list[int]] = {}

    def tokens(prompt: list[int], new_tokens: int = 6, architecture: str = "llama") -> list[int]:
        if architecture not in runners:
            made = HFRunner(str(tiny(architecture)), block_tokens=16, dtype="float32", device="cpu", layerwise=False)
            made.allocate(64)
            runners[architecture] = made
        key = (architecture, tuple(prompt), new_tokens)
        if key not in known:
            with serving(runners[architecture], None, max_batch_tokens=1024) as rig:
                known[key] = rig.ask(prompt, new_tokens).tokens
        return known[key]

    yield tokens
    for made in runners.values():
        made.close()


@pytest.fixture
def llama(runner_of: Callable[[str], HFRunner]) -> HFRunner:
    return runner_of("llama")


@pytest.fixture
def memory_pool() -> Iterator[object]:
    pool = open_local_pool((32 << 20,), ())
    yield pool
    pool.close(5.0)
