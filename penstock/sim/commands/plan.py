"""`penstock sim plan`: how many prefill and decode nodes, which P/D ratio and storage NICs serve a load within an SLO.

For every storage NIC and every ratio within the bounds where no other link is a bottleneck, it searches the smallest
number of nodes that meets the SLO: it starts at the fluid bound and simulates DualPath with split reads. Plans that no
other plan beats in both nodes and TTFT form the frontier.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from penstock.core.cluster.bounds import link_use, ratio_bounds
from penstock.core.config import ConfigError
from penstock.report import Report
from penstock.sim.cluster_shape import SPLIT, ClusterShape
from penstock.sim.fluid_bound import fluid_bound
from penstock.sim.served_model import Gpu, ServedModel, load_model, model_names
from penstock.sim.serving_run import Bench, Slo
from penstock.sim.trajectories import Trajectory, from_table, from_trace
from penstock.workloads.generators import AGENT_TABLES
from penstock.workloads.traces import TraceError

RATIOS = tuple(sorted({Fraction(p, d) for p in range(1, 5) for d in range(1, 8)}))
GBITS = (100.0, 200.0, 400.0, 800.0)


@dataclass(frozen=True, slots=True)
class Plan:
    """A cluster that meets the SLO at the given rate."""

    shape: ClusterShape
    ttft_s: float
    tpot_s: float
    storage_use: float

    @property
    def nodes(self) -> int:
        """Number of prefill and decode nodes."""
        return self.shape.prefill_nodes + self.shape.decode_nodes

    @property
    def storage_gbit_per_s(self) -> float:
        """Bandwidth of all storage NICs together."""
        return self.nodes * self.shape.storage_nic_bytes_per_s * 8e-9


@dataclass(frozen=True, slots=True)
class Demand:
    """The load: agents of a kind at a rate, with an SLO; simulated for `arrivals_s`."""

    model: ServedModel
    trajectories: Sequence[Trajectory]
    agents_per_s: float
    slo: Slo
    arrivals_s: float
    group_nodes_max: int = 4
    seed: int = 0

    def sized(self, unit: ClusterShape, prefill_nodes: int, decode_nodes: int) -> ClusterShape:
        """A cluster whose engine groups are the largest allowed that divide its nodes."""
        return replace(
            unit,
            prefill_nodes=prefill_nodes,
            decode_nodes=decode_nodes,
            prefill_group_nodes=_group(prefill_nodes, self.group_nodes_max),
            decode_group_nodes=_group(decode_nodes, self.group_nodes_max),
        )

    def _fits(self, shape: ClusterShape, tokens: int) -> bool:
        sizes = (shape.prefill_group_nodes, shape.decode_group_nodes)
        return all(self.model.fits(shape.gpu, shape.gpus * nodes, tokens) for nodes in sizes)

    def least_share(self, shape: ClusterShape) -> float:
        """The load as a share of this cluster's fluid bound; infinite if the model does not fit."""
        if not self._fits(shape, 1):
            return float("inf")
        agents = 20 * len(self.trajectories)
        bound = fluid_bound(shape, self.model, self.trajectories, agents, storage_nics=None)
        per_s = agents / max(bound.storage_s, bound.prefill_s, bound.decode_s)
        return self.agents_per_s / per_s

    def kept_by(self, shape: ClusterShape) -> Plan | None:
        """Simulate the cluster; None if it misses the SLO, or the model or the longest request does not fit its
        groups."""
        longest = max(max(map(sum, zip(t.prompts, t.answers, strict=True))) for t in self.trajectories)
        if not self._fits(shape, longest):
            return None
        bench = Bench(shape, self.model, self.trajectories)
        run = bench.online(SPLIT, self.agents_per_s, self.arrivals_s, self.seed)
        kept, ttft_s, tpot_s = self.slo.kept(run.record, self.arrivals_s)
        return Plan(shape, ttft_s, tpot_s, run.balance.storage_use) if kept else None


def _group(nodes: int, group_nodes_max: int) -> int:
    return max(size for size in range(1, group_nodes_max + 1) if nodes % size == 0)


def plan_for(demand: Demand, unit: ClusterShape, ratio: Fraction, nodes_max: int) -> Plan | None:
    """The smallest cluster of this ratio (times 1, 2, ...) that meets the SLO; None within `nodes_max` nodes."""
    p, d = ratio.numerator, ratio.denominator
    times_max = nodes_max // (p + d)
    least = demand.least_share(demand.sized(unit, p * times_max, d * times_max))
    if least > 1.0:
        return None
    low = max(1, int(least * times_max))
    best: Plan | None = None
    high = times_max + 1
    while low < high:  # a larger cluster meets every SLO that a smaller one meets
        middle = min(low + 1, high - 1) if best is None and low * 2 < high else (low + high) // 2
        middle = max(low, middle)
        found = demand.kept_by(demand.sized(unit, p * middle, d * middle))
        if found is None:
            low = middle + 1
        else:
            best, high = found, middle
    return best


def frontier(plans: Sequence[Plan]) -> list[Plan]:
    """The plans, by nodes, that no other plan beats: one with no more nodes, no more storage bandwidth, and a TTFT at
    most 5 % higher (of equal plans the first stays)."""

    def beats(first: Plan, second: Plan) -> bool:
        left, right = (first.nodes, first.storage_gbit_per_s), (second.nodes, second.storage_gbit_per_s)
        cheaper = left != right and all(x <= y for x, y in zip(left, right, strict=True))
        if cheaper:
            return first.ttft_s <= second.ttft_s * 1.05
        return left == right and (first.ttft_s, plans.index(first)) < (second.ttft_s, plans.index(second))

    kept = [plan for plan in plans if not any(beats(other, plan) for other in plans)]
    return sorted(kept, key=lambda plan: (plan.nodes, plan.storage_gbit_per_s, plan.ttft_s))


def search(demand: Demand, gpu: Gpu, gbits: Sequence[float], nodes_max: int, gpus: int) -> tuple[list[Plan], list[str]]:
    """All plans, and the reasons for skipped ratios."""
    plans, left_out = [], []
    cells = [(gbit, ratio) for gbit in gbits for ratio in RATIOS if sum(ratio.as_integer_ratio()) <= nodes_max]
    for gbit, ratio in track(cells, "plans", transient=True):
        unit = ClusterShape(1, 1, gpus=gpus, gpu=gpu, storage_nic_bytes_per_s=gbit / 8 * 1e9)
        low, high = ratio_bounds(unit.links)
        if not low <= ratio <= high:
            link, use = link_use(unit.links, ratio.numerator, ratio.denominator).worst
            left_out.append(f"{gbit:g} Gbit/s, P/D {ratio}: {link} would need {use:.2f} of its bandwidth")
            continue
        plan = plan_for(demand, unit, ratio, nodes_max)
        if plan is not None:
            plans.append(plan)
    return plans, left_out


def workload(trace: Path | None, length: str, context_tokens_max: int, think_s_max: float) -> list[Trajectory]:
    """Recorded sessions, or generated agents of a row of DualPath's table. Raises BadParameter."""
    if trace is None:
        if length not in AGENT_TABLES:
            raise typer.BadParameter(f"length is {length!r}; allowed: {', '.join(AGENT_TABLES)}")
        return from_table(length, 0)
    try:
        return from_trace(trace, context_tokens_max, think_s_max)
    except TraceError as error:
        raise typer.BadParameter(str(error)) from None


def plan(
    model: Annotated[str, typer.Option(help=f"Model: {', '.join(model_names())}, or a .toml file.")],
    trace: Annotated[
        Path | None, typer.Option(help="Recorded sessions or requests. Default: generated agents.")
    ] = None,
    length: Annotated[str, typer.Option(help="Generated agents: 32K, 48K or 64K.")] = "64K",
    rate: Annotated[float, typer.Option(min=1e-3, help="Agents (sessions) per second.")] = 1.0,
    slo_ttft_s: Annotated[float, typer.Option(min=1e-3, help="Mean time to the first token.")] = 4.0,
    slo_tpot_s: Annotated[float, typer.Option(min=1e-4, help="Mean time per further token.")] = 0.05,
    gbit: Annotated[list[float] | None, typer.Option(help="Storage NICs to try, Gbit/s. Default: 100 to 800.")] = None,
    gpus: Annotated[int, typer.Option(min=1, max=64, help="GPUs of a node.")] = 8,
    gpu_memory_gb: Annotated[float, typer.Option(min=1.0, help="Memory of a GPU.")] = 80.0,
    gpu_tflops: Annotated[float, typer.Option(min=1.0, help="TFLOP/s that a GPU reaches in prefill.")] = 400.0,
    group_nodes_max: Annotated[int, typer.Option(min=1, max=16, help="Most nodes that share the experts.")] = 4,
    nodes_max: Annotated[int, typer.Option(min=2, max=1000, help="Largest cluster to consider.")] = 32,
    context_tokens_max: Annotated[
        int, typer.Option(min=1, help="Longest prompt of a trace; its session ends before a longer one.")
    ] = 65_536,
    think_s_max: Annotated[float, typer.Option(min=0.0, help="Upper limit for pauses in a trace.")] = 5.0,
    arrivals_s: Annotated[
        float, typer.Option(min=10.0, help="Simulated time of each trial; several times an agent's duration.")
    ] = 1800.0,
    json: Annotated[Path | None, typer.Option(help="Write the figures to this file.")] = None,
) -> None:
    """How many prefill and decode nodes, which P/D ratio and which storage NICs meet an SLO; prints the frontier."""
    try:
        demand = Demand(
            load_model(model), workload(trace, length, context_tokens_max, think_s_max), rate,
            Slo(slo_ttft_s, slo_tpot_s), arrivals_s, group_nodes_max,
        )  # fmt: skip
        gpu = Gpu(flop_per_s=gpu_tflops * 1e12, memory_bytes=gpu_memory_gb * 1e9)
        plans, left_out = search(demand, gpu, tuple(gbit or GBITS), nodes_max, gpus)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from None
    chosen = frontier(plans)
    report = Report("sim plan")
    report.modelled.append(
        f"everything, as in `benchmarks sim-dualpath`; engines meet in groups of up to {group_nodes_max} nodes"
    )
    report.notes += left_out
    if not chosen:
        report.notes.append(
            f"no cluster of up to {nodes_max} nodes meets TTFT {slo_ttft_s:g} s and TPOT {slo_tpot_s:g} s"
        )
    for found in chosen:
        label = f"{found.shape.name}_{found.shape.storage_nic_bytes_per_s * 8e-9:g}gbit"
        report.figure(f"{label}_nodes", found.nodes)
        report.figure(f"{label}_ttft_mean_s", found.ttft_s, slo_ttft_s)
        report.figure(f"{label}_tpot_mean_s", found.tpot_s, slo_tpot_s)
        report.figure(f"{label}_storage_use", found.storage_use, 1.0)
    _show(Console(), report, chosen)
    if json is not None:
        report.write_json(json)


def _show(console: Console, report: Report, chosen: Sequence[Plan]) -> None:
    table = Table(title=f"frontier: {report.command}", title_justify="left")
    for column in ("nodes", "prefill", "decode", "storage NIC", "TTFT mean", "TPOT mean", "storage use"):
        table.add_column(column, justify="right")
    for found in chosen:
        shape = found.shape
        table.add_row(
            str(found.nodes), str(shape.prefill_nodes), str(shape.decode_nodes),
            f"{shape.storage_nic_bytes_per_s * 8e-9:g} Gbit/s", f"{found.ttft_s:.2f} s", f"{found.tpot_s * 1e3:.1f} ms",
            f"{np.round(found.storage_use * 100):.0f} %",
        )  # fmt: skip
    console.print(table)
    for text in (*(f"modelled: {text}" for text in report.modelled), *(f"note: {text}" for text in report.notes)):
        console.print(text)
