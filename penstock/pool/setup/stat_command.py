"""`penstock pool stat`: the members and tenants of a running pool node, as a table or as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from penstock.command_line import refuse, with_flags
from penstock.pool.net.tls_flags import TLS_NAMES, TLS_PANEL, PeerTlsSettings
from penstock.process.log_lines import printable
from penstock.units import format_bytes

if TYPE_CHECKING:
    from penstock.pool.api import MemberStat, PoolStat


@with_flags(PeerTlsSettings, {TLS_PANEL: TLS_NAMES})
def stat(
    address: Annotated[str, typer.Argument(help="HOST:PORT of the node.", metavar="HOST:PORT")],
    given: Mapping[str, Any],
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    timeout_s: Annotated[float, typer.Option(help="How long to wait for the node.")] = 5.0,
    secret_file: Annotated[
        Path | None, typer.Option(help="File with the secret that the node asks for.", metavar="FILE")
    ] = None,
) -> None:
    """Show the members and tenants of a running node."""
    from penstock.pool.api import PoolError
    from penstock.pool.net.connect import connect_node
    from penstock.pool.net.remote import RemotePool
    from penstock.pool.net.secret import Secret
    from penstock.pool.net.tls import PeerTls

    try:
        if not 0 < timeout_s <= 3600:
            raise ValueError(f"timeout-s is {timeout_s}; allowed: above 0, up to 3600")
        secret = Secret.read(secret_file) if secret_file else None
        tls = PeerTls.read(*(given.get(name) for name in TLS_NAMES))
        node = connect_node(address, timeout_s, secret, tls)
        try:
            found = node.stat(timeout_s)
            if isinstance(node, RemotePool):
                found = _own_names(found, f"@{node.place}")
        finally:
            node.close(1.0)
    except (ValueError, OSError, PoolError) as error:
        refuse("penstock pool stat", error)
    if json:
        import msgspec

        typer.echo(msgspec.json.format(msgspec.json.encode(found), indent=2))
    else:
        _print(found)


def _own_names(found: PoolStat, place: str) -> PoolStat:
    """The report with the member names that the node itself uses."""
    members = tuple(replace(member, name=member.name.removesuffix(place)) for member in found.members)
    return replace(found, members=members)


def _print(found: PoolStat) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console.width = 200
    table = Table(*_COLUMNS)
    for member in found.members:
        table.add_row(*_row(member))
    console.print(table)
    if found.tenants:
        over = dict(found.over_quota)
        tenants = Table("tenant", "holds", "over its quota by")
        for tag, held_bytes in found.tenants:
            by = format_bytes(over.pop(tag)) if tag in over else "-"
            tenants.add_row(_tenant(tag), format_bytes(held_bytes), by)
        for tag, excess_bytes in over.items():
            tenants.add_row(_tenant(tag), "-", format_bytes(excess_bytes))
        console.print(tenants)
    console.print(
        f"evicted {found.evictions} blocks{_by(found.evictions_by)}, moved {found.moved_blocks}; "
        f"writes dropped {found.writes_dropped}, not admitted to SSDs {found.writes_not_admitted}, "
        f"refused {found.writes_refused}; checksum errors {found.checksum_errors}"
    )
    if found.copies:
        held = format_bytes(sum(count for _, count in found.copies))
        console.print(f"copies of other nodes' blocks: {held}, of {len(found.copies)} tenants")
    if found.copied_blocks or found.copy_reads or found.saved_reads:
        console.print(
            f"blocks copied {found.copied_blocks}; read from a copy {found.copy_reads}, "
            f"where another read failed {found.saved_reads}"
        )
    if found.sent_bytes_by:
        sent, received = (
            ", ".join(f"{format_bytes(count)} {_WAYS.get(way, 'otherwise')}" for way, count in counts)
            for counts in (found.sent_bytes_by, found.received_bytes_by)
        )
        state = printable(found.one_sided, _NAME_CHARACTERS_SHOWN) or "off: the node was started without --rdma"
        console.print(f"received {received}; sent {sent}; one-sided reads: {state}")
    for what, counts in (("lost", found.losses), ("thread failures", found.thread_failures)):
        if counts:
            named = (f"{printable(name, _NAME_CHARACTERS_SHOWN)} {count}" for name, count in counts)
            console.print(f"{what}: " + ", ".join(named))


def _by(counts: Sequence[tuple[str, int]]) -> str:
    """Counts above 0, in brackets, to be printed after their sum."""
    named = [(printable(name, _NAME_CHARACTERS_SHOWN).replace("_", " "), count) for name, count in counts if count]
    shown = ", ".join(f"{name} {count}" for name, count in named)
    return f" ({shown})" if shown else ""


def _tenant(tag: str) -> str:
    return _TENANTS.get(tag, printable(tag, _NAME_CHARACTERS_SHOWN))


_NAME_CHARACTERS_SHOWN = 200  # of a member's name
_WAYS = {"messages": "in messages", "one-sided": "one-sided"}
_TENANTS = {"": "(none)", b"others".hex(): "(all without a quota of their own)"}
_COLUMNS = ("member", "kind", "state", "blocks", "used", "capacity", "share", "reads at", "waiting", "errors")


def _row(member: MemberStat) -> tuple[str, ...]:
    rate = f"{member.read_bytes_per_s / 1e9:.2f} GB/s" if member.read_bytes_per_s else "-"
    return (
        printable(member.name, _NAME_CHARACTERS_SHOWN),
        printable(member.kind, _NAME_CHARACTERS_SHOWN),
        printable(member.state, _NAME_CHARACTERS_SHOWN),
        str(member.blocks),
        format_bytes(member.used_bytes),
        format_bytes(member.capacity_bytes),
        f"{member.weight:.1%}",
        rate,
        f"{member.queued_loads} loads, {member.queued_stores} stores",
        str(member.errors),
    )
