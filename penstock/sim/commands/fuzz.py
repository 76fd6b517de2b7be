"""`penstock sim fuzz`: random engines, clusters, requests and faults against the core; shrinks a failing case."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from penstock.core.config import ConfigError
from penstock.report import Report
from penstock.sim.fuzz.case import FuzzCase
from penstock.sim.fuzz.outcome import AnyCase, case_of, failure_of, outcome_of, read_case, shrunk, write_case

SEEDS_AT_ONCE = 100


def run_seeds(first: int, seeds: int) -> tuple[int, list[tuple[int, str]]]:
    """Number of events of all cases, and (seed, failure) of the failing ones."""
    events, failed = 0, []
    for seed in range(first, first + seeds):
        happened, failure = outcome_of(case_of(seed))
        events += happened
        if failure is not None:
            failed.append((seed, failure))
    return events, failed


def _batches(first: int, seeds: int) -> Iterator[tuple[int, int]]:
    for start in range(first, first + seeds, SEEDS_AT_ONCE):
        yield start, min(SEEDS_AT_ONCE, first + seeds - start)


def fuzz(
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds to try.")] = 1000,
    first: Annotated[int, typer.Option(min=0, help="The first seed.")] = 0,
    processes: Annotated[int, typer.Option(min=0, help="Processes to use; 0: one per processor.")] = 0,
    replay: Annotated[Path | None, typer.Option(help="Run the case in this file, and print its result.")] = None,
    out: Annotated[Path, typer.Option(help="File for the shrunk failing case.")] = Path("out/fuzz-failure.json"),
    json: Annotated[Path | None, typer.Option(help="Write the figures to this file.")] = None,
) -> None:
    """Runs random engines, clusters, requests and faults against the core; checks its invariants after every event."""
    console = Console()
    if replay is not None:
        raise typer.Exit(_replay(replay, console))
    workers = processes or len(os.sched_getaffinity(0))
    started_s = time.monotonic()
    events, failed = 0, list[tuple[int, str]]()
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("seeds", total=seeds)
        for size, ran, bad in _run_all(first, seeds, workers):
            events += ran
            failed += bad
            progress.advance(task, size)
    report = Report("sim fuzz")
    report.figure("seeds", seeds)
    report.figure("failed_seeds", len(failed), 0)
    report.figure("events", events)
    report.figure("seconds", time.monotonic() - started_s)
    if json is not None:
        report.write_json(json)
    report.print(console)
    if failed:
        _explain(failed, out, console)
        raise typer.Exit(1)


def _run_all(first: int, seeds: int, workers: int) -> Iterator[tuple[int, int, list[tuple[int, str]]]]:
    """Seeds, events and failures of each batch, in order."""
    batches = list(_batches(first, seeds))
    if workers == 1:
        yield from ((size, *run_seeds(start, size)) for start, size in batches)
        return
    with ProcessPoolExecutor(workers) as pool:
        done = pool.map(run_seeds, *zip(*batches, strict=True))
        yield from ((size, *result) for (_, size), result in zip(batches, done, strict=True))


def _explain(failed: list[tuple[int, str]], out: Path, console: Console) -> None:
    """Prints the first failing seed's failure, shrunk, and how to run it again."""
    seed, failure = failed[0]
    console.print(f"seed {seed} fails: {failure}", markup=False, soft_wrap=True)
    small = shrunk(case_of(seed))
    write_case(out, small)
    console.print(f"shrunk: {_size_of(small)}: {failure_of(small)}", markup=False, soft_wrap=True)
    console.print(f"reproduce with: penstock sim fuzz --replay {out}", markup=False, soft_wrap=True)


def _size_of(case: AnyCase) -> str:
    who = f"{len(case.requests)} requests" if isinstance(case, FuzzCase) else f"{len(case.agents)} agents"
    return f"{who}, {len(case.faults)} faults"


def _replay(path: Path, console: Console) -> int:
    try:
        case = read_case(path)
        events, failure = outcome_of(case)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    if failure is None:
        console.print(f"all invariants hold over {events} events")
        return 0
    console.print(f"fails: {failure}", markup=False, soft_wrap=True)
    return 1
