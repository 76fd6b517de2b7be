"""`penstock bench serve`: replays a scaled trace through the HTTP API: with Penstock, coupled, and without a pool."""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from penstock.bench.system_under_test import Bed, Calibration, Run, System, SystemFailed, calibrate, run_system
from penstock.bench.turns import PAUSE_S, run_in_turns, slices
from penstock.command_line import can_plot, refuse
from penstock.report import Report
from penstock.units import parse_rate
from penstock.workloads.deadlines import RequestName, deadlines_s, reusable_tokens, with_multipliers
from penstock.workloads.generators import Workload
from penstock.workloads.load_check import LoadCheck, loaded_bytes, prompt_bytes, refuse_empty
from penstock.workloads.progress import progress_bar
from penstock.workloads.replay import RequestRecord
from penstock.workloads.summary import (
    add_figures,
    add_p99_ratio,
    add_ratio,
    facts,
    outputs_equal,
    print_table,
    summarize_records,
)
from penstock.workloads.timeline import Panel, write_figure, write_html
from penstock.workloads.traces import Scaling, TraceError, read_trace

BLOCK_TOKENS = 16
START_S = 14.0  # processes start, cost model is measured, warm-up, and processes end, for one run
CALIBRATION_REQUESTS = 16
CALIBRATION_S_MAX = 40.0
REQUESTS_MAX = 600
REQUESTS_MIN = 12
ANSWER_TOKENS_MAX = 8
UTILISATION = 0.7  # of an open loop: offered work without a pool, over time
TIME_DIVISOR = 8.0  # of think times
TURNS_OF_A_SESSION = 8  # about how many turns of each agent session are replayed
SESSION_EVERY_S = 0.75  # interval between the starts of agent sessions
CONTROL_LIMITS = (1.02, 1.05)  # of TTFT if nothing is loaded: the ratio, and its interval's upper end


@dataclass(frozen=True, slots=True)
class Plan:
    """What is replayed, in which order, and how long each run may take."""

    workload: Workload
    bed: Bed
    order: tuple[System, ...]
    run_s_max: float
    open_loop: bool


@dataclass(frozen=True, slots=True)
class Options:
    """The command line's options: the trace, its scale, and how it is replayed."""

    trace: Path
    token_divisor: int
    pace: str | None
    minutes: float
    seed: int
    think_s_max: float
    sessions_at_once: int

    def read(self, requests_max: int, time_divisor: float = TIME_DIVISOR) -> Workload:
        """The trace at this scale, with deadline multipliers."""
        scaling = Scaling(
            token_divisor=self.token_divisor,
            time_divisor=time_divisor,
            think_s_max=self.think_s_max,
            requests_max=requests_max,
            sessions_max=None if self.trace.suffix == ".jsonl" else max(3, requests_max // TURNS_OF_A_SESSION),
            context_tokens_max=131_072 // self.token_divisor,
            answer_tokens_max=ANSWER_TOKENS_MAX,
        )
        workload = with_multipliers(read_trace(self.trace, scaling), self.seed)
        if is_open_loop(workload):
            return workload
        starts = (replace(s, start_s=i * SESSION_EVERY_S) for i, s in enumerate(workload.sessions))
        return replace(workload, sessions=tuple(starts))


def is_open_loop(workload: Workload) -> bool:
    """Whether no request waits for the answer to another one."""
    return all(len(session.turns) == 1 for session in workload.sessions)


def make_bed(model: Path, workload: Workload, options: Options) -> Bed:
    """Device memory for the longest prompt plus three mean ones, but at most a third of what the open sessions hold
    together (if the longest prompt fits into that), so that reuse has to come from the pool."""
    mean = workload.prompt_tokens // workload.requests
    longest = round(1.1 * workload.context_tokens_max)
    third = open_tokens(workload, options.sessions_at_once) // 3
    return Bed(
        model=model,
        block_tokens=BLOCK_TOKENS,
        l1_tokens=max(longest, min(longest + 3 * mean, third)),
        l2_bytes=32 * 2**20,
        pool_bytes=2 * 2**30,
        pace=options.pace,
        sessions_at_once=256 if is_open_loop(workload) else options.sessions_at_once,
        request_s_max=max(60.0, options.minutes * 60.0),
    )


def open_tokens(workload: Workload, sessions_at_once: int) -> int:
    """The most tokens that open sessions hold: the longest sessions, each with its last prompt."""
    longest = sorted((session.turns[-1].prompt_tokens for session in workload.sessions), reverse=True)
    return sum(longest if is_open_loop(workload) else longest[:sessions_at_once])


def busy_s(workload: Workload, alone: Calibration, cached: Callable[[RequestName], int]) -> float:
    """Time that a workload's requests keep one engine busy, one after the other."""
    total = 0.0
    for session in workload.sessions:
        for i, turn in enumerate(session.turns):
            hit = cached((session.name, i))
            total += alone.ttft.ttft_s(hit, turn.prompt_tokens - hit) + alone.decode_s * (turn.max_tokens - 1)
    return total


SYSTEMS: tuple[System, ...] = ("penstock", "coupled", "no_pool")
ORDERS: tuple[tuple[System, ...], ...] = ((*SYSTEMS, *reversed(SYSTEMS)), SYSTEMS)


def wanted_s(workload: Workload, order: Sequence[System], reusable: Mapping[RequestName, int], a: Calibration) -> float:
    """Estimated duration of replays in this order: a continuously busy engine, or an open loop's duration."""
    without = busy_s(workload, a, lambda _: 0)
    if is_open_loop(workload):
        return len(order) * without / UTILISATION
    return sum(without if system == "no_pool" else busy_s(workload, a, reusable.__getitem__) for system in order)


def make_plan(options: Options, bed: Bed, alone: Calibration, left_s: float, control: bool = False) -> Plan:
    """The largest number of requests whose runs (two of each) fit into `left_s`; if that is small, one run of each. A
    `control` is one run of each, in turns."""

    @functools.cache
    def scaled(requests: int) -> tuple[Workload, Mapping[RequestName, int]]:
        workload = options.read(requests)
        return workload, reusable_tokens(workload, bed.vocabulary, BLOCK_TOKENS)

    for order in ORDERS[1:] if control else ORDERS:
        replay_s = left_s - START_S * len(order)
        requests = REQUESTS_MAX
        while requests > REQUESTS_MIN:
            workload, reusable = scaled(requests)
            needed_s = wanted_s(workload, order, reusable, alone)
            needed_s += len(order) * len(slices(workload)) * PAUSE_S * control
            if needed_s <= replay_s:
                break
            requests = max(REQUESTS_MIN, min(workload.requests - 1, int(workload.requests * replay_s / needed_s)))
        if requests >= 4 * REQUESTS_MIN:
            break
    time_divisor = TIME_DIVISOR
    if is_open_loop(workload):
        recorded_s = max(session.start_s for session in workload.sessions) * TIME_DIVISOR
        time_divisor = max(recorded_s, 1e-3) / (busy_s(workload, alone, lambda _: 0) / UTILISATION)
    workload = options.read(requests, time_divisor)
    run_s_max = 60.0 + 4.0 * max(replay_s, 0.0) / len(order)
    return Plan(workload, make_bed(bed.model, workload, options), order, run_s_max, is_open_loop(workload))


def serve(
    trace: Annotated[Path, typer.Option(help="A folder of agent sessions, or a Mooncake .jsonl file.")],
    json: Annotated[Path | None, typer.Option(help="Write the report here.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Write the picture here (.html, .png or .svg).", callback=can_plot)
    ] = None,
    minutes: Annotated[float, typer.Option(min=0.5, max=240, help="Approximate total duration.")] = 5.0,
    token_divisor: Annotated[int, typer.Option(min=1, max=64, help="Number of recorded tokens per sent token.")] = 32,
    think_s_max: Annotated[float, typer.Option(min=0, help="Upper limit of think times, after division by 8.")] = 1.5,
    sessions_at_once: Annotated[int, typer.Option(min=1, max=256, help="Number of open agent sessions.")] = 16,
    pace: Annotated[str, typer.Option(help="Rate limit of the pool node's sending, or none.")] = "25MB/s",
    control: Annotated[
        bool,
        typer.Option("--control", help="Measure the overhead where little can be reused."),
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights and deadline multipliers.")] = 0,
) -> None:
    """Replays a trace through the API with a real small model: with Penstock, coupled, and without a pool."""
    from penstock.testing.tiny_models import build_demo_checkpoint

    console = Console(stderr=True)
    started_s = time.monotonic()
    options = Options(
        trace, token_divisor, None if pace == "none" else pace, minutes, seed, think_s_max, sessions_at_once
    )
    try:
        first = options.read(REQUESTS_MAX)
    except TraceError as error:
        refuse("penstock bench serve", error)
    try:
        with tempfile.TemporaryDirectory(prefix="penstock-bench-") as folder:
            with console.status("building a small Llama with random weights"):
                bed = make_bed(build_demo_checkpoint(Path(folder), seed=seed), first, options)
            with progress_bar(console) as progress:
                alone = calibrate(bed, first, CALIBRATION_REQUESTS, min(CALIBRATION_S_MAX, minutes * 12), progress)
                plan = make_plan(options, bed, alone, minutes * 60 - (time.monotonic() - started_s), control)
                runs, groups = _run(plan, alone, progress, control)
            check = _load_check(plan, runs, options)
            report = _report(plan, runs, alone, options)
            _add_ratios(report, runs, groups)
            check.add_to(report)
    except SystemFailed as error:
        refuse("penstock bench serve", error, status=1)
    _write(report, plan, runs, json, plot, console)
    if report.figures["failed_requests"] or report.figures["outputs_equal"] < 1:
        errors = {record.error for run in runs for record in run.records if record.error}
        console.print(f"requests failed or outputs differ: {sorted(map(str, errors))[:3]}", style="bold red")
        raise typer.Exit(1)
    problems = check.problems()
    if control:
        problems = [] if problems else [f"{check.loaded_share:.1%} of the prompts' KV was loaded: this is no control"]
    refuse_empty("penstock bench serve", problems, console)


def _load_check(plan: Plan, runs: Sequence[Run], options: Options) -> LoadCheck:
    bed = plan.bed
    records = _records(runs, "penstock")
    wall_s = sum(run.wall_s for run in runs if run.system == "penstock")
    link = None if bed.pace is None else parse_rate(bed.pace) * wall_s
    kv = bed.kv_bytes_per_token
    held = open_tokens(plan.workload, options.sessions_at_once)
    return LoadCheck(held, bed.l1_tokens, loaded_bytes(records), prompt_bytes(records, kv), link)


def _run(
    plan: Plan, alone: Calibration, progress: Progress, control: bool
) -> tuple[list[Run], Mapping[str, int] | None]:
    """The runs; for a control also the slice of each session."""
    reusable = reusable_tokens(plan.workload, plan.bed.vocabulary, BLOCK_TOKENS)
    deadlines = deadlines_s(plan.workload, reusable, alone.ttft)
    if control:
        turns = run_in_turns(plan.bed, SYSTEMS, plan.workload, deadlines, plan.run_s_max, progress)
        return turns.runs, turns.groups
    runs = [run_system(plan.bed, system, plan.workload, deadlines, plan.run_s_max, progress) for system in plan.order]
    return runs, None


def _add_ratios(report: Report, runs: Sequence[Run], groups: Mapping[str, int] | None) -> None:
    """Penstock's TTFT relative to the others'; `groups` is for a control, whose ratios have limits."""
    records = {system: _records(runs, system) for system in SYSTEMS}
    summaries = {system: summarize_records(records[system]) for system in SYSTEMS}
    if any(summary.ttft is None for summary in summaries.values()):
        return
    limits = None if groups is None else CONTROL_LIMITS
    for other in ("coupled", "no_pool"):
        add_ratio(report, f"ttft_ratio_to_{other}", records["penstock"], records[other], groups, limits)
        p99 = 1.0 if other == "coupled" or groups is not None else None
        add_p99_ratio(report, f"ttft_p99_ratio_to_{other}", records["penstock"], records[other], groups, p99)
    report.figure("ttft_cut", 1.0 - report.figures["ttft_ratio_to_coupled"])
    attained = [summaries[system].slo_attainment for system in ("penstock", "coupled")]
    if attained[0] is not None and attained[1]:
        report.figure("slo_gain", attained[0] / attained[1])
    if groups is not None:
        report.notes.append(
            f"all systems are up at once; each of {len(set(groups.values()))} slices of the trace runs on each in its "
            "turn, and their order changes; the intervals resample slices"
        )


def _records(runs: Sequence[Run], system: System) -> list[RequestRecord]:
    return [record for run in runs if run.system == system for record in run.records]


def _report(plan: Plan, runs: Sequence[Run], alone: Calibration, options: Options) -> Report:
    workload, bed = plan.workload, plan.bed
    report = Report("serve")
    if bed.pace is not None:
        report.modelled.append(f"the pool node's link is paced to {bed.pace}; bytes, sockets, KV and compute are real")
    kv = bed.kv_bytes_per_token
    working_set = sum(session.turns[-1].prompt_tokens for session in workload.sessions)
    loop = "open loop by time stamps" if plan.open_loop else f"closed loop, at most {bed.sessions_at_once} at once"
    report.notes += [
        f"{workload.name}: {workload.requests} requests of {len(workload.sessions)} sessions, {loop}; "
        f"lengths 1/{options.token_divisor} of the recorded, answers at most {ANSWER_TOKENS_MAX} tokens",
        f"device memory {bed.l1_tokens} tokens ({bed.l1_tokens * kv / 1e6:.1f} MB) against {working_set} tokens that "
        f"the sessions end with; staging {bed.l2_bytes / 1e6:.0f} MB, pool {bed.pool_bytes / 1e6:.0f} MB, "
        f"blocks of {bed.block_tokens} tokens, {kv} B of KV per token",
        "SLO: TTFT of coupled without interference, fitted over requests one at a time "
        f"({alone.ttft.fixed_s:.4g} s + {alone.ttft.cached_s:.4g} s a cached token + {alone.ttft.query_s:.4g} s and "
        f"{alone.ttft.attention_s:.4g} s x position a computed one), times 2, 4 or 8 drawn evenly",
    ]
    summaries = {system: summarize_records(_records(runs, system)) for system in dict.fromkeys(plan.order)}
    for system, summary in summaries.items():
        add_figures(report, system, summary)
        walls = [run.wall_s for run in runs if run.system == system]
        report.figure(f"{system}_wall_mean_s", sum(walls) / len(walls))
    report.figure("failed_requests", sum(summary.failed for summary in summaries.values()), limit=0)
    penstock, coupled, no_pool = (_records(runs, system) for system in ("penstock", "coupled", "no_pool"))
    report.figure("outputs_equal", outputs_equal(penstock, no_pool), limit=1.0)
    report.figure("outputs_equal_coupled", outputs_equal(coupled, no_pool), limit=1.0)
    return report


def _write(
    report: Report, plan: Plan, runs: Sequence[Run], json: Path | None, plot: Path | None, console: Console
) -> None:
    summaries = {system: summarize_records(_records(runs, system)) for system in dict.fromkeys(plan.order)}
    print_table(Console(), f"{report.experiment}: {report.command}", summaries)
    names = ("failed_requests", "outputs_equal", "ttft_ratio_to_", "ttft_p99_ratio_to_", "slo_gain")
    short = replace(report, figures={k: v for k, v in report.figures.items() if k.startswith(names)})
    short.print(Console())
    if json is not None:
        report.write_json(json)
    if plot is not None:
        first = {run.system: run for run in reversed(runs)}
        panels = [Panel(s, first[s].records, facts(summarize_records(first[s].records))) for s in summaries]
        if plot.suffix == ".html":
            write_html(plot, f"penstock bench serve: {plan.workload.name}", report.command, panels, report.notes)
        else:
            write_figure(plot, f"penstock bench serve: {plan.workload.name}", panels)
        console.print(f"wrote {plot}")
