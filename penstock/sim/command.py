"""`penstock sim`: one sub-command per experiment; each experiment lives in a module of its own."""

from __future__ import annotations

import typer

from benchmarks.calvo.simulated import calvo_command
from benchmarks.dualpath.simulated import dualpath
from benchmarks.pooling.simulated import pool
from benchmarks.tables import tables
from penstock.sim.commands.cost import cost
from penstock.sim.commands.fuzz import fuzz
from penstock.sim.commands.plan import plan
from penstock.sim.commands.run import run
from penstock.sim.commands.validate import validate

sim = typer.Typer(
    help="The same brain on a virtual clock: your cluster from a file (begin with `run deploy/sim-engine.toml`), "
    "plans, the papers' tables, randomised faults. docs/simulator.md says what is modelled.",
    no_args_is_help=True,
)
sim.command()(run)
sim.command()(plan)
sim.command()(tables)
sim.command(name="calvo")(calvo_command)
sim.command()(pool)
sim.command()(dualpath)
sim.command()(validate)
sim.command()(fuzz)
sim.command()(cost)
