"""`python -m benchmarks event-loops`: every way receives and asks over real sockets; figures for each."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

WAYS = ("threads", "asyncio", "uvloop")


@pytest.mark.slow
def test_every_way_is_measured(tmp_path: Path) -> None:
    out = tmp_path / "event_loops.json"
    command = [sys.executable, "-m", "benchmarks", "event-loops", "--quick", "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-2000:]
    figures = json.loads(out.read_text())["figures"]
    for way in WAYS:
        assert figures[f"{way}_questions_ms"] > 0 and figures[f"{way}_question_cpu_us"] > 0
        reads = [name for name in figures if name.startswith(f"{way}_read_") and name.endswith("_gb_per_s")]
        assert len(reads) == 8 and all(figures[name] > 0 for name in reads)
    assert {name for name in figures if name.endswith("_over_threads")} == {
        f"{way}_read_{size}_{connections}_over_threads"
        for way in WAYS[1:] for size in ("128k", "4m") for connections in (1, 2, 8, 32)
    }  # fmt: skip
