"""`penstock pool`: serves memory and slabs of this machine as a pool node."""

from __future__ import annotations

import logging
import signal
import threading
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from penstock.units import format_bytes, parse_bytes, parse_rate

CLOSE_TIMEOUT_S = 15.0
LOG_LEVELS = ("debug", "info", "warning", "error")


def pool(
    listen: Annotated[
        str, typer.Option(help="HOST:PORT to serve on; port 0 picks a free one.", show_default=True)
    ] = "127.0.0.1:7070",
    memory: Annotated[
        list[str] | None, typer.Option(help="A memory member of this SIZE, such as 2GiB. May be given several times.")
    ] = None,
    slab: Annotated[
        list[str] | None,
        typer.Option(
            help="A slab member PATH:SIZE on a file or block device, such as /data/kv.slab:100GiB. Its blocks survive "
            "a restart. May be given several times."
        ),
    ] = None,
    weight: Annotated[
        list[float] | None,
        typer.Option(help="Share of new blocks, one per member: memory first, then slabs. Measured when not given."),
    ] = None,
    state: Annotated[
        Path | None, typer.Option(help="Folder for the tables of slabs; beside each slab when not given.")
    ] = None,
    name: Annotated[str, typer.Option(help="What this node calls itself.")] = "pool",
    pace: Annotated[
        str | None, typer.Option(help="Send blocks no faster than this, such as 200MB/s: a NIC of that speed.")
    ] = None,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "warning",
) -> None:
    """Serve a pool of memory and SSDs to engines on this and other machines."""
    console = Console(stderr=True, soft_wrap=True, markup=False, highlight=False)
    try:
        _serve(listen, memory or [], slab or [], weight, state, name, pace, log_level)
    except (ValueError, OSError) as error:
        console.print(f"penstock pool: {_one_line(error)}")
        raise typer.Exit(2) from None


def parse_slab(text: str) -> tuple[Path, int]:
    """Path and bytes of "PATH:SIZE". Raises ValueError."""
    path, colon, size = text.rpartition(":")
    if not colon or not path:
        raise ValueError(f"slab {text!r} is not understood; allowed is PATH:SIZE, for example /data/kv.slab:100GiB")
    return Path(path), parse_bytes(size)


def _serve(
    listen: str,
    memory: list[str],
    slab: list[str],
    weights: list[float] | None,
    state: Path | None,
    name: str,
    pace: str | None,
    log_level: str,
) -> None:
    from penstock.pool.open import open_local_pool
    from penstock.transport.connect import format_address, parse_address
    from penstock.transport.node import PoolNode

    if log_level not in LOG_LEVELS:
        raise ValueError(f"log-level is {log_level!r}; allowed is one of {', '.join(LOG_LEVELS)}")
    logging.basicConfig(level=log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    host, port = parse_address(listen)
    pace_bytes_per_s = parse_rate(pace) if pace else None
    sizes, slabs = [parse_bytes(text) for text in memory], [parse_slab(text) for text in slab]
    if not sizes and not slabs:
        raise ValueError("the pool has no member; give --memory SIZE or --slab PATH:SIZE")
    local = open_local_pool(sizes, slabs, weights=weights, state=state)
    try:
        stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        node = PoolNode(local, host, port, name=name, pace_bytes_per_s=pace_bytes_per_s)
        try:
            for note in local.notes:
                logging.getLogger(__name__).warning(note)
            members = ", ".join(
                f"{m.name} ({m.kind}, {format_bytes(m.capacity_bytes)}, {m.blocks} blocks)"
                for m in local.stat(1.0).members
            )
            print(f"pool node {name} ready on {format_address(*node.address)}: {members}", flush=True)
            stop.wait()
        finally:
            node.close(CLOSE_TIMEOUT_S)
    finally:
        local.close(CLOSE_TIMEOUT_S)


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}{f': {error.filename}' if error.filename else ''}"
    return " ".join(str(error).split())
