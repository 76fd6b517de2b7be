"""The example that compares policies runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.slow
def test_policies_can_be_compared_on_a_virtual_clock() -> None:
    ended = subprocess.run(
        [sys.executable, EXAMPLES / "compare_policies.py"], capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 0, ended.stderr
    rows = {line.split()[0]: float(line.split()[-1]) for line in ended.stdout.splitlines()}
    assert rows["feasible"] >= rows["fcfs"]
