"""One child of a union of pools, local or a node: whether it can be used, its room, and how fast it really reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from penstock.core.keys import BlockKey
from penstock.core.layout import staging_bytes
from penstock.core.pool.member_bandwidth import MemberBandwidth
from penstock.pool.api import Located, Pool, PoolError, PoolStat, ReadCheck
from penstock.pool.read_meter import ReadMeter
from penstock.pool.served import ServedPool

BlockEnded = Callable[[int, bytes, PoolError | None], None]  # checksum and MAC that the block was stored with


class NodePool(Pool, Protocol):
    """What the union asks of a pool node (`transport.remote.RemotePool`): questions that can be asked of many nodes at
    once, and reads that hand on checksum and MAC."""

    @property
    def place(self) -> str: ...
    @property
    def up(self) -> bool: ...
    @property
    def down_reason(self) -> str: ...
    @property
    def node_id(self) -> bytes: ...
    @property
    def read_bytes_per_s(self) -> float:
        """What its members' shares go by, added up, as it said when it was reached."""

    @property
    def block_bytes_max(self) -> int:
        """The largest block that it takes, as it said when it was reached."""

    def begin_lookup(self, keys: Sequence[BlockKey], timeout_s: float) -> Callable[[], list[Located | None]]: ...
    def begin_evict(self, keys: Sequence[BlockKey]) -> Callable[[], int]: ...
    def begin_stat(self, timeout_s: float) -> Callable[[], PoolStat]: ...
    def read_block(
        self,
        key: BlockKey,
        size_bytes: int,
        into: memoryview,
        timeout_s: float,
        ended: BlockEnded,
        check: ReadCheck | None = None,
    ) -> None: ...
    def suspect(self, key: BlockKey, checksum: int, mac: bytes, refused: bool) -> None: ...
    def measure_bytes_per_s(self, budget_s: float) -> float: ...


class Child:
    """`pool` is the child, also as `local` or `node`. State changes under the union's lock."""

    def __init__(self, pool: ServedPool | NodePool, local: ServedPool | None, node: NodePool | None) -> None:
        self.pool: Pool = pool
        self.local, self.node = local, node
        self.name = node.place if node is not None else "local"
        self.meter = ReadMeter()
        self.bandwidth: MemberBandwidth | None = None  # None until the weight is known, or when it was given
        self.weighed = False  # its weight was given, or measured
        self.given = False
        self.room_bytes: int | None = None  # None: not known
        self.stat: PoolStat | None = None
        self.failures = 0  # lookups that it did not answer
        self.told_down = False
        self.left = False  # the union uses it no more

    @property
    def up(self) -> bool:
        return not self.left and (self.node is None or self.node.up)

    @property
    def block_bytes_max(self) -> int:
        return self.node.block_bytes_max if self.node is not None else self.as_local.block_bytes_max

    @property
    def as_local(self) -> ServedPool:
        assert self.local is not None
        return self.local

    def has_room(self, size_bytes: int) -> bool:
        return self.room_bytes is None or self.room_bytes >= staging_bytes(size_bytes)

    def note_written(self, size_bytes: int) -> None:
        """Less room, until `note_stat` knows better."""
        if self.room_bytes is not None:
            self.room_bytes = max(0, self.room_bytes - staging_bytes(size_bytes))

    def note_stat(self, stat: PoolStat) -> None:
        self.stat = stat
        self.room_bytes = sum(m.capacity_bytes - m.used_bytes for m in stat.members if m.healthy)
