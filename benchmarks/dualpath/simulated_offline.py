"""DualPath offline: job time of each system over agents and context lengths, the ablation, and ratios of P to D."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from rich.progress import track

from penstock.core.cluster.bounds import link_use
from penstock.report import Report
from penstock.sim.cluster_shape import ABLATION, BASIC, LEVEL, ORACLE, PAPER, SHORT_FIRST, SPLIT, ClusterShape
from penstock.sim.fluid_bound import fluid_bound
from penstock.sim.served_model import load_model
from penstock.sim.serving_run import Bench, Outcome
from penstock.sim.trajectories import Trajectory, from_table

GAIN_660B, GAIN_27B, GAIN_GOAL = 1.87, 1.78, 2.0
SNIC_BALANCE, ATTENTION_BALANCE = 1.18, 1.06
ABLATION_CUTS = {"layerwise": 0.1721, "dual path": 0.3819, "scheduler": 0.4562}
SEED = 0


@dataclass(frozen=True, slots=True)
class SetUp:
    """One model on the paper's cluster for it."""

    model: str
    shape: ClusterShape
    paper_gain: float | None

    def bench(self, length: str) -> Bench:
        """The cluster with agents of this context length."""
        return Bench(self.shape, load_model(self.model), trajectories(length))


SET_UPS = {
    "660b": SetUp("deepseek-660b-like", ClusterShape(2, 4, 2, 4), GAIN_660B),
    "27b": SetUp("moe-27b-like", ClusterShape(1, 1), GAIN_27B),
    "qwen32b": SetUp("qwen2.5-32b", ClusterShape(1, 2), None),
}


@cache
def trajectories(length: str) -> Sequence[Trajectory]:
    """The 500 trajectories of a row of the paper's table."""
    return from_table(length, SEED)


def offline(report: Report, names: Sequence[str], lengths: Sequence[str], agents: Sequence[int]) -> None:
    """Job time of Basic, the paper's policy, ours and Oracle: gain over Basic, ratios to Oracle and to the fluid
    bound."""
    cells = [(name, length, count) for name in names for length in lengths for count in agents]
    best: dict[str, float] = {}
    for name, length, count in track(cells, "offline", transient=True):
        set_up = SET_UPS[name]
        bench = set_up.bench(length)
        label = f"offline_{name}_{set_up.shape.name}_{length}_{count}"
        runs = {s.name: bench.offline(s, count) for s in (BASIC, PAPER, SPLIT, LEVEL, SHORT_FIRST, ORACLE)}
        bound = fluid_bound(set_up.shape, bench.model, bench.trajectories, count, storage_nics=None)
        for system, run in runs.items():
            _latencies(report, f"{label}_{_word(system)}", run)
        ours = min(runs[s.name].job_s for s in (SPLIT, LEVEL, SHORT_FIRST))
        gains = {"paper": runs[BASIC.name].job_s / runs[PAPER.name].job_s, "ours": runs[BASIC.name].job_s / ours}
        for which, gain in gains.items():
            report.figure(f"{label}_gain_{which}", gain, set_up.paper_gain if which == "paper" else GAIN_GOAL)
            best[f"{name}_{which}"] = max(best.get(f"{name}_{which}", 0.0), gain)
        report.figure(f"{label}_over_oracle", ours / runs[ORACLE.name].job_s, 1.05)
        report.figure(f"{label}_over_fluid_bound", ours / bound.seconds, 1.05)
        report.figure(f"{label}_fluid_bound_s", bound.seconds)
    for key, gain in best.items():
        report.figure(f"offline_{key}_gain_max", gain, SET_UPS[key.split("_")[0]].paper_gain)


def _word(system: str) -> str:
    return system.replace(" ", "_")


def _latencies(report: Report, label: str, run: Outcome) -> None:
    report.figure(f"{label}_job_s", run.job_s)
    report.figure(f"{label}_tokens_per_s", run.tokens_per_s)
    report.figure(f"{label}_ttft_mean_s", run.ttft_mean_s)


def ablation(report: Report, agents: int) -> None:
    """Each step on 2P4D, 660B-like, 64K: job time against Basic, and the balance of storage NICs and attention."""
    bench = SET_UPS["660b"].bench("64K")
    base = 0.0
    for system in track((*ABLATION, ORACLE), "ablation", transient=True):
        run = bench.offline(system, agents)
        base = base or run.job_s
        label = f"ablation_{_word(system.name)}"
        report.figure(f"{label}_job_s", run.job_s)
        report.figure(f"{label}_cut", 1 - run.job_s / base, ABLATION_CUTS.get(system.name))
        reads_on_both = system.read not in ("prefill", "none")
        if reads_on_both:
            report.figure(f"{label}_snic_max_avg", run.balance.storage_max_avg, SNIC_BALANCE)
        report.figure(f"{label}_attention_max_avg", run.balance.attention_max_avg, ATTENTION_BALANCE)
        report.figure(f"{label}_storage_use", run.balance.storage_use)


RATIOS = ((1, 1), (2, 1), (1, 2), (2, 2), (1, 3), (3, 1))


def ratios(report: Report, agents: int) -> None:
    """P/D on the 27B-like model at 64K: gain over Basic, and whether equal usable storage NICs perform equally."""
    model = load_model("moe-27b-like")
    times: dict[tuple[int, int, str], float] = {}
    gains = []
    for prefill, decode in track(RATIOS, "P/D", transient=True):
        shape = ClusterShape(prefill, decode)
        bench = Bench(shape, model, trajectories("64K"))
        for system in (BASIC, PAPER, LEVEL):
            times[prefill, decode, system.name] = bench.offline(system, agents).job_s
        gain = times[prefill, decode, BASIC.name] / times[prefill, decode, LEVEL.name]
        gains.append(times[prefill, decode, BASIC.name] / times[prefill, decode, PAPER.name])
        report.figure(f"ratios_{shape.name}_gain_paper", gains[-1])
        report.figure(f"ratios_{shape.name}_gain_ours", gain)
        report.figure(f"ratios_{shape.name}_worst_link_use", link_use(shape.links, prefill, decode).worst[1], 1.0)
    report.figure("ratios_gain_mean", sum(gains) / len(gains), 1.64)
    report.figure("ratios_gain_max", max(gains), 2.46)
    for dual in (PAPER, LEVEL):
        for name, (p, d), (q, e), other in (
            ("two_nics_1P1D_over_2P1D_basic", (1, 1), (2, 1), BASIC),
            ("three_nics_1P2D_over_2P1D", (1, 2), (2, 1), dual),
            ("four_nics_1P3D_over_2P2D", (1, 3), (2, 2), dual),
        ):
            report.figure(f"ratios_{dual.name}_{name}", times[p, d, dual.name] / times[q, e, other.name], 1.0)
