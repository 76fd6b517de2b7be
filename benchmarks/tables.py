"""`benchmarks sim-tables`: the three papers' tables, each figure with the paper's and the fluid lower bound."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.calvo import simulated as calvo
from benchmarks.dualpath import simulated as dualpath
from benchmarks.pooling.live import CONTEXT_NAMES, MODEL_NAMES
from penstock.report import Report
from penstock.workloads.generators import CALVO_DATASETS

PAPERS = ("calvo", "pool", "dualpath")


def tables(
    json: Annotated[Path | None, typer.Option(help="Write the figures to this file.")] = None,
    paper: Annotated[list[str] | None, typer.Option(help=f"Papers: {', '.join(PAPERS)}. Default: all.")] = None,
    seeds: Annotated[int, typer.Option(min=1, max=100, help="Number of workloads per CALVO dataset.")] = 1,
    trace: Annotated[
        Path | None, typer.Option(help="Recorded sessions for part `beyond` of DualPath: a folder of JSON files.")
    ] = None,
    full: Annotated[bool, typer.Option(help="All points of DualPath: an hour or more on one core.")] = False,
) -> None:
    """All three papers on their own hardware; limits are the papers' figures, or bounds."""
    chosen = tuple(paper or PAPERS)
    for name in chosen:
        if name not in PAPERS:
            raise typer.BadParameter(f"{name!r}; allowed: {', '.join(PAPERS)}")
    report = Report("sim tables")
    console = Console()
    for name in chosen:
        part = Report(f"sim {name}")
        if name == "calvo":
            machine = calvo.Machine("llama", calvo.FETCH_BYTES_PER_S)
            calvo.tables(part, machine, tuple(CALVO_DATASETS), calvo.RATES, seeds)
        elif name == "pool":
            from benchmarks.pooling import simulated_ttft as pooling

            pooling.tables(part, MODEL_NAMES, CONTEXT_NAMES)
        else:
            dualpath.tables(part, not full, trace)
        part.print(console)
        report.add(name, part)
    if json is not None:
        report.write_json(json)
