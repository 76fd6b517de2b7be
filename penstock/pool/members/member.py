"""The interface of a member of the embedded pool: a memory or an SSD of this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from penstock.core.keys import BlockKey
from penstock.pool.api import Done, PoolError
from penstock.pool.block import Block
from penstock.pool.members.stored_rows import StoredRows, Use, packed
from penstock.pool.members.work import Work

TakeUses = Callable[[int], Sequence[Use]]  # those noted since the last call, at most so many


class Member(Protocol):
    """One memory or SSD. `put` and the methods about rows return at once. For optional methods, use the functions
    below."""

    name: str
    kind: str
    capacity_bytes: int
    start_offset: int
    notes: list[str]
    read_bytes: int
    written_bytes: int
    errors: int

    @property
    def barrier(self) -> int:
        """The journal's sequence number that a store into an extent reserved now must wait for."""

    @property
    def refuses_stores(self) -> str | None:
        """Why nothing can be stored here at present; None when it can."""

    def start(self) -> None:
        """Start the worker thread."""

    def put(self, work: Work) -> PoolError | None:
        """Queue an operation. The error says why it was not accepted; `work` is then not ended."""

    def register(self, buffer: memoryview) -> None:
        """Announce staging memory that operations will use (page-aligned)."""

    def rows(self) -> StoredRows:
        """The rows of the blocks that survived a restart; before `start`."""

    def on_lost(self, lost: Callable[[Block], None]) -> None:
        """Set the callback for a stored block whose row could not be committed."""

    def forget(self, keys: Iterable[BlockKey]) -> None:
        """Delete the rows of blocks that left the table."""

    def record(self, block: Block, use: float, done: Done, deadline_s: float) -> None:
        """Commit the row of a stored block that is in the table: `done` is called once, with None when it is
        durable."""

    def confirm(self, block: Block, done: Done, deadline_s: float) -> bool:
        """Call `done` once a block in the table is durable; False, without a call, when it is durable already."""

    def on_flush(self, take_uses: TakeUses) -> None:
        """Set what gives the uses of blocks, to be stored with their rows from time to time."""

    def close(self, timeout_s: float) -> None:
        """End queued and running operations, within about `timeout_s`."""


def is_durable(member: Member) -> bool:
    """Whether blocks survive a restart; they do so once their row is recorded."""
    return bool(getattr(member, "durable", False))


def fenced_reason(member: Member) -> str | None:
    """Why a member is not used at present; None when it is. A member that answers again is used again."""
    return getattr(member, "fenced", None)


def queued(member: Member) -> tuple[int, int]:
    """Loads and stores that wait in front of a member."""
    ask = getattr(member, "queued", None)
    return ask() if ask else (0, 0)


def observed(member: Member) -> tuple[int, float]:
    """Bytes that a member read, and the seconds it took, while it was fully busy; both cumulative."""
    ask = getattr(member, "observed", None)
    return ask() if ask else (0, 0.0)


def store_at_once(member: Member, stores: Sequence[tuple[Block, memoryview]]) -> list[PoolError | None] | None:
    """Store small blocks on this thread; returns their errors. None where they must be queued (`put`)."""
    store = getattr(member, "store_at_once", None)
    return store(stores) if store else None


def forget_rows(members: Sequence[Member], gone: Sequence[tuple[int, BlockKey]]) -> None:
    """Delete the rows of blocks that left the table: number of the member, and key, of each."""
    for number in {member for member, _ in gone}:
        members[number].forget([key for member, key in gone if member == number])


class GoneMember:
    """Placeholder for a member that was drained: it has no blocks."""

    kind = "gone"
    barrier = 0
    refuses_stores = "the member is gone"

    def __init__(self, name: str) -> None:
        self.name = name
        self.capacity_bytes = self.start_offset = 0
        self.notes: list[str] = []
        self.read_bytes = self.written_bytes = self.errors = 0

    def start(self) -> None:
        """Do nothing."""

    def put(self, work: Work) -> PoolError | None:
        """Refuses every operation with an error of reason "device"."""
        return PoolError("device", f"{self.name} was drained and is gone")

    def register(self, buffer: memoryview) -> None:
        """Do nothing."""

    def rows(self) -> StoredRows:
        """No blocks."""
        return packed([])

    def on_lost(self, lost: Callable[[Block], None]) -> None:
        """Do nothing."""

    def forget(self, keys: Iterable[BlockKey]) -> None:
        """Do nothing."""

    def record(self, block: Block, use: float, done: Done, deadline_s: float) -> None:
        """Do nothing."""

    def confirm(self, block: Block, done: Done, deadline_s: float) -> bool:
        """False: there is nothing to wait for."""
        return False

    def on_flush(self, take_uses: TakeUses) -> None:
        """Do nothing."""

    def close(self, timeout_s: float) -> None:
        """Do nothing."""
