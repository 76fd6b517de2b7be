"""`benchmarks calvo`: CALVO's table live over TCP, the coupled baseline against every ordering."""

from __future__ import annotations

import itertools
import math
import random
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from penstock.command_line import PlotFile
from penstock.core.config import POLICIES, Policy
from penstock.report import Report
from penstock.workloads.load_check import idle_links, refuse_empty
from penstock.workloads.plots import bar_chart
from penstock.workloads.recording import RecordedRun, write_runs
from penstock.workloads.statistics import bootstrap, percentile

DATASETS = ("icl", "loogle", "code")
DEFAULT_RATES = (0.7, 1.0, 1.2)
ALL_RATES = (0.5, 0.7, 0.85, 1.0, 1.2)
MIXED_HIT_RATIOS = (0.25, 0.5, 0.75, 1.0)
MIXED_POLICIES: tuple[Policy, ...] = ("fcfs", "sjf-compute", "sjf")
MIXED_RATES = {
    "mixed": 1.0,
    "mixed-load": 1.5,
}  # misses computed; and prompts of their hits only, closer to the link's limit
COUPLED = "coupled"
GAIN_GOAL, CUT_GOAL = 2.0, 0.813
CALIBRATION_SEED = 1000


@dataclass(slots=True)
class Pooled:
    """Results of the repeats of one (dataset, rate, policy), by request."""

    ttfts_s: list[float] = field(default_factory=list)
    met: list[float] = field(default_factory=list)
    ideal_s: list[float] = field(default_factory=list)
    load_errors: list[float] = field(default_factory=list)
    compute_errors: list[float] = field(default_factory=list)
    link_shares: list[float] = field(default_factory=list)
    fetch_bytes_per_s: list[float] = field(default_factory=list)


CELL = re.compile(r"(([a-z-]+)_([\d.]+)_([a-z-]+))_ttft_mean_s")
ENDS = {"ttft_mean_s": ("low_s", "high_s"), "slo_attainment": ("low", "high")}
Cell = tuple[str, str, str]  # dataset (or "mixed"), rate, policy


def calvo(
    json: Annotated[Path | None, typer.Option(help="Write the figures to this file.")] = None,
    plot: PlotFile = None,
    everything: Annotated[bool, typer.Option("--all", help="All datasets and rates (about two hours).")] = False,
    dataset: Annotated[list[str] | None, typer.Option(help="Datasets: icl, loogle, code. Default: icl.")] = None,
    rate: Annotated[list[float] | None, typer.Option(help="Rates, as shares of the baseline's capacity.")] = None,
    policy: Annotated[
        list[str] | None, typer.Option(help="Orderings to run beside the baseline. Default: all.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, max=50, help="Number of workloads (seeds) per rate.")] = 2,
    blocks: Annotated[
        str,
        typer.Option(
            help="Whose KV blocks: llama-3.1-8b (256 tokens of 131,072 B) or deepseek-v3 (64 tokens of 70,272 B). "
            "Loads take as long with either."
        ),
    ] = "llama-3.1-8b",
    bytes_divisor: Annotated[
        int | None, typer.Option(min=1, help="Divisor of the KV bytes. Default: 256; 288 for deepseek-v3.")
    ] = None,
    time_factor: Annotated[float, typer.Option(min=0.01, max=100, help="Multiplier of the paper's times.")] = 0.25,
    fetch_gbytes_per_s: Annotated[
        float, typer.Option(min=0.1, help="Bandwidth of the fetch link, unscaled, in GB/s (not in the paper).")
    ] = 17.2,
    record: Annotated[Path | None, typer.Option(help="Write the runs to this file, for penstock sim validate.")] = None,
) -> None:
    """CALVO's set-up live over TCP with real bytes and modelled compute: TTFT and SLO attainment of every ordering."""
    console = Console()
    datasets = tuple(dataset or (DATASETS if everything else ("icl",)))
    rates = tuple(rate or (ALL_RATES if everything else DEFAULT_RATES))
    policies = tuple(policy or POLICIES)
    from benchmarks.calvo.testbed import BLOCK_SHAPES, Scale

    for given, allowed in ((datasets, DATASETS), (policies, POLICIES), ((blocks,), tuple(BLOCK_SHAPES))):
        for value in given:
            if value not in allowed:
                raise typer.BadParameter(f"{value!r}; allowed: {', '.join(allowed)}")
    bytes_divisor = bytes_divisor or BLOCK_SHAPES[blocks].bytes_divisor
    scale = Scale(bytes_divisor, time_factor, fetch_gbytes_per_s * 1e9, blocks)
    report = Report("calvo")
    profile = scale.profile()
    report.modelled += [
        f"compute and uploads: profile {profile.name}, times x {time_factor:g} (uploads copy real bytes, then wait "
        f"until {profile.upload_bytes_per_s / 1e6:.0f} MB/s would have)",
        f"the fetch link: the pool node paces what it sends over TCP to {scale.paced_bytes_per_s / 1e6:.0f} MB/s "
        f"({fetch_gbytes_per_s:g} GB/s x KV bytes of a token over Llama-3.1-8B's / {bytes_divisor} / {time_factor:g})",
        f"KV bytes: those of {blocks} / {bytes_divisor}, in blocks of {scale.shape.tokens} tokens, random content",
    ]
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    ) as progress:
        runs: list[RecordedRun] = []
        cells = _measure(progress, scale, datasets, rates, policies, repeats, report, runs)
    if record is not None:
        write_runs(record, runs)
    _conclude(report, cells, datasets, rates, policies)
    report.print(console)
    if json is not None:
        report.write_json(json)
    if plot is not None:
        draw(plot, report)
    refuse_empty("python -m benchmarks calvo", idle_links(report.figures), console)


def _measure(
    progress: Progress,
    scale: object,
    datasets: Sequence[str],
    rates: Sequence[float],
    policies: Sequence[str],
    repeats: int,
    report: Report,
    runs: list[RecordedRun],
) -> dict[Cell, Pooled]:
    from benchmarks.calvo.testbed import Scale, testbed

    assert isinstance(scale, Scale)
    cells: dict[Cell, Pooled] = {}
    mixed = "icl" in datasets and {"sjf-compute", "sjf"} <= set(policies)
    per_rate = len(policies) + 1
    per_mixed = 3 + repeats * len(MIXED_POLICIES)
    steps = len(datasets) * (3 + repeats * len(rates) * per_rate) + mixed * len(MIXED_RATES) * per_mixed
    task = progress.add_task("start", total=steps)
    shuffle = random.Random(0)
    with testbed(scale) as bed:
        for name in datasets:
            one = _Dataset(bed, name, (1.0,), progress, task, runs)
            one.calibrate(report)
            for rate, repeat in itertools.product(rates, range(repeats)):
                one.run_all(cells, rate, repeat, [COUPLED, *policies], shuffle)
            one.end()
        for label, rate in MIXED_RATES.items() if mixed else ():
            one = _Dataset(bed, "icl", MIXED_HIT_RATIOS, progress, task, runs, label=label)
            one.calibrate(report)
            for repeat in range(repeats):
                one.run_all(cells, rate, repeat, MIXED_POLICIES, shuffle)
            one.end()
    return cells


class _Dataset:
    """One dataset on the testbed. The requests (contexts, queries, SLO multipliers) are those of the calibration; each
    repeat draws new arrivals and assigns the requests to them in another order."""

    def __init__(
        self,
        bed: object,
        name: str,
        ratios: Sequence[float],
        progress: Progress,
        task: object,
        runs: list[RecordedRun],
        label: str = "",
    ) -> None:
        from benchmarks.calvo.testbed import Testbed, arrivals

        assert isinstance(bed, Testbed)
        self._bed = bed
        self._name = name
        self._label = label or name
        self._runs = runs
        self._progress = progress
        self._task = task
        warm_only = label == "mixed-load"
        self._requests = arrivals(name, 1.0, CALIBRATION_SEED, ratios, bed.profile.vocab_size, warm_only)
        self._alone_s: list[float] = []
        self._capacity = 0.0
        bed.warm(self._requests)

    def calibrate(self, report: Report) -> None:
        """The baseline's capacity (a closed loop of all requests) and its TTFT without interference (one at a time);
        and how much of the link the same closed loop uses without the baseline's order of stages."""
        no_slo = [1e5] * len(self._requests)
        self._progress.update(self._task, description=f"{self._label}: baseline alone")  # type: ignore[arg-type]
        alone = self._bed.run(self._requests, no_slo, "coupled", "fcfs", outstanding=1)
        self._advance()
        self._alone_s = list(alone.ttfts_s)
        self._profile = self._bed.profile_of(alone)
        self._bed.forget(self._requests)
        self._progress.update(self._task, description=f"{self._label}: baseline capacity")  # type: ignore[arg-type]
        full = self._bed.run(self._requests, no_slo, "coupled", "fcfs", outstanding=8)
        self._advance()
        self._bed.forget(self._requests)
        self._capacity = len(self._requests) / full.wall_s
        self._progress.update(self._task, description=f"{self._label}: closed loop")  # type: ignore[arg-type]
        loop = self._bed.run(self._requests, no_slo, "penstock", "fcfs", outstanding=8)
        self._advance()
        self._bed.forget(self._requests)
        share = loop.fetched_bytes / loop.wall_s / self._bed.scale.paced_bytes_per_s
        report.figure(f"{self._label}_closed_loop_fetch_link_share", share, 1.0)
        time_factor = self._bed.scale.time_factor
        report.figure(f"{self._label}_baseline_capacity_per_s", self._capacity * time_factor)
        report.figure(f"{self._label}_baseline_ttft_alone_s", statistics.mean(self._alone_s) / time_factor)

    def run_all(
        self, cells: dict[Cell, Pooled], rate: float, repeat: int, policies: Sequence[str], shuffle: random.Random
    ) -> None:
        """Run every policy on one workload, in random order."""
        from benchmarks.calvo.testbed import Arrival

        rng = random.Random(f"{self._label}/{rate}/{repeat}")
        order = rng.sample(range(len(self._requests)), len(self._requests))
        at, workload, slos_s = 0.0, [], []
        for index in order:
            at += rng.expovariate(rate * self._capacity)
            request = self._requests[index]
            workload.append(Arrival(request.tokens, request.warm_tokens, request.slo_multiplier, at))
            slos_s.append(self._alone_s[index] * request.slo_multiplier)
        for policy in shuffle.sample(list(policies), len(policies)):
            text = f"{self._label} at {rate:g} of capacity, repeat {repeat + 1}: {policy}"
            self._progress.update(self._task, description=text)  # type: ignore[arg-type]
            mode = "coupled" if policy == COUPLED else "penstock"
            order_policy = "fcfs" if policy == COUPLED else policy
            result = self._bed.run(workload, slos_s, mode, order_policy)  # type: ignore[arg-type]
            self._runs.append(self._bed.recorded(text, workload, result, self._profile, mode, order_policy))  # type: ignore[arg-type]
            pooled = cells.setdefault((self._label, f"{rate:g}", policy), Pooled())
            time_factor = self._bed.scale.time_factor
            pooled.ttfts_s += [ttft / time_factor for ttft in result.ttfts_s]
            pooled.met += result.met
            ideal = self._bed.ideal(workload, slos_s, mode, order_policy)  # type: ignore[arg-type]
            pooled.ideal_s += [ttft / time_factor for ttft in ideal]
            for report in result.reports:
                if report.measured_load_s > 0:
                    pooled.load_errors.append(abs(report.predicted_load_s / report.measured_load_s - 1))
                if report.measured_compute_s > 0:
                    pooled.compute_errors.append(abs(report.predicted_compute_s / report.measured_compute_s - 1))
            speed = result.fetched_bytes / result.wall_s
            pooled.fetch_bytes_per_s.append(speed)
            pooled.link_shares.append(speed / self._bed.scale.paced_bytes_per_s)
            self._bed.forget(self._requests)
            self._advance()

    def _advance(self) -> None:
        self._progress.advance(self._task)  # type: ignore[arg-type]

    def end(self) -> None:
        self._bed.drop(self._requests)


def _figures(report: Report, cell: Cell, pooled: Pooled) -> None:
    name = f"{cell[0]}_{cell[1]}_{cell[2]}"
    ttft, met = bootstrap(pooled.ttfts_s), bootstrap(pooled.met)
    report.figure(f"{name}_ttft_mean_s", ttft.value)
    report.figure(f"{name}_ttft_mean_low_s", ttft.low)
    report.figure(f"{name}_ttft_mean_high_s", ttft.high)
    report.figure(f"{name}_ttft_p99_s", percentile(pooled.ttfts_s, 99))
    report.figure(f"{name}_slo_attainment", met.value)
    report.figure(f"{name}_slo_attainment_low", met.low)
    report.figure(f"{name}_slo_attainment_high", met.high)
    report.figure(f"{name}_ttft_over_bound", statistics.mean(pooled.ttfts_s) / statistics.mean(pooled.ideal_s), 1.0)
    report.figure(f"{name}_fetch_link_share", statistics.mean(pooled.link_shares), 1.0)
    report.figure(f"{name}_fetch_bytes_per_s", statistics.mean(pooled.fetch_bytes_per_s))
    report.figure(f"{name}_predicted_load_error", statistics.median(pooled.load_errors or [math.nan]))
    report.figure(f"{name}_predicted_compute_error", statistics.median(pooled.compute_errors or [math.nan]))


def _present(cells: dict[Cell, Pooled], name: str, rate: str, policies: Sequence[str]) -> Iterator[tuple[str, Pooled]]:
    for policy in policies:
        if (name, rate, policy) in cells:
            yield policy, cells[name, rate, policy]


def _conclude(
    report: Report,
    cells: dict[Cell, Pooled],
    datasets: Sequence[str],
    rates: Sequence[float],
    policies: Sequence[str],
) -> None:
    for cell, pooled in cells.items():
        _figures(report, cell, pooled)
    for name, rate in itertools.product(datasets, (f"{r:g}" for r in rates)):
        base = cells[name, rate, COUPLED]
        rows = dict(_present(cells, name, rate, policies))
        best_slo = max(rows, key=lambda p: statistics.mean(rows[p].met))
        best_ttft = min(rows, key=lambda p: statistics.mean(rows[p].ttfts_s))
        at_goal = rate == "1"
        gain = statistics.mean(rows[best_slo].met) / max(statistics.mean(base.met), 1e-9)
        cut = 1 - statistics.mean(rows[best_ttft].ttfts_s) / statistics.mean(base.ttfts_s)
        report.figure(f"{name}_{rate}_slo_gain", gain, GAIN_GOAL if at_goal else None)
        report.figure(f"{name}_{rate}_ttft_cut", cut, CUT_GOAL if at_goal else None)
        report.notes.append(f"{name} at {rate}: best SLO attainment by {best_slo}, best mean TTFT by {best_ttft}")
        if float(rate) >= 1.2 and "feasible" in rows and len(rows) > 1:
            others = max(statistics.mean(rows[p].met) for p in rows if p != "feasible")
            report.figure(
                f"{name}_{rate}_feasible_over_best_other", statistics.mean(rows["feasible"].met) / others, 1.0
            )
        if {"lstf", "edf"} <= set(rows):
            ratio = statistics.mean(rows["lstf"].met) / max(statistics.mean(rows["edf"].met), 1e-9)
            report.figure(f"{name}_{rate}_lstf_over_edf_slo", ratio)
    for label, mixed_rate in MIXED_RATES.items():
        rows = dict(_present(cells, label, f"{mixed_rate:g}", MIXED_POLICIES))
        if "sjf" in rows:
            compute_only, fcfs, both = (
                statistics.mean(rows[policy].ttfts_s) for policy in ("sjf-compute", "fcfs", "sjf")
            )
            report.figure(f"{label}_{mixed_rate:g}_sjf-compute_over_sjf_ttft", compute_only / both, 1.0)
            report.figure(f"{label}_{mixed_rate:g}_sjf-compute_over_fcfs_ttft", compute_only / fcfs)


def draw(path: Path, report: Report) -> None:
    """Mean TTFT with its interval, and SLO attainment, by dataset, rate and policy."""
    shown = {"mean TTFT, s (95 % interval)": "ttft_mean_s", "SLO attainment": "slo_attainment"}
    panels: dict[str, dict[str, dict[str, float]]] = {title: {} for title in shown}
    errors: dict[str, dict[str, dict[str, tuple[float, float]]]] = {title: {} for title in shown}
    for name in report.figures:
        if (found := CELL.fullmatch(name)) is None:
            continue
        cell, dataset, rate, policy = found.groups()
        group, series = f"{dataset}, rate {rate}", f"{policy} (baseline)" if policy == COUPLED else policy
        for title, figure in shown.items():
            low, high = (report.figures[f"{cell}_{figure.removesuffix('_s')}_{end}"] for end in ENDS[figure])
            panels[title].setdefault(group, {})[series] = report.figures[f"{cell}_{figure}"]
            errors[title].setdefault(group, {})[series] = (low, high)
    bar_chart(
        path, "CALVO live: rates as shares of the baseline's capacity, unscaled seconds", "", panels, errors=errors
    )
