"""The pool's one interface, the same for the embedded pool and for a pool node over the network.

Threading: every method may be called from any thread. `done` callbacks run on a thread of the pool, must not block,
and are called exactly once, at the latest at the deadline (plus scheduling noise). After `done` the pool does not use
the buffer any more: a transfer that misses its deadline is stopped first, then reported. One exception: a transfer that
a local device or a network card has begun cannot be stopped; it is reported when the device answers, or by `close`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Protocol

from msgspec import Meta

from penstock.core.keys import KEY_BYTES, BlockKey
from penstock.core.layout import staging_bytes
from penstock.core.new_block import BLOCK_BYTES_MAX, MAC_BYTES, REBUILD_S_MAX, TENANT_BYTES, NewBlock
from penstock.core.pool.copies import is_copy
from penstock.pool.device_twin import DeviceTwin

AMOUNT_MAX = 1 << 62
FIGURE_MAX = 1e18
STAT_NAME_CHARACTERS_MAX = 1024
STAT_ROWS_MAX = 4096

# Bounds of the figures that a node reports over the wire (`pool.net.wire.Stats`); `bounded` clips figures to them.
Amount = Annotated[int, Meta(ge=0, le=AMOUNT_MAX)]
Figure = Annotated[float, Meta(ge=0.0, le=FIGURE_MAX)]
StatName = Annotated[str, Meta(max_length=STAT_NAME_CHARACTERS_MAX)]
StatCounts = Annotated[tuple[tuple[StatName, Amount], ...], Meta(max_length=STAT_ROWS_MAX)]


class PoolError(Exception):
    """A block could not be read or written; `reason` is one of the fixed labels below (used in metrics)."""

    REASONS = ("missing", "deadline", "checksum", "mac", "device", "network", "full", "dropped", "layout", "closed")

    def __init__(self, reason: str, detail: str) -> None:
        assert reason in self.REASONS, reason
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Located:
    """Where a block that was found lies: its size and the links that a read of it crosses (`route`), e.g.
    `("memory:0",)`, `("ssd:0",)` for an embedded pool, `("ssd:0@HOST:PORT", "net@HOST:PORT")` for a pool node."""

    size_bytes: int
    route: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class MemberStat:
    """State of one member. `kind` is "memory", or the name of its block engine ("uring", "threads"); `state` is "ok",
    "fenced", "draining" or, of a node, "down"; `read_bytes_per_s` is the rate of its latest reads while it was busy (0:
    not known)."""

    name: StatName
    kind: StatName
    capacity_bytes: Amount
    used_bytes: Amount
    blocks: Amount
    healthy: bool
    weight: Figure
    read_bytes: Amount
    written_bytes: Amount
    errors: Amount
    state: StatName = "ok"
    read_bytes_per_s: Figure = 0.0
    queued_loads: Amount = 0
    queued_stores: Amount = 0


@dataclass(frozen=True, slots=True)
class PoolStat:
    """State and counters of a pool.

    `writes_not_admitted`: writes that write admission refused for an SSD, because their block was new. `moved_blocks`:
    blocks that drains moved to other members. `tenants`: (tag in hex, bytes), the largest first. `over_quota`: (tag in
    hex, bytes over the quota); "others" in hex stands for all tenants without a quota of their own. `evictions_by`:
    `evictions` by cause: `asked` (by a caller), or for a new block one of the writer's `own` blocks, one of another
    tenant without a quota (`shared`), or one of a tenant `over_quota`. `writes_refused`: writes of tenants that have no
    quota by name, where only tenants with a quota may write. `sent_bytes_by`: bytes that a node's clients read, by
    way: in `messages`, or `one-sided`; `received_bytes_by`: that they wrote; `one_sided`: how bytes travel one-sided,
    or "off: " and why they do not. `losses` and `thread_failures`: by kind, of the whole process (`pool.losses`,
    `process.guarded_thread`). `copies`: bytes of copies of blocks that other nodes have, by tenant (tag in hex);
    `tenants` is without them. Of a union (`pool.union.replicas`): `copied_blocks` that it copied, `copy_reads`, blocks
    that it read from another node than the one it found them on, `saved_reads`, those of them whose first read failed.
    """

    members: Annotated[tuple[MemberStat, ...], Meta(max_length=STAT_ROWS_MAX)]
    writes_dropped: Amount
    evictions: Amount
    checksum_errors: Amount
    writes_not_admitted: Amount = 0
    moved_blocks: Amount = 0
    tenants: StatCounts = ()
    losses: StatCounts = ()
    thread_failures: StatCounts = ()
    over_quota: StatCounts = ()
    evictions_by: StatCounts = ()
    writes_refused: Amount = 0
    sent_bytes_by: StatCounts = ()
    one_sided: StatName = ""
    copies: StatCounts = ()
    copied_blocks: Amount = 0
    copy_reads: Amount = 0
    saved_reads: Amount = 0
    received_bytes_by: StatCounts = ()

    def bounded(self) -> PoolStat:
        """The same record with every figure clipped to the bounds of a message, so that one absurd figure does not make
        the whole message invalid."""
        return PoolStat(**{one.name: _bounded(getattr(self, one.name)) for one in fields(self)})


def _bounded(value: Any) -> Any:
    """A figure, a name, or a tuple of them, clipped to the bounds; 0 for NaN."""
    match value:
        case bool():
            return value
        case int():
            return min(max(value, 0), AMOUNT_MAX)
        case float():
            return min(max(value, 0.0), FIGURE_MAX) if value == value else 0.0
        case str():
            return value[:STAT_NAME_CHARACTERS_MAX].encode(errors="replace").decode()
        case tuple():
            return tuple(map(_bounded, value[:STAT_ROWS_MAX]))
    return replace(value, **{one.name: _bounded(getattr(value, one.name)) for one in fields(value)})


class Lease(Protocol):
    """A pinned block that can be read in place, without a copy, until `release`."""

    @property
    def view(self) -> memoryview:
        """The block's bytes in place, valid until `release`."""

    @property
    def checksum(self) -> int:
        """The checksum that the block was stored with."""

    @property
    def mac(self) -> bytes:
        """The MAC that the block was stored with; empty when it has none."""

    @property
    def written_here(self) -> bool:
        """Whether this process wrote the bytes, or verified them by its own check: they need no other check."""

    def release(self) -> None:
        """Unpin the block; `view` must not be used afterwards."""


Done = Callable[[PoolError | None], None]
DoneMany = Callable[[list[PoolError | None]], None]
"""Takes the results of several blocks, in order."""
ReadCheck = Callable[[memoryview, int, bytes], PoolError | None]
"""Verifies a block that was read: takes its bytes, and the checksum and MAC that it was stored with; returns the error,
or None (`pool.mac.check_of`)."""


class Pool(Protocol):
    """Blocks of KV cache by key, stored on members. Sizes are in bytes, deadlines in seconds from the call; `done` is
    called exactly once, from any thread, and must not block."""

    def register(self, buffer: memoryview, twin: DeviceTwin | None = None) -> None:
        """Announce the staging memory that reads will target and writes will come from (page-aligned). Blocks that are
        read one-sided into it may land in its twin on a device instead (`pool.device_twin`)."""

    def lookup(self, keys: Sequence[BlockKey], timeout_s: float) -> list[Located | None]:
        """Where each block lies, None for a miss. Counts as a use of each block found. Raises PoolError when the pool
        does not answer within `timeout_s`; the caller then goes on without hits."""

    def read(
        self,
        key: BlockKey,
        size_bytes: int,
        into: memoryview,
        timeout_s: float,
        done: Done,
        check: ReadCheck | None = None,
    ) -> None:
        """Copy a block of `size_bytes` into `into`, verify it by `check` (None: its checksum), then call `done`. Never
        raises: every failure arrives as `done(PoolError)` (a block of another size is "layout"). `check` runs on a
        thread of the pool and may take the time of a pass over the bytes.

        `into` is page-aligned and `core.layout.staging_bytes(size_bytes)` long; bytes past `size_bytes` are undefined.
        """

    def read_many(
        self,
        keys: Sequence[BlockKey],
        size_bytes: int,
        intos: Sequence[memoryview],
        timeout_s: float,
        done: DoneMany,
        checks: Sequence[ReadCheck | None] | None = None,
    ) -> None:
        """As `read` of each block, with one call of `done`. Blocks of one member travel together (`core.spans`)."""

    def lease(self, key: BlockKey) -> Lease | None:
        """A block of a local memory member in place; None when it is elsewhere or gone (use `read`)."""

    def host_buffers(self) -> list[memoryview]:
        """Memory of local members, for page-locking on a GPU host; empty for a pool node."""

    def write(self, block: NewBlock, data: memoryview, timeout_s: float, done: Done) -> None:
        """Store a block. `data` is aligned and padded like `into` of `read`, and must stay unchanged until `done`.
        Already present: done(None). A write may be refused: done(PoolError("dropped" | "full" | ...)). Never raises."""

    def write_many(
        self, blocks: Sequence[NewBlock], datas: Sequence[memoryview], timeout_s: float, done: DoneMany
    ) -> None:
        """As `write` of each block, with one call of `done`."""

    def evict(self, keys: Sequence[BlockKey]) -> int:
        """Remove blocks; leased ones and those in flight stay. Returns how many were removed."""

    def stat(self, timeout_s: float) -> PoolStat:
        """Members and counters. Raises PoolError when the pool does not answer in time."""

    def close(self, timeout_s: float) -> None:
        """Stop: reads and writes in flight end with done(PoolError("closed")), durable state is flushed."""


def check_write(block: NewBlock, data: memoryview) -> PoolError | None:
    """The error in a block that is about to be written, or None."""
    if len(block.key) != KEY_BYTES or len(block.parent) != KEY_BYTES or block.key == block.parent:
        return PoolError("layout", f"a key and its parent are {KEY_BYTES} bytes each and differ")
    if len(block.tenant) not in (0, TENANT_BYTES) and not is_copy(block.tenant):
        return PoolError("layout", f"a tenant's tag of {len(block.tenant)} bytes; it has {TENANT_BYTES} or none")
    if len(block.mac) not in (0, MAC_BYTES):
        return PoolError("layout", f"a MAC of {len(block.mac)} bytes; it has {MAC_BYTES} or none")
    if not 0 <= block.rebuild_s <= REBUILD_S_MAX or block.position < 0:
        return PoolError(
            "layout",
            f"rebuild_s is {block.rebuild_s}, position {block.position}; allowed: 0 to {REBUILD_S_MAX:g} s, 0 or more",
        )
    if block.size_bytes > BLOCK_BYTES_MAX:
        return PoolError("layout", f"a block of {block.size_bytes} bytes; allowed: at most {BLOCK_BYTES_MAX}")
    if block.size_bytes < 1 or len(data) < staging_bytes(block.size_bytes):
        return PoolError(
            "layout", f"{len(data)} bytes of data for a block of {block.size_bytes}, padded to the alignment"
        )
    return None
