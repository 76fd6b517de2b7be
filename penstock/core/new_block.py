"""A block on its way into the pool: its name, and what the pool needs to place and to evict it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from penstock.core.keys import BlockKey

TENANT_BYTES = 8
MAC_BYTES = 32
REBUILD_S_MAX = 1e6
BLOCK_BYTES_MAX = 1 << 30


@dataclass(frozen=True, slots=True)
class NewBlock:
    """`position` is its place in the spread of its prefix over the members (`prefix_position`), `tenant` its owner
    (`tenant_tag`; empty: none), `rebuild_s` the seconds to compute it again where its prefix is present (0: not known).
    `mac` authenticates its bytes (`pool.mac`; empty: not authenticated). `tokens` never leave the process that made the
    block (`pool.kv_events`; empty: not known)."""

    key: BlockKey
    parent: BlockKey
    size_bytes: int
    position: int = 0
    tenant: bytes = b""
    rebuild_s: float = 0.0
    mac: bytes = b""
    tokens: tuple[int, ...] = field(default=(), compare=False, repr=False)


def prefix_position(first_key: BlockKey, index: int) -> int:
    """Position of block `index` of the prefix whose first block is `first_key`: blocks of a prefix follow each other,
    prefixes begin anywhere, so that short ones spread too. All who share the first block agree on it."""
    return int.from_bytes(first_key[-4:], "little") + index


def tenant_tag(tenant: str) -> bytes:
    """What the pool sees of a tenant (`cache_salt`): enough to count its bytes, too little to make its keys."""
    return hashlib.blake2b(tenant.encode(), digest_size=TENANT_BYTES).digest() if tenant else b""
