"""Opens pools: an embedded one from sizes and slabs, or a connection to a pool node."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from pathlib import Path

from penstock.pool.local import LocalPool
from penstock.pool.memory import MemoryMember
from penstock.pool.slab import SlabMember, open_slab_member
from penstock.transport.remote import RemotePool

log = logging.getLogger(__name__)

DEPTH = 32
MEASURE_S = 0.6  # over all members together


def open_local_pool(
    memory: Sequence[int],
    slabs: Sequence[tuple[Path, int]],
    weights: Sequence[float] | None = None,
    state: Path | None = None,
    depth: int = DEPTH,
) -> LocalPool:
    """An embedded pool of memory members (`memory`: bytes of each) and slab members (path, bytes).

    Members are named `memory:0`, ..., `ssd:0`, ... in this order, and `weights` follow it; None measures each member's
    read bandwidth (under a second). Tables of slabs lie beside them, or in the folder `state`.
    Raises ValueError or OSError with what is wrong; what was opened before is closed again.
    """
    if not memory and not slabs:
        raise ValueError("the pool has no member; give at least one size of memory or one slab")
    opened: list[MemoryMember | SlabMember] = []
    try:
        for number, size in enumerate(memory):
            opened.append(MemoryMember(f"memory:{number}", size))
        for number, (path, size) in enumerate(slabs):
            table = state / f"{path.name}.db" if state else None
            opened.append(open_slab_member(f"ssd:{number}", path, size, table, depth))
        if weights is None:
            weights = _measure(opened)
        return LocalPool(opened, weights)
    except BaseException:
        for member in opened:
            with contextlib.suppress(Exception):
                member.close(1.0)
        raise


def connect_pool(address: str, connections: int = 1, connect_timeout_s: float = 5.0) -> RemotePool:
    """The pool node at "HOST:PORT". Raises ValueError for a malformed address, PoolError("network") when nobody answers
    or the node speaks another version of the protocol."""
    host, port = parse_address(address)
    return RemotePool(host, port, connections=connections, connect_timeout_s=connect_timeout_s)


def parse_address(text: str) -> tuple[str, int]:
    """Host and port of "HOST:PORT"; an IPv6 host stands in brackets. Raises ValueError."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"address {text!r} is not understood; allowed is HOST:PORT with a port from 0 to 65535")
    return host.removeprefix("[").removesuffix("]"), int(port)


def format_address(host: str, port: int) -> str:
    """What `parse_address` takes."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _measure(members: Sequence[MemoryMember | SlabMember]) -> list[float]:
    """Read bandwidth of each member; one member alone needs no measuring."""
    if len(members) == 1:
        return [1.0]
    budget_s = MEASURE_S / len(members)
    found = []
    for member in members:
        if isinstance(member, MemoryMember):
            found.append(member.measure_bytes_per_s(budget_s))
        else:
            found.append(member.measure_bytes_per_s(budget_s, member.spare()))
    log.info(
        "read bandwidth: %s", ", ".join(f"{m.name} {b / 1e9:.2f} GB/s" for m, b in zip(members, found, strict=True))
    )
    return found
