"""What `python -m benchmarks pool --record` writes, simulated: a paced live run is never faster than its own ideal."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from benchmarks.__main__ import app
from penstock.io.ring import probe
from penstock.sim.commands.validate import predicted_ttfts_s
from penstock.workloads.recording import read_runs


@pytest.mark.slow
def test_every_system_of_the_pool_is_recorded_and_no_faster_than_ideal(tmp_path: Path) -> None:
    reason = probe()
    if reason:
        pytest.skip(reason)
    recording = tmp_path / "pool.rec"
    options = ["--part", "ttft", "--part", "ablation", "--model", "gpt_oss", "--context", "16k", "--time-factor", "1"]
    done = CliRunner().invoke(app, ["pool", "--path", str(tmp_path), "--quick", *options, "--record", str(recording)])
    assert done.exit_code == 0, done.output
    runs = read_runs(recording)
    systems = {run.label.split()[2].rstrip(",") for run in runs}
    assert {"ours", "pooling_alone", "passthrough_alone", "serial", "layerwise", "async"} <= systems
    assert {run.config["mode"] for run in runs} == {"penstock", "coupled"}
    for run in runs:
        assert min(run.profile.lookup_s, run.profile.fetch_overhead_s, run.profile.compute_overhead_s) >= 0
        ideal = msgspec.structs.replace(run.profile, lookup_s=0.0, fetch_overhead_s=0.0, compute_overhead_s=0.0)
        (ttft_s,) = predicted_ttfts_s(msgspec.structs.replace(run, profile=ideal))
        assert 0 < ttft_s <= 1.01 * run.requests[0].ttft_s, run.label
