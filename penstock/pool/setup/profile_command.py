"""`penstock profile`: measures the members of a pool and their links, and writes a profile (for weights)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from penstock.command_line import refuse
from penstock.units import parse_address, parse_bytes

if TYPE_CHECKING:
    from penstock.pool.setup.config import PoolConfig
    from penstock.pool.setup.profile import MeasurableLink, PoolProfile


def profile(
    config: Annotated[Path, typer.Option(help="TOML file that describes the pool.", metavar="FILE")],
    block_bytes: Annotated[
        str | None, typer.Option(help="Size of the blocks in use.", metavar="SIZE", show_default="that of the file")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the profile here.", show_default="the file's `profile`, if it has one")
    ] = None,
    seconds: Annotated[float, typer.Option(help="How long to measure, at most about.")] = 45.0,
) -> None:
    """Measure what each member of a pool reads and writes, alone and all together, and each link to another node.

    No node may serve the pool meanwhile. Writes go to free space only.
    """
    from penstock.pool.api import PoolError

    try:
        from penstock.pool.setup.config_file import read_pool_config

        if not 0.1 <= seconds <= 3600:
            raise ValueError(f"seconds is {seconds}; allowed: 0.1 to 3600")
        described = read_pool_config(config)
        size = parse_bytes(block_bytes) if block_bytes is not None else described.block_bytes
        if not 4096 <= size <= 1 << 30:
            raise ValueError(f"block-bytes is {size}; allowed: 4KiB to 1GiB")
        target = out or described.profile
        if target is not None and not target.parent.is_dir():
            raise ValueError(f"{target} cannot be written: the folder {target.parent} does not exist")
        found = _measure(described, size, seconds)
        if target is not None:
            from penstock.pool.setup.profile import write_profile

            write_profile(found, target)
    except (ValueError, OSError, PoolError) as error:
        refuse("penstock profile", error)
    _print(found)
    typer.echo(f"written to {target}" if target else "not written; give --out FILE, or `profile` in the file")


def _measure(config: PoolConfig, block_bytes: int, seconds: float) -> PoolProfile:
    from dataclasses import replace

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from penstock.pool.setup.open import open_members
    from penstock.pool.setup.profile import Step, measure_pool
    from penstock.report import environment

    own = [member for member in config.members if member.kind != "node"]
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with contextlib.ExitStack() as stack:
        links = stack.enter_context(_links(config))
        opened = open_members(config, own, stack)
        console = Console(stderr=True)
        progress = stack.enter_context(Progress(*columns, console=console, disable=not console.is_terminal))
        task = progress.add_task("opening")

        def show(step: Step) -> None:
            progress.update(task, description=step.text, total=step.of, completed=step.number - 1)

        members = [(one, member.where) for one, member in zip(opened, own, strict=True)]
        found = measure_pool(members, links, block_bytes, show, seconds)
        progress.update(task, completed=progress.tasks[0].total)
    return replace(found, machine=environment())


@contextlib.contextmanager
def _links(config: PoolConfig) -> Iterator[dict[str, MeasurableLink]]:
    """Connections to the pool's nodes, by the name of the link."""
    from penstock.pool.net.remote import RemotePool
    from penstock.pool.net.secret import Secret
    from penstock.pool.net.tls import PeerTls

    links: dict[str, MeasurableLink] = {}
    with contextlib.ExitStack() as stack:
        for member in config.members:
            if member.kind == "node":
                host, port = parse_address(str(member.address))
                secret = Secret.read(config.secret_file) if config.secret_file else None
                node = RemotePool(host, port, secret=secret, tls=PeerTls.of(config))
                stack.callback(node.close, 1.0)
                links[f"net@{member.address}"] = node
        yield links


def _print(found: PoolProfile) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console.width = 160
    weights = found.weights()
    total = sum(weights.values()) or 1.0
    title = f"GB/s in blocks of {found.block_bytes} bytes"
    table = Table("member", "kind", "read", "write", "read together", "write together", "share", title=title)
    for m in found.members:
        rates = (m.read_bytes_per_s, m.write_bytes_per_s, m.together_read_bytes_per_s, m.together_write_bytes_per_s)
        table.add_row(m.name, m.kind, *map(_gb_per_s, rates), f"{weights[m.name] / total:.1%}")
    if len(found.members) > 1:
        reads = [m.together_read_bytes_per_s for m in found.members]
        writes = [m.together_write_bytes_per_s or 0.0 for m in found.members]
        table.add_row("all", "", "", "", _gb_per_s(sum(reads)), _gb_per_s(sum(writes)), "")
    for name, rate in found.links.items():
        table.add_row(name, "link", _gb_per_s(rate), "", "", "", "")
    console.print(table)


def _gb_per_s(rate: float | None) -> str:
    return "-" if rate is None else f"{rate / 1e9:.3f}"
