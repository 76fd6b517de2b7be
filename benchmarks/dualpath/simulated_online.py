"""DualPath online: the highest rate of agents within TTFT 4 s and TPOT 50 ms, and each step's gain below it."""

from __future__ import annotations

from rich.progress import track

from benchmarks.dualpath.simulated_offline import SEED, SET_UPS
from penstock.report import Report
from penstock.sim.cluster_shape import BASIC, LEVEL, ORACLE, PAPER, SPLIT, System
from penstock.sim.fluid_bound import fluid_bound
from penstock.sim.serving_run import Bench, Slo, capacity

GAIN_660B, GAIN_27B, GAIN_MEAN = 2.25, 1.67, 1.96
PAPER_GAINS = {"660b": GAIN_660B, "27b": GAIN_27B}
LOW, HIGH = 0.5, 2.0  # range in which capacities are searched, as shares of the fluid bound


def online(report: Report, length: str, arrivals_s: float, steps: int) -> None:
    """Capacity of Basic, the paper's policy, ours (split, level) and Oracle beside the fluid bound of each, with the
    latencies there and at the next tried rate (`_beyond_`); TTFT at half of Basic's capacity.

    Agents are closed loops: beyond the bound they accumulate slowly, so a rate above it is sustained while arrivals
    last.
    """
    slo = Slo()
    gains = []
    for name in track(tuple(PAPER_GAINS), "online", transient=True):
        bench = SET_UPS[name].bench(length)
        found = {}
        for system in (BASIC, PAPER, SPLIT, LEVEL, ORACLE):
            bound = bound_per_s(bench, system)
            cap = found[system.name] = capacity(
                bench, system, slo, low=LOW * bound, high=HIGH * bound, arrivals_s=arrivals_s, seed=SEED, steps=steps
            )
            label = f"online_{name}_{length}_{system.name.replace(' ', '_')}"
            report.figure(f"{label}_agents_per_s", cap.agents_per_s, bound)
            report.figure(f"{label}_ttft_mean_s", cap.ttft_s, slo.ttft_s)
            report.figure(f"{label}_tpot_mean_s", cap.tpot_s, slo.tpot_s)
            report.figure(f"{label}_beyond_ttft_mean_s", cap.beyond_ttft_s, slo.ttft_s)
            report.figure(f"{label}_beyond_tpot_mean_s", cap.beyond_tpot_s, slo.tpot_s)
        base = max(found[BASIC.name].agents_per_s, 1e-9)
        gains.append(found[PAPER.name].agents_per_s / base)
        report.figure(f"online_{name}_{length}_gain_paper", gains[-1], PAPER_GAINS[name])
        for system in (SPLIT, LEVEL):
            gain = found[system.name].agents_per_s / base
            report.figure(f"online_{name}_{length}_gain_{system.name}", gain, PAPER_GAINS[name])
        _below_capacity(report, name, length, base / 2, arrivals_s)
    report.figure(f"online_{length}_gain_mean", sum(gains) / len(gains), GAIN_MEAN)


def bound_per_s(bench: Bench, system: System) -> float:
    """Agents per second that the system's busiest resource can serve permanently, without losses."""
    nics = {"prefill": bench.shape.prefill_nodes, "none": 0}.get(system.read)
    agents = len(bench.trajectories)
    bound = fluid_bound(bench.shape, bench.model, bench.trajectories, agents, storage_nics=nics)
    return agents / max(bound.storage_s, bound.prefill_s, bound.decode_s)


def _below_capacity(report: Report, name: str, length: str, agents_per_s: float, arrivals_s: float) -> None:
    bench = SET_UPS[name].bench(length)
    for system in (BASIC, PAPER, SPLIT, LEVEL, ORACLE):
        run = bench.online(system, agents_per_s, arrivals_s, SEED)
        _, ttft_s, _ = Slo().kept(run.record, arrivals_s)
        report.figure(f"online_{name}_{length}_half_load_{system.name}_ttft_mean_s", ttft_s)
