"""A checkpoint and the answers that one mixed engine gives to it, for the tests of the cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from penstock.engine.runner import SamplingParams
from penstock.pool.net.node import PoolNode
from penstock.pool.setup.open import open_local_pool
from penstock.testing.tiny_models import build_tiny
from tests.cluster.paths_rig import GREEDY, MIB, mixed


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny("llama", tmp_path_factory.mktemp("cluster") / "llama", seed=5)


@pytest.fixture(scope="session")
def expected(llama: Path) -> Iterator[Callable[..., list[int]]]:
    """Tokens that one mixed engine generates after a prompt; it has a pool of its own."""
    pool = open_local_pool((32 * MIB,), ())
    node = PoolNode(pool, "127.0.0.1", 0)
    known: dict[tuple[tuple[int, ...], SamplingParams], list[int]] = {}
    with mixed(llama, node) as ask:

        def tokens(prompt: list[int], sampling: SamplingParams = GREEDY) -> list[int]:
            key = (tuple(prompt), sampling)
            if key not in known:
                known[key] = ask(prompt, sampling)
            return known[key]

        yield tokens
    node.close(5.0)
    pool.close(5.0)
