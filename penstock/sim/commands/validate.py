"""`penstock sim validate`: simulates recorded live runs from their own profile, and compares TTFT."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track

from penstock.core.bandwidth import LinkCost
from penstock.core.config import ConfigError, SchedulerConfig
from penstock.core.cost import ComputeCost, CostModel
from penstock.core.engine.scheduler import LoadScheduler
from penstock.core.keys import KeyChain, root_key
from penstock.core.operations import BlockHit, RequestSpec
from penstock.report import Report
from penstock.sim.clock import VirtualClock
from penstock.sim.engine_driver import EngineDriver, Overheads, ideal_links
from penstock.workloads.recording import RecordedRun, read_runs
from penstock.workloads.statistics import percentile

MEDIAN_GOAL, P99_GOAL = 0.10, 0.25


def predicted_ttfts_s(run: RecordedRun) -> list[float]:
    """Simulated TTFT of each request of a run: same core, settings, arrivals and hits, with the profile's links."""
    fields: dict[str, Any] = dict(run.config)
    config, profile = SchedulerConfig(**fields), run.profile
    cost = CostModel(LinkCost(profile.upload_bytes_per_s), ComputeCost(*profile.compute))
    cost.links = {name: LinkCost(speed) for name, speed in profile.link_bytes_per_s.items()}
    clock = VirtualClock()
    root = root_key(b"recorded", "")
    pool: dict[bytes, BlockHit] = {}
    overheads = Overheads(profile.lookup_s, profile.fetch_overhead_s, 0.0, profile.compute_overhead_s)
    links = ideal_links(clock, profile.link_bytes_per_s, profile.upload_bytes_per_s)
    scheduler = LoadScheduler(config, cost)
    driver = EngineDriver(clock, scheduler, pool, links, ComputeCost(*profile.compute), overheads=overheads)
    for number, request in enumerate(run.requests):
        tokens = [number, *range(1, request.prompt_tokens)]
        keys = KeyChain(root, config.block_tokens).extend(tokens)
        for key, route in zip(keys, request.held, strict=False):
            pool[key] = BlockHit(config.block_bytes, profile.routes[route])
        driver.submit_at(request.start_s, RequestSpec(str(number), tokens, 1, root, request.start_s + request.slo_s))
    driver.run()
    found = []
    for number in range(len(run.requests)):
        account = driver.ended[str(number)].account
        assert account is not None and account.first_token_s is not None
        found.append(account.first_token_s - account.arrival_s)
    return found


def validate(
    recording: Annotated[
        list[Path], typer.Argument(help="Files written by python -m benchmarks calvo and pool (--record).")
    ],
    json: Annotated[Path | None, typer.Option(help="Write the figures to this file.")] = None,
) -> None:
    """Simulates recorded live runs from their own profile; prints the error of the predicted TTFT by request."""
    report = Report("sim validate")
    try:
        recorded = [(path, read_runs(path)) for path in recording]
    except ConfigError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None
    for path, runs in recorded:
        errors: dict[str, list[float]] = {}
        for run in track(runs, path.name, transient=True):
            predicted = predicted_ttfts_s(run)
            mode = str(run.config["mode"])
            for guess, request in zip(predicted, run.requests, strict=True):
                errors.setdefault(mode, []).append(abs(guess / request.ttft_s - 1))
        for mode, found in errors.items():
            label = f"{path.stem}_{mode}"
            report.figure(f"{label}_requests", len(found))
            report.figure(f"{label}_error_median", statistics.median(found), MEDIAN_GOAL)
            report.figure(f"{label}_error_p99", percentile(found, 99), P99_GOAL)
    report.print(Console())
    if json is not None:
        report.write_json(json)
