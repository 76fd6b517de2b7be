"""The commands a user runs: the demo and a trace replay, as processes of their own, over real HTTP and a real pool."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

TRACES = Path(__file__).resolve().parents[3] / "shared" / "traces"


def _bench(arguments: list[str], timeout_s: float, marker: str = "") -> subprocess.CompletedProcess[str]:
    """Run `python -m ...`; `marker` goes into the environment of every process that comes of it."""
    command = [sys.executable, "-m", *arguments]
    environment = os.environ | {"PENSTOCK_TEST_MARKER": marker}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL, env=environment
    )


def _left_behind(marker: str) -> list[str]:
    """Processes that still run with this marker."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("PENSTOCK_TEST_MARKER") == marker:
                found.append(" ".join(process.cmdline()))
    return found


def _figures(path: Path) -> dict[str, float]:
    record: dict[str, Any] = json.loads(path.read_text())
    assert set(record) >= {"experiment", "figures", "limits", "modelled", "environment", "command"}
    figures: dict[str, float] = record["figures"]
    return figures


@pytest.mark.slow
def test_demo_writes_its_table_page_and_picture(tmp_path: Path) -> None:
    arguments = ["benchmarks", "demo", "--out", str(tmp_path), "--sessions", "6", "--turns", "3", "--pace", "50MB/s"]
    done = _bench(arguments, 200, marker=str(tmp_path))
    assert done.returncode in (0, 3), done.stderr[-2000:]
    assert (done.returncode == 3) is ("measured nothing" in done.stderr)
    figures = _figures(tmp_path / "demo.json")
    assert figures["failed_requests"] == 0
    assert figures["outputs_equal"] == 1.0
    assert figures["penstock_requests"] == figures["coupled_requests"] >= 5
    assert figures["penstock_loaded_gb"] > 0 and figures["penstock_hit_rate"] > 0.3
    for system in ("coupled", "penstock"):
        assert figures[f"{system}_time_fetch_s"] > 0 and figures[f"{system}_time_compute_s"] > 0
        assert system in done.stdout
    assert "TTFT p99" in done.stdout and "SLO attainment" in done.stdout
    assert "</html>" in (tmp_path / "demo.html").read_text()
    assert (tmp_path / "demo.png").stat().st_size > 10_000
    assert not _left_behind(str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize(
    "trace",
    ["claude_code", "mooncake/conversation.jsonl"],
)
def test_recorded_trace_is_served_with_equal_outputs(trace: str, tmp_path: Path) -> None:
    path = TRACES / trace
    if not path.exists():
        pytest.skip(f"no recorded trace beside the checkout: {Path('..') / 'shared' / 'traces' / trace}")
    out = tmp_path / "serve.json"
    arguments = [
        *("penstock", "bench", "serve"),
        "--trace",
        str(path),
        "--json",
        str(out),
        "--plot",
        str(tmp_path / "p.png"),
        *("--minutes", "0.5"),
        *("--token-divisor", "64"),
    ]
    done = _bench(arguments, 280)
    # of half a minute little may be left for loads: then it says so, by its status
    assert done.returncode in (0, 3), done.stdout[-2000:] + done.stderr[-2000:]
    figures = _figures(out)
    least = {"loaded_share": 0.1, "held_over_device_memory": 1.5, "link_share": 0.05}
    loaded = all(figures[name] >= value for name, value in least.items())
    assert loaded is (done.returncode == 0) is ("measured nothing" not in done.stderr)
    assert figures["failed_requests"] == 0
    assert figures["outputs_equal"] == 1.0
    assert figures["penstock_requests"] >= 12
    assert (tmp_path / "p.png").exists()


def test_a_trace_that_cannot_be_read_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"timestamp": 1}\n')
    done = _bench(["penstock", "bench", "serve", "--trace", str(tmp_path / "t.jsonl")], 60)
    assert done.returncode == 2
    assert "line 1: field 'input_length' is missing" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
