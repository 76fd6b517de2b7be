"""`penstock sim`: one sub-command per module of `commands`."""

from __future__ import annotations

import typer

from penstock.sim.commands.cost import cost
from penstock.sim.commands.fuzz import fuzz
from penstock.sim.commands.plan import plan
from penstock.sim.commands.run import run
from penstock.sim.commands.validate import validate

sim = typer.Typer(
    help="The real scheduler core on a virtual clock: your cluster from a file (begin with `run "
    "deploy/sim-engine.toml`), plans, randomised faults. docs/reference/simulator.md says what is modelled.",
    no_args_is_help=True,
)
sim.command()(run)
sim.command()(plan)
sim.command()(validate)
sim.command()(fuzz)
sim.command()(cost)
