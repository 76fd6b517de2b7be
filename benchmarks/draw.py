"""`benchmarks draw`: the picture of a run, from the figures that it wrote."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from penstock.command_line import can_plot, refuse
from penstock.report import read_report

DRAWN = {
    "calvo": "benchmarks.calvo.live",
    "io": "penstock.bench.io",
    "scale": "penstock.bench.scale",
    "transport": "penstock.bench.transport",
    "vllm": "benchmarks.peers.vllm_report",
}


def draw(
    run: Annotated[Path, typer.Argument(help=f"What one of these wrote with --json: {', '.join(DRAWN)}.")],
    picture: Annotated[Path, typer.Argument(help="The picture (PNG, SVG or PDF).", callback=can_plot)],
) -> None:
    """Draws the picture of a run from the figures that it wrote, the same as with its --plot."""
    try:
        report = read_report(run)
        if report.experiment not in DRAWN:
            raise ValueError(f"{run}: the experiment is {report.experiment!r}; allowed: {', '.join(DRAWN)}")
        import_module(DRAWN[report.experiment]).draw(picture, report)
    except (OSError, ValueError) as error:
        refuse("python -m benchmarks draw", error)
