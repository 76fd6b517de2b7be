"""`penstock sim fuzz`: random engines, requests and faults against the brain; a failing one is shrunk and replayed."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.progress import Progress

from penstock.bench.report import Report
from penstock.core.config import ConfigError
from penstock.sim.fuzz_case import FuzzCase, random_case
from penstock.sim.fuzz_run import failure_of, outcome_of
from penstock.sim.fuzz_shrink import shrink

SEEDS_AT_ONCE = 100


def run_seeds(first: int, seeds: int) -> tuple[int, list[tuple[int, str]]]:
    """Events of all cases, and (seed, failure) of those that fail."""
    events, failed = 0, []
    for seed in range(first, first + seeds):
        happened, failure = outcome_of(random_case(seed))
        events += happened
        if failure is not None:
            failed.append((seed, failure))
    return events, failed


def _batches(first: int, seeds: int) -> Iterator[tuple[int, int]]:
    for start in range(first, first + seeds, SEEDS_AT_ONCE):
        yield start, min(SEEDS_AT_ONCE, first + seeds - start)


def fuzz(
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds to try.")] = 1000,
    first: Annotated[int, typer.Option(min=0, help="The first of them.")] = 0,
    processes: Annotated[int, typer.Option(min=0, help="Processes to use; 0: one per processor.")] = 0,
    replay: Annotated[Path | None, typer.Option(help="Run the case in this file instead, and say how it ends.")] = None,
    out: Annotated[Path, typer.Option(help="Where the shrunk case of a failure goes.")] = Path("out/fuzz-failure.json"),
    json: Annotated[Path | None, typer.Option(help="Write the figures to this file.")] = None,
) -> None:
    """Random engines, pools, requests and faults against the brain, its invariants asserted after every event."""
    console = Console()
    if replay is not None:
        raise typer.Exit(_replay(replay, console))
    workers = processes or len(os.sched_getaffinity(0))
    started_s = time.monotonic()
    events, failed = 0, list[tuple[int, str]]()
    with ProcessPoolExecutor(workers) as pool, Progress(console=console, transient=True) as progress:
        task = progress.add_task("seeds", total=seeds)
        batches = list(_batches(first, seeds))
        for (_, size), (ran, bad) in zip(batches, pool.map(run_seeds, *zip(*batches, strict=True)), strict=True):
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
        seed, failure = failed[0]
        console.print(f"seed {seed} fails: {failure}", markup=False)
        small = shrink(random_case(seed), failure_of)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(msgspec.json.format(msgspec.json.encode(small)) + b"\n")
        console.print(
            f"shrunk: {len(small.requests)} requests, {len(small.faults)} faults: {failure_of(small)}", markup=False
        )
        console.print(f"again with: penstock sim fuzz --replay {out}", markup=False)
        raise typer.Exit(1)


def read_case(path: Path) -> FuzzCase:
    """A case from its file. Raises ConfigError with one line."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=FuzzCase)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from None


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
    console.print(f"fails: {failure}", markup=False)
    return 1
