"""`penstock sim`: one sub-command per experiment; each experiment lives in a module of its own."""

from __future__ import annotations

import typer

from penstock.sim.experiments.calvo import calvo_command
from penstock.sim.experiments.cost import cost
from penstock.sim.experiments.dualpath import dualpath
from penstock.sim.experiments.fuzz import fuzz
from penstock.sim.experiments.pool import pool
from penstock.sim.experiments.run import run
from penstock.sim.experiments.tables import tables
from penstock.sim.experiments.validate import validate
from penstock.sim.plan import plan

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
