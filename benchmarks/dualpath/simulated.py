"""`benchmarks sim-dualpath`: DualPath's tables on its own hardware, beside its figures and the fluid lower bound."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.dualpath.simulated_beyond import beyond
from benchmarks.dualpath.simulated_offline import SET_UPS, ablation, offline, ratios
from benchmarks.dualpath.simulated_online import online
from benchmarks.dualpath.simulated_scale import decision_cost, heartbeat_cost, scale
from penstock.command_line import PlotFile
from penstock.report import Report
from penstock.sim.cluster_shape import BASIC, LEVEL, ORACLE, PAPER, SPLIT
from penstock.workloads.plots import bar_chart

PARTS = ("offline", "ablation", "ratios", "online", "beyond", "scale")
FULL_AGENTS, QUICK_AGENTS = (256, 512, 1024, 2048, 4096), (256, 1024)
SHOWN = {"Basic": BASIC, "the paper's policy": PAPER, "split reads": SPLIT, "level steps": LEVEL, "Oracle": ORACLE}
MODELLED = (
    "everything: virtual clock; storage and compute NICs as ideal links of 400 Gbit/s, compute and decode times by "
    "arithmetic from public sizes at 400 TFLOP/s and 2.68 TB/s per GPU (models/*.toml); trajectories are generated "
    "with the means of the paper's table; writes, host memory bandwidth and switches cost nothing"
)


def tables(report: Report, quick: bool, trace: Path | None = None, parts: Sequence[str] = PARTS) -> None:
    """All figures of the chosen parts, with the paper's as limits."""
    report.modelled.append(MODELLED)
    run: dict[str, Callable[[], None]] = {
        "offline": lambda: offline(
            report, tuple(SET_UPS), ("64K",) if quick else ("32K", "48K", "64K"), QUICK_AGENTS if quick else FULL_AGENTS
        ),
        "ablation": lambda: ablation(report, 1024 if quick else 2048),
        "ratios": lambda: ratios(report, 512 if quick else 1024),
        "online": lambda: online(report, "64K", 1800.0 if quick else 3600.0, 4 if quick else 6),
        "beyond": lambda: beyond(report, 512 if quick else 1024, trace),
        "scale": lambda: _scale(report, quick),
    }
    for part in parts:
        run[part]()


def _scale(report: Report, quick: bool) -> None:
    decision_cost(report)
    heartbeat_cost(report)
    scale(report, 4 if quick else 24, 4 if quick else 1)


def dualpath(
    json: Annotated[Path | None, typer.Option(help="Write the figures to this file.")] = None,
    plot: PlotFile = None,
    part: Annotated[list[str] | None, typer.Option(help=f"Parts: {', '.join(PARTS)}. Default: all.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Recorded sessions for `beyond`: a folder of JSON files.")] = None,
    full: Annotated[bool, typer.Option(help="All points of the paper: an hour or more on one core.")] = False,
) -> None:
    """DualPath on its own hardware: job times, ablation, P/D ratios, online capacity, scale, and beyond the paper."""
    parts = tuple(part or PARTS)
    for name in parts:
        if name not in PARTS:
            raise typer.BadParameter(f"{name!r}; allowed: {', '.join(PARTS)}")
    report = Report("sim dualpath")
    tables(report, not full, trace, parts)
    report.print(Console())
    if json is not None:
        report.write_json(json)
    if plot is not None and "offline" in parts:
        _plot(plot, report, FULL_AGENTS if full else QUICK_AGENTS)


def _plot(path: Path, report: Report, agents: Sequence[int]) -> None:
    """Job times of agents of 64K over that of Basic, by set-up, number of agents and system."""
    panels: dict[str, dict[str, dict[str, float]]] = {}
    for name, set_up in SET_UPS.items():
        groups = panels[f"{set_up.model}, {set_up.shape.name}"] = {}
        for count in agents:
            label = f"offline_{name}_{set_up.shape.name}_64K_{count}"
            jobs_s = {title: report.figures[f"{label}_{system.name}_job_s"] for title, system in SHOWN.items()}
            jobs_s["fluid bound"] = report.figures[f"{label}_fluid_bound_s"]
            groups[f"{count} agents"] = {title: job_s / jobs_s["Basic"] for title, job_s in jobs_s.items()}
    bar_chart(path, "DualPath simulated, 64K agents: job time over that of Basic", "job time", panels)
