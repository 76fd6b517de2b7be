"""One child of a union of pools, local or a node: its state, its free space, and its measured bandwidth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from penstock.core.bandwidth import BusyMeter, MeasuredLink, MemberBandwidth
from penstock.core.keys import BlockKey
from penstock.core.layout import staging_bytes
from penstock.pool.api import Located, Pool, PoolError, PoolStat, ReadCheck
from penstock.pool.node_backend import BlockOrigin, NodeBackend

BlockEnded = Callable[[int, bytes, PoolError | None], None]  # checksum and MAC that the block was stored with


class NodePool(Pool, Protocol):
    """What the union needs of a pool node (`pool.net.remote.RemotePool`): requests that can be sent to many nodes at
    once, and reads that return checksum and MAC."""

    @property
    def place(self) -> str:
        """The node's address as text."""

    @property
    def up(self) -> bool:
        """Whether a connection to the node is open."""

    @property
    def down_reason(self) -> str:
        """Why a connection to the node ended last."""

    @property
    def node_id(self) -> bytes:
        """The id that the node reported when it was reached; empty before."""

    @property
    def read_bytes_per_s(self) -> float:
        """Sum of its members' read bandwidths, as it reported when it was reached."""

    @property
    def siblings(self) -> list[str]:
        """Addresses of the node's other processes, as it reported when it was reached."""

    @property
    def takes_copies(self) -> bool:
        """Whether it takes copies of other nodes' blocks, as it reported when it was reached."""

    @property
    def block_bytes_max(self) -> int:
        """Size in bytes of the largest block that it accepts, as it reported when it was reached."""

    def watch_hot(self, on_hot: Callable[[Sequence[BlockKey]], None]) -> None:
        """Call `on_hot`, which must not block, with blocks that were read from here and that the node's clients, which
        it counts together, read often."""

    def begin_lookup(self, keys: Sequence[BlockKey], timeout_s: float) -> Callable[[], list[Located | None]]:
        """Send a `lookup` request; call the result to wait for the answer. Both raise PoolError."""

    def origins(self, keys: Sequence[BlockKey], timeout_s: float) -> list[BlockOrigin | None]:
        """What each of at most a span of blocks was written with; None where it is not known. Raises PoolError."""

    def begin_evict(self, keys: Sequence[BlockKey]) -> Callable[[], int]:
        """Send a `evict` request; call the result to wait for the answer. Both raise PoolError."""

    def begin_stat(self, timeout_s: float) -> Callable[[], PoolStat]:
        """Send a `stat` request; call the result to wait for the answer. Both raise PoolError."""

    def read_block(
        self,
        key: BlockKey,
        size_bytes: int,
        into: memoryview,
        timeout_s: float,
        ended: BlockEnded,
        check: ReadCheck | None = None,
    ) -> None:
        """Read a block into `into`; `ended` is called once with the checksum and MAC that it was stored with, or an
        error."""

    def suspect(self, key: BlockKey, checksum: int, mac: bytes, refused: bool) -> None:
        """Report to the node that a block arrived damaged, or (`refused`) without a valid MAC."""

    def measure_bytes_per_s(self, budget_s: float) -> float:
        """Bytes per second over the link to the node, measured for at most `budget_s`."""


class Child:
    """`pool` is the child, also as `local` or `node`. State changes under the union's lock."""

    def __init__(self, pool: NodeBackend | NodePool, local: NodeBackend | None, node: NodePool | None) -> None:
        self.pool: Pool = pool
        self.local, self.node = local, node
        self.name = node.place if node is not None else "local"
        self.meter = BusyMeter(busy_from=2, failed_time=True)
        self.bandwidth: MemberBandwidth | None = None  # None until the weight is known, and when it was configured
        self.weighed = False  # its weight was configured, or measured
        self.link: MeasuredLink | None = None  # of a node whose weight was measured
        self.read_before = 0  # bytes read from a node when it was last looked at
        self.given = False
        self.configured: float | None = None  # its weight as it was configured
        self.room_bytes: int | None = None  # None: not known
        self.stat: PoolStat | None = None
        self.failures = 0  # lookups that it did not answer
        self.reading_bytes = 0  # of spans that are being read from it now
        self.logged_down = False
        self.left = False  # it was dropped from the union
        self.named_by: str | None = None  # the node that said that this one is a further process of it

    @property
    def up(self) -> bool:
        """Whether the child can be used: it was not dropped, and a node is connected."""
        return not self.left and (self.node is None or self.node.up)

    @property
    def takes_copies(self) -> bool:
        """Whether it is a node that can be used and takes copies of other nodes' blocks."""
        return self.up and self.node is not None and self.node.takes_copies

    @property
    def read_bytes_per_s(self) -> float:
        """How fast a node is read from here, as far as it is known; above 0."""
        if self.bandwidth is not None:
            return self.bandwidth.share_bytes_per_s
        return self.configured or (self.node.read_bytes_per_s if self.node is not None else 0.0) or 1.0

    @property
    def block_bytes_max(self) -> int:
        """Size in bytes of the largest block that it accepts."""
        return self.node.block_bytes_max if self.node is not None else self.as_local.block_bytes_max

    @property
    def as_local(self) -> NodeBackend:
        """The local pool; the child must not be a node."""
        assert self.local is not None
        return self.local

    def has_room(self, size_bytes: int) -> bool:
        """Whether a block of this size is expected to fit; True as long as its room is not known."""
        return self.room_bytes is None or self.room_bytes >= staging_bytes(size_bytes)

    def note_written(self, size_bytes: int) -> None:
        """Reduce the free space by a written block, until the next `note_stat`."""
        if self.room_bytes is not None:
            self.room_bytes = max(0, self.room_bytes - staging_bytes(size_bytes))

    def note_stat(self, stat: PoolStat) -> None:
        """Update the free space to that of its healthy members."""
        self.stat = stat
        self.room_bytes = sum(m.capacity_bytes - m.used_bytes for m in stat.members if m.healthy)
