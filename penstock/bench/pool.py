"""`penstock bench pool`: this machine's memory and disk through the pool, compared with their bare speed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from penstock.command_line import refuse
from penstock.pool.api import PoolError
from penstock.report import Report
from penstock.workloads.progress import steps_shown

SLAB_BYTES = 1 << 30
QUICK_SLAB_BYTES = 128 << 20


def pool(
    path: Annotated[Path, typer.Option(help="Folder on the disk to measure, for slabs and files.")] = Path("."),
    quick: Annotated[bool, typer.Option(help="One short repeat of everything: checks that it runs.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write the figures to this file.")] = None,
) -> None:
    """CPU per GB against one file per chunk, and reads of memory and disk as one pool against the sum of both alone."""
    from penstock.bench.pool_raw import measure_cpu, measure_sum

    console = Console()
    report = Report("pool")
    repeats, run_s, slab_bytes = (1, 0.1, QUICK_SLAB_BYTES) if quick else (None, None, SLAB_BYTES)
    try:
        with steps_shown(console, path) as (folder, step):
            measure_cpu(report, folder, repeats or 5, run_s or 0.5, slab_bytes, step)
            measure_sum(report, folder, repeats or 7, run_s or 1.0, slab_bytes, step)
    except (OSError, ValueError, RuntimeError, PoolError) as error:
        refuse("penstock bench pool", error, status=1)
    if quick:
        report.notes.append(
            "--quick: one short repeat of each; it checks that everything runs; the figures mean nothing"
        )
    report.print(console)
    if json is not None:
        report.write_json(json)
