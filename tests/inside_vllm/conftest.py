"""Tests of Penstock inside a real vLLM on CPU; they run in the environment of `make test-vllm` and nowhere else."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
if importlib.util.find_spec("vllm") is None:  # one test stays, and says why it is skipped
    collect_ignore = [path.name for path in HERE.glob("test_*.py") if path.name != "test_vllm_environment.py"]
else:  # vLLM takes these from the environment only
    os.environ.update(
        OMP_NUM_THREADS="1",
        VLLM_CPU_OMP_THREADS_BIND="nobind",  # two servers would share the one core that vLLM chooses for each
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_LOGGING_LEVEL="ERROR",
        VLLM_NO_USAGE_STATS="1",
        HF_HUB_OFFLINE="1",
        TOKENIZERS_PARALLELISM="false",
    )


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of tiny random checkpoints, by architecture; each is made once."""
    from tests.inside_vllm.vllm_rig import build_model

    made: dict[str, Path] = {}

    def folder(architecture: str) -> Path:
        if architecture not in made:
            made[architecture] = build_model(architecture, tmp_path_factory.mktemp(architecture))
        return made[architecture]

    return folder


@pytest.fixture(scope="session")
def llama(model: Callable[[str], Path]) -> Path:
    return model("llama")


@pytest.fixture(scope="session")
def computed(model: Callable[[str], Path]) -> Callable[..., list[list[int]]]:
    """What stock vLLM without a connector answers, each prompt computed from its start; asked once per question."""
    from tests.inside_vllm.vllm_rig import running

    known: dict[Any, list[list[int]]] = {}

    def answers(architecture: str, prompts: list[list[int]], new_tokens: int = 12) -> list[list[int]]:
        question = (architecture, tuple(map(tuple, prompts)), new_tokens)
        if question not in known:
            with running(model(architecture), None, enable_prefix_caching=False) as engine:
                known[question] = engine.ask(prompts, new_tokens)
        return known[question]

    return answers


@pytest.fixture
def pool_process() -> Iterator[Callable[..., Any]]:
    """Starts real pool nodes; ends them with the test."""
    from tests.inside_vllm.vllm_rig import PoolProcess

    started: list[PoolProcess] = []

    def start(*arguments: str, listen: str = "127.0.0.1:0") -> PoolProcess:
        started.append(PoolProcess(*arguments, listen=listen))
        return started[-1]

    yield start
    for one in started:
        one.stop()
