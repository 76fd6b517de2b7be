"""`benchmarks dualpath` offline: job times of Basic, the paper's policy, split reads; the ablation; predicted times."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.dualpath.agents import Agent, generated, recorded, trajectories
from benchmarks.dualpath.live_runs import Run, run_agents
from benchmarks.dualpath.testbed import Scale, Testbed, Topology, mode_of
from penstock.report import Report
from penstock.sim.cluster_shape import BASIC, DUAL, LAYERWISE, PAPER, SPLIT, ClusterShape, System
from penstock.sim.prefill_decode import PrefillDecodeCluster, Settings
from penstock.sim.served_model import Gpu, ServedModel
from penstock.workloads.generators import AGENT_TABLES
from penstock.workloads.progress import Counter, Progress

NAMES = {LAYERWISE.name: "basic", PAPER.name: "paper", SPLIT.name: "split"}
SYSTEMS = (LAYERWISE, PAPER, SPLIT)
GAIN_GOAL, LIMIT_SHARE_GOAL, EQUAL_GOAL, BALANCE_GOAL, ERROR_GOAL = 1.78, 0.9, 1.05, 1.18, 0.15
LONGEST = "64K"  # row of the table
TRACE, CONTEXT_TOKENS_MAX = "trace", 8192  # divided already


@dataclass(frozen=True, slots=True)
class Size:
    """How much is run."""

    agents: int = 24
    turns: int = 4
    repeats: int = 2


@dataclass(slots=True)
class Cell:
    """One topology and workload: the bandwidth of plain sockets, and the runs of each system."""

    topology: Topology
    workload: str
    agents: list[Agent]
    raw_bytes_per_s: float = 0.0
    runs: dict[str, list[Run]] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Topology and workload, as in figures' names."""
        return f"{self.topology.name}_{self.workload}"

    def job_s(self, system: System) -> float:
        """The median over repeats."""
        return statistics.median(run.job_s for run in self.runs[system.name])


def workload(name: str, scale: Scale, size: Size, traces: Path | None, seed: int = 1) -> list[Agent]:
    """A row of DualPath's table, or recorded sessions, all lengths divided. Agents of shorter rows have fewer turns, as
    in the table, and there are more of them, so that the KV to read is the same. Raises TraceError or ValueError."""
    vocabulary, divisor = scale.profile().vocab_size, scale.token_divisor
    if name == TRACE:
        assert traces is not None, "a trace without its path"
        return recorded(traces, size.agents, size.turns, divisor, CONTEXT_TOKENS_MAX, seed, vocabulary)
    table = AGENT_TABLES[name]
    turns = max(1, round(size.turns * table.turns / AGENT_TABLES[LONGEST].turns))
    whole = size.agents * size.turns * AGENT_TABLES[LONGEST].length_tokens_max / table.length_tokens_max
    return generated(name, round(whole / turns), turns, divisor, seed, vocabulary)


def cells_of(names: Sequence[str], scale: Scale, size: Size, traces: Path | None) -> list[tuple[Cell, int]]:
    """Cells with their repeats: every workload at 1P1D, the first one at the other ratios."""
    first = names[0]
    cells = [(Topology(1, 1), name, size.repeats if name == first else 1) for name in names]
    cells += [(Topology(1, 2), first, size.repeats), (Topology(2, 1), first, size.repeats)]
    return [(Cell(topology, name, workload(name, scale, size, traces)), repeats) for topology, name, repeats in cells]


def measure_cell(
    cell: Cell, scale: Scale, systems: Sequence[System], repeats: int, progress: Progress, unique: Callable[[], str]
) -> None:
    """All systems in turn, every other repeat in reverse order, on the same hosts and engines."""
    requests = sum(len(agent.turns) for agent in cell.agents)
    with Testbed(cell.topology, scale) as bed:
        cell.raw_bytes_per_s = bed.raw_bytes_per_s()
        for mode in dict.fromkeys(mode_of(system) for system in systems):
            chosen = [system for system in systems if mode_of(system) == mode]
            with bed.engines(mode):
                for repeat in range(repeats):
                    for system in chosen if repeat % 2 == 0 else reversed(chosen):
                        counter = Counter(progress, f"{cell.label}: {NAMES.get(system.name, system.name)}", requests)
                        run = run_agents(bed, system, cell.agents, unique(), counter)
                        if run.failed:
                            raise RuntimeError(f"{cell.label}, {system.name}: a request failed: {run.failed[0]}")
                        cell.runs.setdefault(system.name, []).append(run)


def report_cell(report: Report, cell: Cell) -> None:
    """Times, rates, gains over Basic, and the share of plain sockets' bandwidth over all storage NICs."""
    label = f"offline_{cell.label}"
    report.figure(f"{label}_plain_sockets_bytes_per_s", cell.raw_bytes_per_s)
    basic = cell.job_s(LAYERWISE)
    for system in SYSTEMS:
        name, runs = NAMES[system.name], cell.runs[system.name]
        report.figure(f"{label}_{name}_job_s", cell.job_s(system))
        report.figure(f"{label}_{name}_tokens_per_s", statistics.median(run.tokens_per_s for run in runs))
        report.figure(f"{label}_{name}_ttft_mean_s", statistics.median(run.ttft_mean_s for run in runs))
        report.figure(f"{label}_{name}_tpot_mean_s", statistics.median(run.tpot_mean_s for run in runs))
        report.figure(f"{label}_{name}_storage_bytes", statistics.median(run.storage_bytes for run in runs))
        share = statistics.median(run.storage_bytes_per_s for run in runs) / cell.raw_bytes_per_s
        if system is LAYERWISE:
            report.figure(f"{label}_{name}_share_of_all_nics", share)
            continue
        goal = GAIN_GOAL if cell.topology.prefill == 1 else None
        report.figure(f"{label}_{name}_gain", basic / cell.job_s(system), goal)
        report.figure(f"{label}_{name}_share_of_all_nics", share, LIMIT_SHARE_GOAL)
        whole = statistics.median(run.storage_bytes / run.job_s for run in runs) / cell.raw_bytes_per_s
        report.figure(f"{label}_{name}_share_of_all_nics_whole_job", whole)
        balance = statistics.median(run.nic_max_over_mean for run in runs)
        report.figure(f"{label}_{name}_snic_max_avg", balance, BALANCE_GOAL)


def report_equals(report: Report, cells: Sequence[Cell]) -> None:
    """Set-ups with the same number of usable storage NICs."""
    first = cells[0].workload
    by_name = {cell.topology.name: cell for cell in cells if cell.workload == first}
    if len(by_name) < 3:
        return
    one, wide, two = by_name["1P1D"], by_name["1P2D"], by_name["2P1D"]
    pairs = (
        ("two_nics_1P1D_split_over_2P1D_basic", one.job_s(SPLIT), two.job_s(LAYERWISE)),
        ("three_nics_1P2D_split_over_2P1D_split", wide.job_s(SPLIT), two.job_s(SPLIT)),
    )
    for name, left, right in pairs:
        report.figure(f"equal_{name}", left / right, EQUAL_GOAL)


# -- ablation ---------------------------------------------------------------------------------------------------

ABLATION = (BASIC, LAYERWISE, DUAL, PAPER, SPLIT)
CUTS = {"layerwise": 0.1721, "dual path": 0.3819, "scheduler": 0.4562}  # reductions in the paper, 660B


def measure_ablation(
    report: Report, scale: Scale, size: Size, topology: Topology, progress: Progress, unique: Callable[[], str]
) -> None:
    """Job time of each step, and its reduction from the first."""
    cell = Cell(topology, "64K", workload("64K", scale, size, None))
    measure_cell(cell, scale, ABLATION, 1, progress, unique)
    base = cell.job_s(BASIC)
    for system in ABLATION:
        run = cell.runs[system.name][0]
        label = f"ablation_{topology.name}_{system.name.replace(' ', '_')}"
        report.figure(f"{label}_job_s", run.job_s)
        report.figure(f"{label}_cut", 1 - run.job_s / base, CUTS.get(system.name))
        if system in (DUAL, PAPER, SPLIT):
            report.figure(f"{label}_snic_max_avg", run.nic_max_over_mean, BALANCE_GOAL if system is not DUAL else None)


# -- simulated --------------------------------------------------------------------------------------------------


def served_model(scale: Scale) -> ServedModel:
    """The modelled runner's costs in the simulator's form (at `UNIT` FLOP/s)."""
    profile = scale.profile()
    return ServedModel(
        name=profile.name, source="the profile of the modelled runner", layers=profile.layers,
        kv_bytes_per_token=round(scale.bytes_per_token), linear_flop_per_token=profile.b_s * UNIT,
        attention_flop_per_token=0.0, attention_flop_per_pair=profile.c_s * UNIT, decode_read_bytes_per_sequence=0.0,
        decode_read_bytes_per_token=0.0, weight_bytes=1.0, replicated_weight_bytes=1.0, ranks_in_step=False,
        layer_overhead_s=profile.a_s / profile.layers,
    )  # fmt: skip


UNIT = 1e12


def simulated_job(cell: Cell, scale: Scale, system: System) -> tuple[float, float]:
    """Job time and mean TTFT of the same agents in the simulator, with storage NICs at plain sockets' bandwidth."""
    hosts = cell.topology.prefill + cell.topology.decode
    gpu = Gpu(UNIT, scale.decode_memory_bytes, 1.0, 1e-3, UNIT)
    shape = ClusterShape(
        cell.topology.prefill, cell.topology.decode, gpus=1, storage_nic_bytes_per_s=cell.raw_bytes_per_s / hosts,
        compute_nic_bytes_per_s=scale.compute_bytes_per_s, buffer_bytes=scale.buffer_bytes, gpu=gpu,
    )  # fmt: skip
    settings = Settings(inter_engine={"part_tokens_min": max(64, 1024 // scale.token_divisor)})
    cluster = PrefillDecodeCluster(shape, served_model(scale), system, trajectories(cell.agents), settings)
    record = cluster.run([0.0] * len(cell.agents))
    return record.end_s, statistics.fmean(record.ttft_s)


def report_simulated(report: Report, cells: Sequence[Cell], scale: Scale) -> None:
    """Predictions against measurements: relative errors of job times and of mean TTFTs."""
    jobs, ttfts = [], []
    for cell in cells:
        for system in SYSTEMS:
            job_s, ttft_s = simulated_job(cell, scale, system)
            label = f"simulated_{cell.label}_{NAMES[system.name]}"
            measured = statistics.median(run.ttft_mean_s for run in cell.runs[system.name])
            jobs.append(abs(job_s / cell.job_s(system) - 1))
            ttfts.append(abs(ttft_s / measured - 1))
            report.figure(f"{label}_job_s", job_s, cell.job_s(system))
            report.figure(f"{label}_ttft_mean_s", ttft_s, measured)
    report.figure("simulated_job_error_median", statistics.median(jobs), ERROR_GOAL)
    report.figure("simulated_job_error_max", max(jobs))
    report.figure("simulated_ttft_error_median", statistics.median(ttfts), ERROR_GOAL)
