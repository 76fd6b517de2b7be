"""`penstock fabric`: prints the network settings for a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from penstock.command_line import refuse


def fabric(
    config: Annotated[Path, typer.Argument(help="TOML file that describes the cluster.", metavar="CLUSTER.TOML")],
    kind: Annotated[
        str | None, typer.Option(help="infiniband, roce or tcp; overrides the file.", show_default="the file's")
    ] = None,
) -> None:
    """Print the InfiniBand, RoCE or TCP settings that keep hand-off and tokens before bulk KV. Nothing is applied."""
    from penstock.cluster.deploy.cluster_config import read_cluster_config
    from penstock.cluster.deploy.fabric import read_fabric, sections
    from penstock.core.config import ConfigError

    try:
        cluster = read_cluster_config(config)
        described = read_fabric({**cluster.fabric, **({} if kind is None else {"kind": kind})})
    except ConfigError as error:
        refuse("penstock fabric", error)
    nodes: dict[str, set[str]] = {"prefill": set(), "decode": set()}
    for process in cluster.of("engine"):
        role = str(process.flags.get("role", "mixed"))
        nodes.setdefault(role, set()).add(str(process.flags.get("node", process.name)))
    for section in sections(described, len(nodes["prefill"]), len(nodes["decode"])):
        typer.echo(f"# {section.where}")
        for line in section.lines:
            typer.echo(line)
        typer.echo()
