"""Opens an embedded pool from sizes and slabs."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from pathlib import Path

from penstock.pool.local import LocalPool
from penstock.pool.memory import MemoryMember
from penstock.pool.slab import SlabMember, open_slab_member

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
