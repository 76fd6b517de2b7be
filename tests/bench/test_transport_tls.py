"""`penstock bench transport --tls`: what each way of proof costs, in one run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from penstock.cli import app


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("openssl") is None, reason="there is no openssl command")
def test_the_costs_of_plain_secret_and_tls_are_measured_together(tmp_path: Path) -> None:
    out = tmp_path / "transport.json"
    words = ["bench", "transport", "--tls", "--repeats", "1", "--run-mib", "64", "--json", str(out)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    figures = json.loads(out.read_text())["figures"]
    costs = {"tcp": 0.0, "secret": 0.0, "tls": 0.0}
    for who in costs:
        for load in ("128k", "2m", "4m", "4m_2conn"):
            assert figures[f"{who}_read_{load}_gb_per_s"] > 0
            costs[who] += sum(figures[f"{who}_read_{load}_{side}_cpu_s_per_gb"] for side in ("client", "node"))
    assert costs["tls"] > costs["tcp"] > 0 < costs["secret"], "what is encrypted costs more"
