"""The commands of `penstock sim`, and the simulated experiments, at their smallest size: figures that must come out
right, files, refusals."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.__main__ import app as benchmarks
from benchmarks.calvo import simulated as calvo
from benchmarks.pooling import simulated_ttft as pooling
from benchmarks.pooling.rig import MODELS
from penstock.cli import app
from penstock.core.config import SchedulerConfig
from penstock.report import Report
from penstock.sim.commands import cost
from penstock.sim.commands.validate import predicted_ttfts_s
from penstock.workloads.recording import RecordedProfile, RecordedRequest, RecordedRun, write_runs

PROFILE = RecordedProfile(
    [("memory:0", "net"), ("ssd:0", "net")], {"memory:0": 4e8, "ssd:0": 1e8, "net": 3e8}, 5e8, (2e-3, 1e-5, 3e-10),
    1e-3, 5e-4, 1e-3,
)  # fmt: skip


def recorded_run(mode: str, factor: float) -> RecordedRun:
    """A run whose measured TTFTs are a simulation's own, times `factor`."""
    config = SchedulerConfig(64, 1 << 20, l1_pages=2000, l2_slots=500, mode=mode, policy="lstf")  # type: ignore[arg-type]
    rows = [
        RecordedRequest(0.05 * i, 64 * (20 + 7 * i % 90) + 9, [i % 2] * (20 + 7 * i % 90), 1.0 + i % 3, 0.0)
        for i in range(30)
    ]
    run = RecordedRun(mode, asdict(config), PROFILE, rows)
    measured = predicted_ttfts_s(run)
    rows = [
        RecordedRequest(r.start_s, r.prompt_tokens, r.held, r.slo_s, ttft * factor)
        for r, ttft in zip(rows, measured, strict=True)
    ]
    return RecordedRun(mode, asdict(config), PROFILE, rows)


def test_validate_gives_the_error_of_each_mode(tmp_path: Path) -> None:
    recording, figures = tmp_path / "live.json", tmp_path / "figures.json"
    write_runs(recording, [recorded_run("penstock", 1.0), recorded_run("coupled", 1.25)])
    done = CliRunner().invoke(app, ["sim", "validate", str(recording), "--json", str(figures)])
    assert done.exit_code == 0, done.output
    found = json.loads(figures.read_text())["figures"]
    assert found["live_penstock_requests"] == found["live_coupled_requests"] == 30
    assert found["live_penstock_error_p99"] == pytest.approx(0.0, abs=1e-9)
    assert found["live_coupled_error_median"] == pytest.approx(0.2) == found["live_coupled_error_p99"]


def test_a_file_that_is_no_recording_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('[{"label": 1}]')
    done = CliRunner().invoke(app, ["sim", "validate", str(path)])
    assert done.exit_code == 2 and done.output.count("\n") == 1 and "label" in done.output


@pytest.mark.slow
def test_calvo_penstock_beats_the_coupled_baseline_and_never_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    everything = calvo.jobs_of
    monkeypatch.setattr(calvo, "jobs_of", lambda *arguments: everything(*arguments)[:50])
    dataset = calvo.Dataset(calvo.Machine("llama", calvo.FETCH_BYTES_PER_S), "code", 0)
    cells = {policy: calvo.Cell() for policy in (calvo.COUPLED, "sjf", "feasible")}
    for policy, cell in cells.items():
        dataset.run(policy, dataset.capacity_per_s, cell)
    base = cells[calvo.COUPLED]
    assert cells["feasible"].attainment / base.attainment >= 2.0
    assert cells["sjf"].ttft_s < 0.25 * base.ttft_s
    assert all(cell.over_bound >= 1.0 for cell in cells.values())


def test_shortest_remaining_first_is_exact() -> None:
    """1 s of 4 is served, then the short one goes first."""
    assert calvo.shortest_remaining_first([0.0, 1.0, 1.5], [4.0, 1.0, 2.0]) == pytest.approx([7.0, 2.0, 4.0])


def test_pool_ours_is_close_to_its_bound_and_beats_every_baseline() -> None:
    report = Report("sim pool")
    pooling.tables(report, ["llama"], ["16k"])
    figures, limits = report.figures, report.limits
    assert 1.0 <= figures["llama_16k_blocked_s"] / limits["llama_16k_blocked_s"] < 1.3
    gains = [value for name, value in figures.items() if "_ttft_gain_" in name]
    assert len(gains) >= 5 and min(gains) > 1.0 and "llama" in MODELS


@pytest.mark.parametrize("policy", ["feasible", "srpt"])
def test_a_decision_costs_little_with_many_waiting(policy: str) -> None:
    """A coarse limit: the figures are those of `penstock sim cost`, alone on the machine."""
    seconds, event_s = cost.decisions_s(policy, 200)  # type: ignore[arg-type]
    assert len(seconds) >= 100 and sum(seconds) / len(seconds) < 2e-3 and event_s < 5e-3


@pytest.mark.slow
def test_an_event_costs_no_more_with_ten_times_the_blocks_and_ten_times_the_requests() -> None:
    """Counted work, not time: in the engine's scheduler and in that inside vLLM."""
    report = Report("sim cost")
    cost.long_prompts(report, 2000, 500)
    growth = {name: value for name, value in report.figures.items() if name.endswith("_growth")}
    assert len(growth) == 4 and set(growth) <= set(report.limits)
    assert all(value <= report.limits[name] for name, value in growth.items()), growth


def test_counted_work_follows_what_is_done() -> None:
    few = cost.bytecodes(lambda: [number + 1 for number in range(100)])
    many = cost.bytecodes(lambda: [number + 1 for number in range(1000)])
    assert few > 100 and 9 < many / few < 11


def test_plan_shows_a_frontier_that_keeps_the_slo(tmp_path: Path) -> None:
    figures = tmp_path / "plan.json"
    options = ["--rate", "0.3", "--length", "32K", "--gbit", "400", "--nodes-max", "3", "--arrivals-s", "60"]
    done = CliRunner().invoke(app, ["sim", "plan", "--model", "qwen2.5-32b", *options, "--json", str(figures)])
    assert done.exit_code == 0, done.output
    report = json.loads(figures.read_text())
    ttfts = {name: value for name, value in report["figures"].items() if name.endswith("_ttft_mean_s")}
    assert ttfts and all(value <= report["limits"][name] for name, value in ttfts.items())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["benchmarks", "sim-calvo", "--dataset", "x"], "loogle"),
        (["benchmarks", "sim-pool", "--model", "x"], "llama"),
        (["sim", "cost", "--policy", "x"], "fcfs"),
        (["benchmarks", "sim-tables", "--paper", "x"], "dualpath"),
        (["sim", "plan", "--model", "x"], "qwen2.5-32b"),
    ],
)
def test_wrong_choices_are_refused_with_what_is_allowed(options: list[str], says: str) -> None:
    done = CliRunner().invoke(benchmarks if options[0] == "benchmarks" else app, options[options[0] == "benchmarks" :])
    assert done.exit_code == 2 and says in done.output
