"""DualPath online: the highest rate of agents within TTFT 4 s and TPOT 50 ms, and what each step gives below it."""

from __future__ import annotations

from rich.progress import track

from penstock.bench.report import Report
from penstock.sim.cluster_shape import BASIC, LEVEL, ORACLE, PAPER, SPLIT
from penstock.sim.experiments.dualpath_offline import SEED, SET_UPS
from penstock.sim.serving_run import Slo, capacity

GAIN_660B, GAIN_27B, GAIN_MEAN = 2.25, 1.67, 1.96
PAPER_GAINS = {"660b": GAIN_660B, "27b": GAIN_27B}
RANGES = {"660b": (0.2, 3.2), "27b": (0.2, 3.2)}  # agents per second


def online(report: Report, length: str, arrivals_s: float, steps: int) -> None:
    """Capacity of Basic, the paper's policy, ours (split, level) and Oracle; TTFT at half of Basic's capacity."""
    slo = Slo()
    gains = []
    for name in track(tuple(PAPER_GAINS), "online", transient=True):
        bench = SET_UPS[name].bench(length)
        low, high = RANGES[name]
        found = {}
        for system in (BASIC, PAPER, SPLIT, LEVEL, ORACLE):
            cap = found[system.name] = capacity(
                bench, system, slo, low=low, high=high, arrivals_s=arrivals_s, seed=SEED, steps=steps
            )
            label = f"online_{name}_{length}_{system.name.replace(' ', '_')}"
            report.figure(f"{label}_agents_per_s", cap.agents_per_s)
            report.figure(f"{label}_ttft_mean_s", cap.ttft_s, slo.ttft_s)
            report.figure(f"{label}_tpot_mean_s", cap.tpot_s, slo.tpot_s)
        base = max(found[BASIC.name].agents_per_s, 1e-9)
        gains.append(found[PAPER.name].agents_per_s / base)
        report.figure(f"online_{name}_{length}_gain_paper", gains[-1], PAPER_GAINS[name])
        for system in (SPLIT, LEVEL):
            gain = found[system.name].agents_per_s / base
            report.figure(f"online_{name}_{length}_gain_{system.name}", gain, PAPER_GAINS[name])
        _below_capacity(report, name, length, base / 2, arrivals_s)
    report.figure(f"online_{length}_gain_mean", sum(gains) / len(gains), GAIN_MEAN)


def _below_capacity(report: Report, name: str, length: str, agents_per_s: float, arrivals_s: float) -> None:
    bench = SET_UPS[name].bench(length)
    for system in (BASIC, PAPER, SPLIT, LEVEL, ORACLE):
        run = bench.online(system, agents_per_s, arrivals_s, SEED)
        _, ttft_s, _ = Slo().kept(run.record, arrivals_s)
        report.figure(f"online_{name}_{length}_half_load_{system.name}_ttft_mean_s", ttft_s)
