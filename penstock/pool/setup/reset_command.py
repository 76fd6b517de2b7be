"""`penstock pool reset`: empties one SSD member that no process serves; its blocks are lost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from penstock.command_line import refuse

CLOSE_TIMEOUT_S = 10.0


def reset(
    path: Annotated[Path | None, typer.Argument(help="A slab file or block device; or give --config.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML file that describes the pool; with --member.", metavar="FILE")
    ] = None,
    member: Annotated[str | None, typer.Option(help="Name of the SSD member of --config.", metavar="NAME")] = None,
    state: Annotated[Path | None, typer.Option(help="Folder of the tables; beside the slab when not given.")] = None,
) -> None:
    """Make one slab empty, for a slab whose table is lost. Every block in it is forgotten."""
    try:
        where, forgotten = _reset(path, config, member, state)
    except (ValueError, OSError) as error:
        refuse("penstock pool reset", error)
    typer.echo(f"{where}: empty now, {forgotten} blocks forgotten")


def _reset(path: Path | None, file: Path | None, name: str | None, state: Path | None) -> tuple[str, int]:
    from penstock.pool.members.pairing import default_table, folders_of, reset_slab
    from penstock.pool.setup.check import open_whole_slab
    from penstock.pool.setup.config import config_of_flags
    from penstock.pool.setup.config_file import read_pool_config
    from penstock.pool.setup.open import open_drive

    if (path is None) == (file is None) or (file is None) != (name is None):
        raise ValueError("what to reset is not clear; allowed: either PATH, or --config FILE with --member NAME")
    described = config_of_flags([], [(path, 0)]) if path is not None else read_pool_config(file or Path())
    described = replace(described, state=state or described.state)
    members = [one for one in described.members if one.kind not in ("memory", "node") and name in (None, one.name)]
    if not members:
        names = ", ".join(one.name for one in described.members if one.kind not in ("memory", "node")) or "none"
        raise ValueError(f"{file} has no SSD member {name!r}; it has {names}")
    (one,) = members
    table, folders = described.table_of(one), []
    if one.kind == "uring":
        assert one.path is not None
        engine = open_whole_slab(one.path)
        table, folders = table or default_table(one.path), folders_of(one.path)
    else:
        engine = open_drive(described, one)
    assert table is not None
    try:
        return str(one.where), reset_slab(engine, str(one.where), table, folders)
    finally:
        engine.close(CLOSE_TIMEOUT_S)
