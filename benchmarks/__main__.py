"""`python -m benchmarks NAME`, in a checkout: one command and module per experiment."""

from __future__ import annotations

import typer

from benchmarks.calvo.live import calvo
from benchmarks.calvo.simulated import calvo_command
from benchmarks.demo.demo import demo
from benchmarks.dualpath import simulated as simulated_dualpath
from benchmarks.dualpath.live import dualpath
from benchmarks.peers.vllm import vllm
from benchmarks.pooling import simulated as simulated_pool
from benchmarks.pooling.live import pool
from benchmarks.tables import tables

app = typer.Typer(
    name="python -m benchmarks",
    help="The papers' experiments, live and simulated, and Penstock beside other systems; docs/measurements/README.md.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(demo)
app.command()(calvo)
app.command()(pool)
app.command()(dualpath)
app.command()(vllm)
app.command("sim-tables")(tables)
app.command("sim-calvo")(calvo_command)
app.command("sim-pool")(simulated_pool.pool)
app.command("sim-dualpath")(simulated_dualpath.dualpath)

if __name__ == "__main__":
    app(prog_name="python -m benchmarks")
