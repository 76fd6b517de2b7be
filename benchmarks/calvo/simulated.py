"""`benchmarks sim-calvo`: CALVO's table on the paper's hardware, the coupled baseline against every ordering."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track

from penstock.command_line import PlotFile
from penstock.core.bandwidth import LinkCost
from penstock.core.config import POLICIES, Mode, Policy, SchedulerConfig
from penstock.core.cost import CostModel
from penstock.core.engine.scheduler import LoadScheduler
from penstock.core.keys import KeyChain, root_key
from penstock.core.operations import BlockHit, RequestSpec
from penstock.engine.profile import Profile, load_profile
from penstock.report import Report
from penstock.sim.clock import VirtualClock
from penstock.sim.engine_driver import EngineDriver, ideal_links
from penstock.workloads.generators import CALVO_DATASETS, calvo, prompt_tokens
from penstock.workloads.plots import line_chart
from penstock.workloads.statistics import percentile

MODELS = {"llama": "h100-llama-3.1-8b", "qwen": "h100-qwen2.5-14b-1m"}
WEIGHT_BYTES = {"llama": 16e9, "qwen": 29.6e9}
HBM_BYTES, ACTIVATION_BYTES, HOST_BYTES = 80e9, 4e9, 128e9
FETCH_BYTES_PER_S = 17.2e9
"""Not in the paper: the rest of its example (0.361 s for 28.1K tokens, in series) after 0.147 s of upload."""
BLOCK_TOKENS = 256
FETCH = "net"
RATES = (0.5, 0.7, 0.85, 1.0, 1.2, 1.5)
COUPLED = "coupled"
HIT_RATIOS = (0.25, 0.5, 0.75, 1.0)
HIT_RATIO_RATE = 0.7
MIXED_LINKS, MIXED_RATES = (1.0, 0.125), (0.5, 1.0, 1.5)  # shares of the fetch link, and of the baseline's capacity
RECOMPUTE_LINKS = (1.0, 0.25)
PAPER_TTFT_CUT = 0.813
SLO_GAIN_GOAL = 2.0


@dataclass(frozen=True, slots=True)
class Job:
    """One request: its tokens, how many of them the pool holds, its SLO as a multiple of its TTFT alone, its arrival in
    units of the mean time between arrivals."""

    tokens: list[int]
    warm_tokens: int
    slo_multiplier: float
    arrival: float


@dataclass(frozen=True, slots=True)
class Machine:
    """One engine of the paper and its fetch link. `recompute`: it may compute the first part of a hit while the rest
    loads (the baseline never does)."""

    model: str
    fetch_bytes_per_s: float
    recompute: bool = False

    @property
    def profile(self) -> Profile:
        """Compute profile of its model."""
        return load_profile(MODELS[self.model])

    @property
    def block_bytes(self) -> int:
        """Bytes of KV in one block."""
        return BLOCK_TOKENS * self.profile.layers * self.profile.layer_bytes_per_token

    def scheduler(self, mode: Mode, policy: Policy) -> LoadScheduler:
        """A scheduler for this machine with one mode and policy."""
        profile = self.profile
        l1_bytes = HBM_BYTES - ACTIVATION_BYTES - WEIGHT_BYTES[self.model]
        config = SchedulerConfig(
            block_tokens=BLOCK_TOKENS,
            block_bytes=self.block_bytes,
            l1_pages=int(l1_bytes / self.block_bytes),
            l2_slots=int(HOST_BYTES / self.block_bytes),
            mode=mode,
            policy=policy,
            recompute=self.recompute and mode == "penstock",
            max_batch_tokens=8192,
            fetch_window_blocks=2,
        )
        cost = CostModel(LinkCost(profile.upload_bytes_per_s), profile.compute_cost())
        cost.links[FETCH] = LinkCost(self.fetch_bytes_per_s)
        return LoadScheduler(config, cost)

    def ttfts_s(
        self, jobs: Sequence[Job], starts_s: Sequence[float], slos_s: Sequence[float], mode: Mode, policy: Policy
    ) -> list[float]:
        """TTFT of each job under one policy, in order; L1 is empty at first."""
        clock = VirtualClock()
        links = ideal_links(clock, {FETCH: self.fetch_bytes_per_s}, self.profile.upload_bytes_per_s)
        root = root_key(MODELS[self.model].encode(), "")
        hit = BlockHit(self.block_bytes, (FETCH,))
        pool = {key: hit for job in jobs for key in KeyChain(root, BLOCK_TOKENS).extend(job.tokens[: job.warm_tokens])}
        driver = EngineDriver(clock, self.scheduler(mode, policy), pool, links, self.profile.compute_cost())
        for number, (job, start_s, slo_s) in enumerate(zip(jobs, starts_s, slos_s, strict=True)):
            driver.submit_at(start_s, RequestSpec(str(number), job.tokens, 1, root, start_s + slo_s))
        driver.run()
        accounts = [driver.ended[str(number)].account for number in range(len(jobs))]
        return [
            (a.first_token_s - a.arrival_s) if a is not None and a.first_token_s is not None else float("inf")
            for a in accounts
        ]

    def load_s(self, job: Job) -> float:
        """Seconds on the fetch link, the slowest stage."""
        return job.warm_tokens * self.profile.layers * self.profile.layer_bytes_per_token / self.fetch_bytes_per_s

    def load_over_compute(self, job: Job) -> float:
        """Time to load the job's whole prompt over the time to compute it."""
        tokens = len(job.tokens)
        whole = replace(job, warm_tokens=tokens)
        return self.load_s(whole) / self.profile.compute_cost().seconds([(tokens, 0)])

    def compute_s(self, job: Job) -> float:
        """Seconds to compute a job's tokens that are not cached."""
        return self.profile.compute_cost().seconds([(len(job.tokens) - job.warm_tokens, job.warm_tokens)])

    def fluid_bound_s(self, jobs: Sequence[Job], starts_s: Sequence[float]) -> float:
        """A lower bound of the mean TTFT for any order: shortest remaining load first on the fetch link, then each
        job's own compute as if it were alone."""
        ends_s = shortest_remaining_first(starts_s, [self.load_s(job) for job in jobs])
        flows = [end + self.compute_s(job) - start for end, start, job in zip(ends_s, starts_s, jobs, strict=True)]
        return statistics.mean(flows)


def shortest_remaining_first(starts_s: Sequence[float], sizes_s: Sequence[float]) -> list[float]:
    """When each job ends on a machine that always serves the job with the least remaining work."""
    order = sorted(range(len(starts_s)), key=lambda i: starts_s[i])
    left: dict[int, float] = {}
    ends, now = [0.0] * len(starts_s), 0.0
    arriving = iter([*order, None])
    coming = next(arriving)
    while left or coming is not None:
        until = starts_s[coming] if coming is not None else float("inf")
        while left and now < until:
            best = min(left, key=lambda i: (left[i], i))
            step = min(left[best], until - now)
            now, left[best] = now + step, left[best] - step
            if left[best] <= 1e-12:
                ends[best] = now
                del left[best]
        now = max(now, until) if coming is not None else now
        if coming is not None:
            left[coming] = sizes_s[coming]
            coming = next(arriving)
    return ends


def jobs_of(dataset: str, seed: int, hit_ratios: Sequence[float], vocabulary: int) -> list[Job]:
    """The dataset's requests, with one arrival per second on average."""
    workload = calvo(dataset, 1.0, seed, hit_ratios=hit_ratios, context_tokens_multiple=BLOCK_TOKENS)
    found = []
    for session in workload.sessions:
        turn = session.turns[0]
        tokens = prompt_tokens(turn.prompt, vocabulary)
        found.append(Job(tokens, turn.warm_tokens, turn.slo_multiplier or 2.0, session.start_s))
    return found


@dataclass(slots=True)
class Cell:
    """One dataset, rate and policy over all seeds. `bounds_s` are means."""

    ttfts_s: list[float] = field(default_factory=list)
    met: list[bool] = field(default_factory=list)
    bounds_s: list[float] = field(default_factory=list)

    @property
    def ttft_s(self) -> float:
        """Mean seconds to the first token."""
        return statistics.mean(self.ttfts_s)

    @property
    def attainment(self) -> float:
        """Share of requests that met their deadline."""
        return statistics.mean(self.met)

    @property
    def over_bound(self) -> float:
        """Mean seconds to the first token over the mean of the lower bounds."""
        return self.ttft_s / statistics.mean(self.bounds_s)


class Dataset:
    """One dataset on one machine: the baseline's times alone and its capacity, then runs at shares of that."""

    def __init__(self, machine: Machine, name: str, seed: int, hit_ratios: Sequence[float] = (1.0,)) -> None:
        self.machine = machine
        self.jobs = jobs_of(name, seed, hit_ratios, machine.profile.vocab_size)
        self.alone_s = [machine.ttfts_s([job], [0.0], [1e5], "coupled", "fcfs")[0] for job in self.jobs]
        self.capacity_per_s = len(self.jobs) / sum(self.alone_s)

    def run(self, policy: str, rate_per_s: float, cell: Cell, *, recompute: bool = False) -> None:
        """Run one policy at a rate, and add the results to `cell`."""
        starts_s = [job.arrival / rate_per_s for job in self.jobs]
        slos_s = [alone * job.slo_multiplier for alone, job in zip(self.alone_s, self.jobs, strict=True)]
        mode: Mode = "coupled" if policy == COUPLED else "penstock"
        order: Policy = "fcfs" if policy == COUPLED else policy  # type: ignore[assignment]
        machine = replace(self.machine, recompute=recompute)
        ttfts_s = machine.ttfts_s(self.jobs, starts_s, slos_s, mode, order)
        cell.ttfts_s += ttfts_s
        cell.met += [ttft <= slo for ttft, slo in zip(ttfts_s, slos_s, strict=True)]
        cell.bounds_s.append(self.machine.fluid_bound_s(self.jobs, starts_s))


def tables(report: Report, machine: Machine, datasets: Sequence[str], rates: Sequence[float], seeds: int) -> None:
    """All figures, with the paper's as limits."""
    report.modelled.append(
        f"everything: virtual clock; {machine.profile.name}; fetch link {machine.fetch_bytes_per_s / 1e9:g} GB/s (not "
        f"in the paper), upload {machine.profile.upload_bytes_per_s / 1e9:g} GB/s; *_over_bound: mean TTFT over that "
        "of shortest-remaining-load-first on an ideal fetch link with every request's compute for itself"
    )
    steps = [(name, seed) for name in datasets for seed in range(seeds)]
    cells: dict[tuple[str, float, str], Cell] = {}
    for name, seed in track(steps, "orderings", transient=True):
        dataset = Dataset(machine, name, seed)
        for rate in rates:
            for policy in (COUPLED, *POLICIES):
                cell = cells.setdefault((name, rate, policy), Cell())
                dataset.run(policy, rate * dataset.capacity_per_s, cell)
    for name in datasets:
        for rate in rates:
            _conclude(report, name, rate, {policy: cells[name, rate, policy] for policy in (COUPLED, *POLICIES)})
        _recompute(report, machine, name, seeds)
    _mixed(report, machine, datasets[0], seeds)
    _ratios(report, machine, datasets[0], seeds)


def _conclude(report: Report, name: str, rate: float, row: dict[str, Cell]) -> None:
    base = row[COUPLED]
    label = f"{name}_{rate:g}"
    for policy, cell in row.items():
        report.figure(f"{label}_{policy}_ttft_mean_s", cell.ttft_s)
        report.figure(f"{label}_{policy}_ttft_p99_s", percentile(cell.ttfts_s, 99))
        report.figure(f"{label}_{policy}_slo_attainment", cell.attainment)
        report.figure(f"{label}_{policy}_ttft_over_bound", cell.over_bound, 1.0)
    ours = {policy: cell for policy, cell in row.items() if policy != COUPLED}
    best = max(ours.values(), key=lambda cell: cell.attainment)
    quickest = min(ours.values(), key=lambda cell: cell.ttft_s)
    at_capacity = rate == 1.0
    gain = best.attainment / max(base.attainment, 1e-9)
    report.figure(f"{label}_slo_gain", gain, SLO_GAIN_GOAL if at_capacity else None)
    report.figure(f"{label}_ttft_cut", 1 - quickest.ttft_s / base.ttft_s, PAPER_TTFT_CUT if at_capacity else None)
    report.figure(f"{label}_lstf_over_edf_slo", row["lstf"].attainment / max(row["edf"].attainment, 1e-9), 73 / 58)
    others = max(cell.attainment for policy, cell in ours.items() if policy != "feasible")
    report.figure(f"{label}_feasible_over_best_other_slo", row["feasible"].attainment / others, 1.0)


def _slower(machine: Machine, share: float) -> Machine:
    return replace(machine, fetch_bytes_per_s=machine.fetch_bytes_per_s * share)


def _mixed(report: Report, machine: Machine, name: str, seeds: int) -> None:
    """The paper's second experiment: hit ratios drawn from 25 to 100 %; also on a link so slow that loading a token
    takes as long as computing it."""
    for share in MIXED_LINKS:
        datasets = [Dataset(_slower(machine, share), name, seed, HIT_RATIOS) for seed in range(seeds)]
        ratios = [one.machine.load_over_compute(job) for one in datasets for job in one.jobs]
        report.figure(f"mixed_link_{share:g}_load_over_compute", statistics.mean(ratios))
        for rate in MIXED_RATES:
            row = {policy: Cell() for policy in ("fcfs", "sjf-compute", "sjf")}
            label = f"mixed_{rate:g}_link_{share:g}"
            for policy, cell in row.items():
                for one in datasets:
                    one.run(policy, rate * one.capacity_per_s, cell)
                report.figure(f"{label}_{policy}_ttft_mean_s", cell.ttft_s)
                report.figure(f"{label}_{policy}_slo_attainment", cell.attainment)
            by_compute = row["sjf-compute"]
            report.figure(f"{label}_sjf-compute_over_fcfs_ttft", by_compute.ttft_s / row["fcfs"].ttft_s, 1.0)
            report.figure(f"{label}_sjf-compute_over_sjf_ttft", by_compute.ttft_s / row["sjf"].ttft_s, 1.0)


def _recompute(report: Report, machine: Machine, name: str, seeds: int) -> None:
    """Beyond the paper: the gain from load-or-recompute for each of its two orders, and for `feasible`, at the
    baseline's capacity on the paper's fetch link and on a slower one."""
    for share in RECOMPUTE_LINKS:
        cells = {(policy, on): Cell() for policy in ("sjf", "lstf", "feasible") for on in (False, True)}
        for seed in range(seeds):
            dataset = Dataset(_slower(machine, share), name, seed)
            for (policy, on), cell in cells.items():
                dataset.run(policy, dataset.capacity_per_s, cell, recompute=on)
        for policy in ("sjf", "lstf", "feasible"):
            without, recomputing = cells[policy, False], cells[policy, True]
            label = f"{name}_1_link_{share:g}_{policy}_recompute"
            report.figure(f"{label}_ttft_mean_s", recomputing.ttft_s)
            report.figure(f"{label}_slo_attainment", recomputing.attainment)
            report.figure(f"{label}_gain_ttft", without.ttft_s / recomputing.ttft_s, 1.0)
            report.figure(f"{label}_gain_slo", recomputing.attainment / max(without.attainment, 1e-9), 1.0)


def _ratios(report: Report, machine: Machine, name: str, seeds: int) -> None:
    """TTFT at fixed hit ratios, all at the rate of the lowest ratio's load."""
    means: dict[float, Cell] = {}
    for seed in range(seeds):
        rate_per_s = 0.0
        for ratio in HIT_RATIOS:
            dataset = Dataset(machine, name, seed, (ratio,))
            rate_per_s = rate_per_s or HIT_RATIO_RATE * dataset.capacity_per_s
            dataset.run("sjf", rate_per_s, means.setdefault(ratio, Cell()))
    for ratio, cell in means.items():
        report.figure(f"hit_ratio_{ratio:g}_ttft_mean_s", cell.ttft_s)


def calvo_command(
    json: Annotated[Path | None, typer.Option(help="Write the figures to this file.")] = None,
    plot: PlotFile = None,
    model: Annotated[str, typer.Option(help=f"Model: {', '.join(MODELS)}.")] = "llama",
    dataset: Annotated[list[str] | None, typer.Option(help="Datasets: loogle, icl, code. Default: all.")] = None,
    rate: Annotated[
        list[float] | None, typer.Option(help="Rates, as shares of the baseline's capacity. Default: 0.5 to 1.5.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, max=100, help="Number of workloads per dataset.")] = 3,
    fetch_gbytes_per_s: Annotated[
        float, typer.Option(min=0.1, help="Bandwidth of the fetch link, GB/s (not in the paper).")
    ] = FETCH_BYTES_PER_S / 1e9,
) -> None:
    """CALVO on its own hardware: TTFT and SLO attainment of every ordering at rates around the baseline's capacity."""
    datasets = tuple(dataset or CALVO_DATASETS)
    for given, allowed in (*((name, tuple(CALVO_DATASETS)) for name in datasets), (model, tuple(MODELS))):
        if given not in allowed:
            raise typer.BadParameter(f"{given!r}; allowed: {', '.join(allowed)}")
    report = Report("sim calvo")
    machine = Machine(model, fetch_gbytes_per_s * 1e9)
    rates = tuple(rate or RATES)
    tables(report, machine, datasets, rates, seeds)
    report.print(Console())
    if json is not None:
        report.write_json(json)
    if plot is not None:
        _plot(plot, report, datasets[0], rates)


def _plot(path: Path, report: Report, name: str, rates: Sequence[float]) -> None:
    figures = {"mean TTFT, s": "ttft_mean_s", "SLO attainment": "slo_attainment"}
    panels = {
        label: {
            "coupled (baseline)" if policy == COUPLED else policy: [
                (rate, report.figures[f"{name}_{rate:g}_{policy}_{figure}"]) for rate in rates
            ]
            for policy in (COUPLED, *POLICIES)
        }
        for label, figure in figures.items()
    }
    title = f"CALVO simulated, {name}: every ordering and the coupled baseline"
    line_chart(path, title, "rate, as share of the baseline's capacity", panels, log_y=("mean TTFT, s",))
