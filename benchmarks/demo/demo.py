"""`benchmarks demo`: agent sessions over HTTP against a pool node, once coupled and once with Penstock."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from penstock.bench.system_under_test import Bed, Calibration, Run, System, SystemFailed, calibrate, run_system
from penstock.command_line import refuse
from penstock.report import Report
from penstock.units import parse_rate
from penstock.workloads.deadlines import RequestName, deadlines_s, reusable_tokens, with_multipliers
from penstock.workloads.generators import Workload, agent_trajectories
from penstock.workloads.load_check import LoadCheck, loaded_bytes, prompt_bytes, refuse_empty
from penstock.workloads.progress import progress_bar
from penstock.workloads.summary import add_figures, add_ratio, facts, outputs_equal, print_table, summarize_records
from penstock.workloads.timeline import Panel, write_figure, write_html

CALIBRATION_REQUESTS = 20
BLOCK_TOKENS = 16
OFFERED_LOAD = 2.5  # demand of the open sessions' turns after the first, relative to the baseline's capacity
START_SPARE = 1.15  # time between two sessions relative to the compute time of a first prompt
REPLAY_SHARE = 0.75  # of the largest allowed replay time
SYSTEMS: tuple[System, ...] = ("coupled", "penstock")
TITLES: dict[System, str] = {"coupled": "coupled (baseline)", "penstock": "Penstock"}


def demo_workload(sessions: int, turns_max: int, seed: int) -> Workload:
    """DualPath's 32K agents at a quarter of tokens and turns, with shortened answers and a shared system prompt."""
    agents = agent_trajectories(
        "32K",
        sessions,
        seed,
        rate_per_s=3.0,  # gives the order of the sessions; `paced` sets their start and think times
        token_divisor=4,
        turns_divisor=4,
        turns_max=turns_max,
        shared_prefix_tokens=384,
        think_s=4.0,
        answer_tokens_max=8,
    )
    return with_multipliers(agents, seed)


def paced(workload: Workload, alone: Calibration, reusable: Mapping[RequestName, int], replay_s_max: float) -> Workload:
    """The workload at this machine's speed, so that every machine shows the same picture: sessions start as fast as it
    computes their first prompts, and think times are such that further turns demand `OFFERED_LOAD` times the baseline's
    capacity. A slow machine gets fewer sessions, so that a replay ends in time."""

    def alone_s(name: str, turn: int) -> float:
        asked = turns[name][turn]
        cached = reusable[name, turn]
        return alone.ttft.ttft_s(cached, asked.prompt_tokens - cached) + alone.decode_s * (asked.max_tokens - 1)

    turns = {session.name: session.turns for session in workload.sessions}
    first_s = [alone_s(name, 0) for name in turns]
    later_s = [alone_s(name, turn) for name in turns for turn in range(1, len(turns[name]))] or [0.0]
    gap_s = START_SPARE * sum(first_s) / len(first_s)
    turn_s = sum(later_s) / len(later_s)
    each_s = gap_s + (max(map(len, turns.values())) - 1) * turn_s * (1.0 + 1.0 / OFFERED_LOAD)
    count = max(1, min(len(turns), int(REPLAY_SHARE * replay_s_max / each_s)))
    think_s = count * turn_s / OFFERED_LOAD
    sessions = sorted(workload.sessions, key=lambda session: session.start_s)[:count]
    return replace(
        workload,
        sessions=tuple(
            replace(
                session,
                start_s=number * gap_s,
                turns=tuple(replace(turn, think_s=think_s if i else 0.0) for i, turn in enumerate(session.turns)),
            )
            for number, session in enumerate(sessions)
        ),
    )


def demo_bed(model: Path, workload: Workload, pace: str) -> Bed:
    """Device memory for four of the longest contexts, but at most a third of what the sessions hold at the end, so that
    a session's KV has to come from the pool again at its next turn."""
    longest = workload.context_tokens_max
    working_set = sum(session.turns[-1].prompt_tokens for session in workload.sessions)
    return Bed(
        model=model,
        block_tokens=BLOCK_TOKENS,
        l1_tokens=max(longest + longest // 4, min(4 * longest, working_set // 3)),
        l2_bytes=32 * 2**20,
        pool_bytes=2**30,
        pace=pace,
        sessions_at_once=len(workload.sessions),
    )


def demo(
    out: Annotated[Path, typer.Option(help="Folder for demo.html, demo.png and demo.json.")] = Path("out"),
    sessions: Annotated[int, typer.Option(min=1, max=256, help="Agent sessions.")] = 30,
    turns: Annotated[int, typer.Option(min=1, max=200, help="Most turns of a session.")] = 5,
    pace: Annotated[str, typer.Option(help="Rate limit of the pool node's sending, as of a NIC.")] = "25MB/s",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sessions and of the model's weights.")] = 0,
    minutes: Annotated[float, typer.Option(min=0.1, max=60, help="Longest time for both replays together.")] = 2.0,
) -> None:
    """Replays multi-turn agent sessions over HTTP, coupled and with Penstock; writes table, page and picture."""
    from penstock.testing.tiny_models import build_demo_checkpoint

    console = Console(stderr=True)
    workload = demo_workload(sessions, turns, seed)
    report = Report("demo")
    runs: dict[System, Run] = {}
    try:
        with tempfile.TemporaryDirectory(prefix="penstock-demo-") as folder:
            with console.status("building a small Llama with random weights"):
                bed = demo_bed(build_demo_checkpoint(Path(folder), seed=seed), workload, pace)
            with progress_bar(console) as progress:
                alone = calibrate(bed, workload, CALIBRATION_REQUESTS, 60.0, progress)
                reusable = reusable_tokens(workload, bed.vocabulary, bed.block_tokens)
                workload = paced(workload, alone, reusable, minutes * 30)
                bed = demo_bed(bed.model, workload, pace)
                reusable = reusable_tokens(workload, bed.vocabulary, bed.block_tokens)
                deadlines = deadlines_s(workload, reusable, alone.ttft)
                for system in SYSTEMS:
                    runs[system] = run_system(bed, system, workload, deadlines, minutes * 30, progress)
            sizes = _sizes(bed, workload)
            check = _load_check(bed, workload, runs["penstock"])
    except SystemFailed as error:
        refuse("python -m benchmarks demo", error, status=1)
    check.add_to(report)
    _finish(report, runs, sizes, pace, out, console)
    if report.figures["failed_requests"]:
        errors = {record.error for run in runs.values() for record in run.records if record.error}
        console.print(f"failed requests: {sorted(map(str, errors))[:3]}", style="bold red")
        raise typer.Exit(1)
    refuse_empty("python -m benchmarks demo", check.problems(), console)


def _load_check(bed: Bed, workload: Workload, run: Run) -> LoadCheck:
    held = sum(session.turns[-1].prompt_tokens for session in workload.sessions)
    link = None if bed.pace is None else parse_rate(bed.pace) * run.wall_s
    kv = bed.kv_bytes_per_token
    return LoadCheck(held, bed.l1_tokens, loaded_bytes(run.records), prompt_bytes(run.records, kv), link)


def _sizes(bed: Bed, workload: Workload) -> str:
    kv = bed.kv_bytes_per_token
    return (
        f"{workload.requests} requests of {len(workload.sessions)} sessions, contexts up to "
        f"{workload.context_tokens_max} tokens, {kv} B of KV per token; device memory for {bed.l1_tokens} tokens "
        f"({bed.l1_tokens * kv / 1e6:.1f} MB), staging {bed.l2_bytes / 1e6:.1f} MB, pool {bed.pool_bytes / 1e6:.0f} MB"
    )


def _finish(report: Report, runs: dict[System, Run], sizes: str, pace: str, out: Path, console: Console) -> None:
    """Figures, table, page, picture and JSON."""
    report.modelled.append(f"the pool node's link is paced to {pace}; bytes, sockets, KV and compute are real")
    report.notes.append(sizes)
    report.notes.append("SLO: TTFT of the coupled system without interference (fitted) times 2, 4 or 8, drawn evenly")
    summaries = {system: summarize_records(run.records) for system, run in runs.items()}
    for system, summary in summaries.items():
        add_figures(report, system, summary)
        report.figure(f"{system}_wall_s", runs[system].wall_s)
    report.figure("failed_requests", sum(summary.failed for summary in summaries.values()), limit=0)
    coupled, penstock = runs["coupled"].records, runs["penstock"].records
    report.figure("outputs_equal", outputs_equal(penstock, coupled), limit=1.0)
    if summaries["coupled"].ttft is not None and summaries["penstock"].ttft is not None:
        add_ratio(report, "ttft_ratio", penstock, coupled)
    longest_s = {system: max((record.total_s for record in run.records), default=0.0) for system, run in runs.items()}
    report.figure("longest_request_ratio", longest_s["penstock"] / max(longest_s["coupled"], 1e-9), limit=1.0)
    panels = [Panel(TITLES[system], runs[system].records, facts(summaries[system])) for system in runs]
    write_html(
        out / "demo.html",
        "Penstock demo: agent sessions over HTTP",
        sizes,
        panels,
        [*report.modelled, *report.notes[1:]],
    )
    title = "The same requests on two systems: time to first token"
    write_figure(out / "demo.png", title, panels)
    write_figure(out / "demo_dark.png", title, panels, dark=True)
    report.write_json(out / "demo.json")
    print_table(Console(), "python -m benchmarks demo", summaries)
    console.print(f"modelled: {report.modelled[0]}")
    console.print(f"wrote {out / 'demo.html'}, {out / 'demo.png'}, {out / 'demo_dark.png'}, {out / 'demo.json'}")
