"""Examples run as they are printed, against a real server."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from penstock.bench.processes import serve_process
from penstock.testing.tiny_models import build_tiny

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.mark.slow
def test_agent_session_reuses_its_context(tmp_path: Path) -> None:
    model = build_tiny("llama", tmp_path / "model")
    with serve_process(str(model), "--host", "127.0.0.1", "--port", "0", "--block-tokens", "16") as server:
        command = [sys.executable, str(EXAMPLES / "agent_session.py"), server.address]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 3
    prompts, cached = [int(line[0]) for line in lines], [int(line[3]) for line in lines]
    assert prompts == sorted(prompts) and prompts[0] > 100
    assert cached[0] == 0 and cached[1] > 0.7 * prompts[0] and cached[2] >= cached[1]
