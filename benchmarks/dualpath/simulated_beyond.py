"""Beyond DualPath: gains from split reads, level steps, recomputation, ordering and re-planning over its policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.progress import track

from benchmarks.dualpath.simulated_offline import SET_UPS, trajectories
from penstock.report import Report
from penstock.sim.cluster_shape import BASIC, LEVEL, ORACLE, PAPER, RECOMPUTE, SHORT_FIRST, SPLIT, ClusterShape
from penstock.sim.prefill_decode import Fault
from penstock.sim.served_model import load_model
from penstock.sim.serving_run import Bench
from penstock.sim.trajectories import Trajectory, from_trace

STEPS = (
    replace(PAPER, name="weigh only", weigh=True),
    replace(PAPER, name="recompute only", recompute=True),
    replace(PAPER, name="level only", level=True),
    SPLIT,
    LEVEL,
    RECOMPUTE,
    SHORT_FIRST,
)
CAPS = {"64K": 65_536, "128K": 131_072}
NIC_LOST = ("660b", "27b")


def beyond(report: Report, agents: int, trace: Path | None) -> None:
    """Each step's gain over the paper's policy alone, on the paper's workload and on a recorded trace."""
    workloads: dict[str, Sequence[Trajectory]] = {"agents_64K": trajectories("64K")}
    if trace is None:
        report.notes.append("no --trace: recorded sessions are left out")
    else:
        workloads |= {f"trace_{name}": from_trace(trace, cap) for name, cap in CAPS.items()}
    for workload, turns in track(workloads.items(), "beyond", transient=True):
        for name, set_up in SET_UPS.items():
            bench = Bench(set_up.shape, load_model(set_up.model), turns)
            longest = max(max(map(int.__add__, t.prompts, t.answers)) for t in turns)
            ranks = set_up.shape.gpus * set_up.shape.decode_group_nodes
            if not bench.model.fits(set_up.shape.gpu, ranks, longest):
                report.notes.append(f"{workload}: {name} left out, its longest request does not fit its GPU")
                continue
            _gains(report, f"beyond_{workload}_{name}", bench, agents)
            if name in NIC_LOST:
                _nic_lost(report, f"beyond_{workload}_{name}_nic_lost", bench, agents)
        _node_lost(report, f"beyond_{workload}_660b_node_lost", turns, agents)


def _gains(report: Report, label: str, bench: Bench, agents: int) -> None:
    paper = bench.offline(PAPER, agents)
    basic = bench.offline(BASIC, agents)
    report.figure(f"{label}_paper_over_basic", basic.job_s / paper.job_s)
    for system in STEPS:
        run = bench.offline(system, agents)
        word = system.name.replace(" ", "_")
        report.figure(f"{label}_{word}_job_gain", paper.job_s / run.job_s, 1.0)
        report.figure(f"{label}_{word}_ttft_gain", paper.ttft_mean_s / run.ttft_mean_s, 1.0)
    report.figure(f"{label}_oracle_job_gain", paper.job_s / bench.offline(ORACLE, agents).job_s)


def _nic_lost(report: Report, label: str, bench: Bench, agents: int) -> None:
    """A prefill node's storage NIC fails at a third of the job and recovers at two thirds: with re-planning, or
    unnoticed (reads that reach their deadline then start over until they succeed, so that both runs do the same
    work)."""
    bench = replace(bench, settings=replace(bench.settings, inter_engine={"max_attempts": 10**6}))
    for system in (PAPER, SPLIT):
        whole = bench.offline(system, agents).job_s
        faults = [Fault(whole / 3, "nic lost", 0), Fault(2 * whole / 3, "nic healed", 0)]
        replanned = bench.offline(system, agents, faults)
        ignored = bench.offline(replace(system, replan=False), agents, faults)
        word = f"{label}_{system.name}"
        report.figure(f"{word}_job_over_whole", replanned.job_s / whole)
        report.figure(f"{word}_replan_job_gain", ignored.job_s / replanned.job_s, 1.0)
        report.figure(f"{word}_replan_ttft_gain", ignored.ttft_mean_s / replanned.ttft_mean_s, 1.0)
        ended = replanned.record.requests / ignored.record.requests
        report.figure(f"{word}_requests_over_without", ended, 1.0)
        report.figure(f"{word}_restarts", replanned.record.restarts)
        report.figure(f"{word}_restarts_without", ignored.record.restarts)


def _node_lost(report: Report, label: str, turns: Sequence[Trajectory], agents: int) -> None:
    """A decode node of 2P5D in one group is lost halfway through the job: all requests end, at the remaining speed."""
    bench = Bench(ClusterShape(2, 5, 2, 5), load_model("deepseek-660b-like"), turns)
    jobs_s = {}
    for system in (PAPER, SPLIT):
        whole = bench.offline(system, agents)
        lost = bench.offline(system, agents, [Fault(whole.job_s / 2, "node lost", 6)])
        jobs_s[system.name] = lost.job_s
        word = f"{label}_{system.name}"
        report.figure(f"{word}_job_over_whole", lost.job_s / whole.job_s)
        report.figure(f"{word}_restarts", lost.record.restarts)
        report.figure(f"{word}_requests_ended", lost.record.requests / whole.record.requests, 1.0)
    report.figure(f"{label}_job_gain", jobs_s[PAPER.name] / jobs_s[SPLIT.name], 1.0)
