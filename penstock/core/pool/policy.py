"""An operator's settings of a pool: quotas, writes to SSDs, and whether shares follow measured bandwidth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from penstock.core.pool.write_admission import WriteAdmissionMode


@dataclass(frozen=True, slots=True)
class PoolPolicy:
    """`quota_bytes` is by tenant tag (`core.new_block.tenant_tag`), `default_quota_bytes` for every other tenant, and
    for blocks without one (None: no limit, no guarantee); with `named_tenants_only` nothing of those is stored.
    `follow_bandwidth` moves shares when a member reads slower than its weight says, or recovers; weights must be bytes
    per second then. `copies_share`: the part of the space, from 0 to 1, that copies of other nodes' hot blocks may
    take."""

    write_admission: WriteAdmissionMode = "all"
    default_quota_bytes: int | None = None
    quota_bytes: Mapping[bytes, int] = field(default_factory=dict)
    follow_bandwidth: bool = False
    named_tenants_only: bool = False
    copies_share: float = 0.0
