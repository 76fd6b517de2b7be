"""The `penstock` command: its sub-commands, each imported when it is called."""

from __future__ import annotations

from typing import Annotated

import typer

from penstock import __version__
from penstock.lazy_commands import LazyCommand, lazy_group

HELP = "LLM serving for requests whose time goes into loading KV cache rather than computing it."

app = lazy_group(
    {
        "serve": LazyCommand(
            "penstock.cluster.engine.serve_command:serve",
            "Serve a model with the OpenAI-compatible API; its KV cache comes from the pool.",
        ),
        "router": LazyCommand(
            "penstock.cluster.router.router_command:router",
            "Serve the OpenAI-compatible API with the engines that register.",
        ),
        "up": LazyCommand(
            "penstock.cluster.deploy.up_command:up",
            "Start a whole cluster, start again what dies, and end it in order on SIGTERM or SIGINT.",
        ),
        "fabric": LazyCommand(
            "penstock.cluster.deploy.fabric_command:fabric",
            "Print the InfiniBand, RoCE or TCP settings that keep hand-off and tokens before bulk KV.",
        ),
        "vllm": LazyCommand(
            "penstock.vllm.command:app",
            "Serve MODEL with vLLM, its KV cache from Penstock's pool. Any flag of `vllm serve` may follow.",
        ),
        "vllm-engine": LazyCommand(
            "penstock.cluster.vllm_agent.agent_command:app",
            "Serve MODEL with vLLM for a router.",
        ),
        "pool": LazyCommand(
            "penstock.pool.setup.pool_command:pool_app",
            "Serve a pool of memory and SSDs to engines on this and other machines; or inspect one.",
        ),
        "bench": LazyCommand(
            "penstock.bench.command:bench",
            "Measure this machine and Penstock on it. The papers' experiments: `python -m benchmarks` in a checkout.",
        ),
        "sim": LazyCommand(
            "penstock.sim.command:sim",
            "The real scheduler core on a virtual clock.",
        ),
        "profile": LazyCommand(
            "penstock.pool.setup.profile_command:profile",
            "Measure what each member of a pool reads and writes, alone and all together.",
        ),
        "doctor": LazyCommand(
            "penstock.doctor.command:doctor",
            "What this machine offers, what is misconfigured, and how to repair it.",
        ),
        "spdk": LazyCommand(
            "penstock.io.spdk.command:app", "The spdk block engine: build its shim against your SPDK, try a target."
        ),
    },
    name="penstock",
    help=HELP,
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
