"""`benchmarks sim-pool`: the command; its computation is in `simulated_ttft`, which is imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.pooling.live import CONTEXT_NAMES, MODEL_NAMES
from penstock.command_line import PlotFile
from penstock.report import Report
from penstock.workloads.plots import bar_chart


def pool(
    json: Annotated[Path | None, typer.Option(help="Write the figures to this file.")] = None,
    plot: PlotFile = None,
    model: Annotated[list[str] | None, typer.Option(help=f"Models: {', '.join(MODEL_NAMES)}. Default: all.")] = None,
    context: Annotated[
        list[str] | None, typer.Option(help=f"Contexts: {', '.join(CONTEXT_NAMES)}. Default: all.")
    ] = None,
) -> None:
    """Unified KV Pooling on its own hardware: 2 memories and 2 SSDs as one pool, 16K to 128K of context."""
    models, contexts = tuple(model or MODEL_NAMES), tuple(context or CONTEXT_NAMES)
    for given, allowed in (*((m, MODEL_NAMES) for m in models), *((c, CONTEXT_NAMES) for c in contexts)):
        if given not in allowed:
            raise typer.BadParameter(f"{given!r}; allowed: {', '.join(allowed)}")
    from benchmarks.pooling.simulated_ttft import tables, ttft_bars

    report = Report("sim pool")
    tables(report, models, contexts)
    report.print(Console())
    if json is not None:
        report.write_json(json)
    if plot is not None:
        bar_chart(plot, "Unified KV Pooling simulated: TTFT by context", "TTFT, s", ttft_bars(report, models, contexts))
