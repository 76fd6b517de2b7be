"""The `penstock` command: one line per sub-command; each lives beside what it drives and imports heavy things late."""

from __future__ import annotations

from typing import Annotated

import typer

from penstock import __version__
from penstock.bench.command import bench
from penstock.cluster.deploy.fabric_command import fabric
from penstock.cluster.deploy.up_command import up
from penstock.cluster.engine.serve_command import serve
from penstock.cluster.router.router_command import router
from penstock.doctor.command import doctor
from penstock.io.spdk.command import app as spdk_app
from penstock.pool.setup.pool_command import pool_app
from penstock.pool.setup.profile_command import profile
from penstock.sim.command import sim
from penstock.vllm.command import PASSED_THROUGH, vllm

app = typer.Typer(
    name="penstock",
    help="LLM serving for requests whose time goes into loading KV cache rather than computing it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"penstock {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """LLM serving for requests whose time goes into loading KV cache rather than computing it."""


app.command()(serve)
app.command()(router)
app.command()(up)
app.command()(fabric)
app.command(context_settings=PASSED_THROUGH)(vllm)
app.add_typer(pool_app, name="pool")
app.add_typer(bench, name="bench")
app.add_typer(sim, name="sim")
app.command()(profile)
app.command()(doctor)
app.add_typer(spdk_app, name="spdk")
