"""The environment of `make test-clients` is the one its requirements name."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest

pytest.importorskip(
    "litellm", reason="the clients are not in this environment; make test-clients makes one that has them"
)


def test_the_tested_versions_are_installed() -> None:
    lines = (Path(__file__).parent / "requirements.txt").read_text().splitlines()
    pins = [line.partition(" ")[0].split("==") for line in lines if "==" in line and not line.startswith(" ")]
    assert len(pins) > 50
    assert not [f"{name} {version(name)}, not {wanted}" for name, wanted in pins if version(name) != wanted]
