"""`penstock sim run`: simulates what a TOML file describes: an engine or a cluster, a workload, policies, faults."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from penstock.command_line import PlotFile
from penstock.core.config import ConfigError
from penstock.report import Report
from penstock.sim.cluster_file import Simulation, read_simulation
from penstock.sim.commands.run_cluster import ClusterSimulation
from penstock.sim.commands.run_engine import EngineSimulation
from penstock.sim.commands.run_result import Result


def simulate(simulation: Simulation, folder: Path = Path(), trace_out: Path | None = None) -> Result:
    """Run a simulation. Traces are read from `folder`; `trace_out` receives a Chrome trace. The same seed gives the
    same result. Raises ConfigError."""
    one = (
        EngineSimulation(simulation, folder) if simulation.engine is not None else ClusterSimulation(simulation, folder)
    )
    result = one.run(traced=trace_out is not None)
    if trace_out is not None:
        trace_out.parent.mkdir(parents=True, exist_ok=True)
        one.trace.write(trace_out)
    return result


def run(
    file: Annotated[Path, typer.Argument(help="A TOML file (docs/reference/simulator.md; deploy/sim-*.toml).")],
    seed: Annotated[int | None, typer.Option(min=0, help="Seed to use instead of the file's.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the figures to this file.")] = None,
    plot: PlotFile = None,
    trace_out: Annotated[
        Path | None, typer.Option(help="Write a Chrome trace (Perfetto reads it) to this file.")
    ] = None,
) -> None:
    """Simulates what a file describes: latencies, SLO attainment, goodput, link use over time, balance."""
    try:
        simulation = read_simulation(file)
        if seed is not None:
            simulation = simulation.seeded(seed)
        result = simulate(simulation, file.parent, trace_out)
        if plot is not None:
            result.draw(plot, file.stem)
    except (ConfigError, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        raise typer.Exit(2) from None
    report = Report("sim run")
    report.modelled.append("everything: virtual clock, links as fluids or queues, compute as the model's profile says")
    result.into(report)
    report.print(Console())
    if json is not None:
        report.write_json(json)
