"""`penstock pool check`: verifies the SSD members of a pool that is not being served, and repairs by dropping rows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from penstock.command_line import refuse

if TYPE_CHECKING:
    from penstock.pool.setup.check import CheckReport, Progress
    from penstock.pool.setup.config import MemberConfig, PoolConfig

CLOSE_TIMEOUT_S = 10.0


def check(
    path: Annotated[Path | None, typer.Argument(help="A slab file or block device; or give --config.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML file that describes the pool: all its SSD members.", metavar="FILE")
    ] = None,
    state: Annotated[Path | None, typer.Option(help="Folder of the tables; beside each slab when not given.")] = None,
    repair: Annotated[bool, typer.Option("--repair", help="Drop what does not hold.")] = False,
) -> None:
    """Verify rows against data, checksums and free space. Exit status 1 when damage was found."""
    from penstock.pool.setup.check import print_report

    try:
        described, members = _members(path, config, state)
        damaged = False
        for member in members:
            damaged |= print_report(_check(described, member, repair), typer.echo) != 0
    except (ValueError, OSError) as error:
        refuse("penstock pool check", error)
    if damaged:
        raise typer.Exit(1)


def _members(path: Path | None, file: Path | None, state: Path | None) -> tuple[PoolConfig, list[MemberConfig]]:
    from dataclasses import replace

    from penstock.pool.setup.config import config_of_flags
    from penstock.pool.setup.config_file import read_pool_config

    if (path is None) == (file is None):
        raise ValueError("what to check is not clear; allowed: either PATH or --config FILE")
    if path is not None:
        described = config_of_flags([], [(path, 0)], state=state)
        return described, [replace(member, capacity_bytes=None) for member in described.members]
    assert file is not None
    described = read_pool_config(file)
    if state is not None:
        described = replace(described, state=state)
    members = [member for member in described.members if member.kind not in ("memory", "node")]
    if not members:
        raise ValueError(f"{file}: no member lies on an SSD; there is nothing to check")
    return described, members


def _check(config: PoolConfig, member: MemberConfig, repair: bool) -> CheckReport:
    """One member's report, with a progress bar on stderr if that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
    console = Console(stderr=True)
    with Bars(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task(member.name)
        return _verify(config, member, repair, lambda done, of: bars.update(task, completed=done, total=of))


def _verify(config: PoolConfig, member: MemberConfig, repair: bool, on_progress: Progress) -> CheckReport:
    from penstock.pool.setup.check import check_file, check_slab
    from penstock.pool.setup.open import open_drive

    table = config.table_of(member)
    if member.kind == "uring":
        assert member.path is not None
        return check_file(member.path, table, repair, on_progress)
    assert table is not None
    engine = open_drive(config, member)
    try:
        return check_slab(engine, table, repair, on_progress, str(member.where))
    finally:
        engine.close(CLOSE_TIMEOUT_S)
