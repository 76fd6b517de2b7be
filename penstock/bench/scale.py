"""`penstock bench scale`: what a pool of many blocks and a router of many engines cost on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from penstock.bench.processes import ProcessFailed
from penstock.command_line import PlotFile, refuse
from penstock.pool.api import PoolError
from penstock.report import Report
from penstock.workloads.plots import SERIES_COLOURS, new_figure, save_figure, tidy
from penstock.workloads.progress import steps_shown

BLOCKS = 1_000_000
QUICK_BLOCKS = 20_000
NOTES = (
    "CPU time of one thread per block or key; ..._before: measured with the table of objects",
    "engine_*, node_*: CPU time of a whole process per block of 4 KiB; the nodes run beside it",
    "copies_*: paced links (20 MB/s) of nodes of this process, with --replicate 0.4; ..._off: 0",
    "router_*: CPU time of the router's process; 1,365 heartbeats/s; HTTP and tokenizer left out",
    "router_http_*: with HTTP, 2,048 token ids each; ..._at_the_placer: of a router with 2 fronts",
)


def scale(
    path: Annotated[Path, typer.Option(help="Folder for a table file of 170 bytes per block.")] = Path("."),
    blocks: Annotated[int, typer.Option(min=4096, help="Blocks in the table.")] = BLOCKS,
    quick: Annotated[bool, typer.Option(help="Few blocks: checks that it runs.")] = False,
    rounds: Annotated[
        int | None,
        typer.Option(min=1, help="Only this: fill the table, then write, hit and evict so many times its blocks."),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write the figures to this file.")] = None,
    plot: PlotFile = None,
) -> None:
    """CPU time, memory and stops of the table of one pool node with a million blocks; CPU time of engines and nodes per
    block over the network; of a router per heartbeat of an engine, per long prompt and per HTTP request. Each beside
    its goal, and beside what it was before (`..._before`): when every block was an object and travelled alone, and a
    prompt was a list."""
    from penstock.bench.scale_copies import measure_copies
    from penstock.bench.scale_fronts import measure_fronts
    from penstock.bench.scale_network import measure_network
    from penstock.bench.scale_prefix_read import measure_prefix_reads
    from penstock.bench.scale_rounds import measure_rounds
    from penstock.bench.scale_router import measure_router
    from penstock.bench.scale_table import measure_open, measure_table

    console = Console()
    report = Report("scale")
    count = QUICK_BLOCKS if quick else blocks
    try:
        with steps_shown(console, path) as (folder, step):
            if rounds is not None:
                measure_rounds(report, count, rounds, step, console.print)
            else:
                measure_table(report, count, step)
                measure_open(report, count, folder, step)
                measure_network(report, count <= QUICK_BLOCKS, step)
                measure_prefix_reads(report, count <= QUICK_BLOCKS, step)
                measure_copies(report, count <= QUICK_BLOCKS, step)
                measure_router(report, count <= QUICK_BLOCKS, step)
                measure_fronts(report, count <= QUICK_BLOCKS, step)
    except (OSError, ValueError, PoolError, ProcessFailed) as error:
        refuse("penstock bench scale", error, status=1)
    if rounds is None:
        report.notes += NOTES
    if quick:
        report.notes.append("--quick: few blocks; it checks that everything runs; the figures mean nothing")
    report.print(console)
    if json is not None:
        report.write_json(json)
    if plot is not None:
        draw(plot, report)


def draw(path: Path, report: Report) -> None:
    """Each cost over its goal, now and before, on a logarithmic axis; of a rate the goal over it."""
    names = [name for name in report.limits if name in report.figures and report.limits[name] > 0]
    names = [name for name in names if f"{name}_before" in report.figures and not name.endswith("_max")]
    figure = new_figure(9.0, 1.6 + 0.45 * len(names))
    axes = figure.subplots()
    places = list(range(len(names), 0, -1))
    for label, suffix, colour in (("before", "_before", SERIES_COLOURS[6]), ("now", "", SERIES_COLOURS[0])):
        ratios = [report.figures[name + suffix] / report.limits[name] for name in names]
        ratios = [1 / ratio if name.endswith("_per_s") else ratio for name, ratio in zip(names, ratios, strict=True)]
        axes.plot(ratios, places, "o", markersize=8, color=colour, label=label)
    axes.axvline(1.0, color="#333333", linewidth=1, label="goal")
    axes.set_yticks(places, [f"{name} (goal {report.limits[name]:g})" for name in names], fontsize=9)
    axes.set_xscale("log")
    axes.set_xlabel("over its goal (of a rate: the goal over it); less is better")
    figure.suptitle("A pool of a million blocks", fontsize=12, x=0.01, ha="left")
    tidy(axes, grid="x")
    axes.legend(frameon=False, fontsize=9)
    save_figure(figure, path)
