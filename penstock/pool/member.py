"""What the embedded pool asks of a member: a memory or an SSD of this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

from penstock.core.keys import BlockKey
from penstock.pool.api import Done, PoolError
from penstock.pool.block import Block
from penstock.pool.work import Work

Use = tuple[BlockKey, float, int]  # a key, what its block is worth, how often it was used


class Member(Protocol):
    """One memory or SSD. `put` and the notes of rows return at once. What only some members have is asked for by the
    functions below."""

    name: str
    kind: str
    capacity_bytes: int
    start_offset: int
    notes: list[str]
    read_bytes: int
    written_bytes: int
    errors: int

    @property
    def barrier(self) -> int: ...
    @property
    def refuses_stores(self) -> str | None: ...
    def start(self) -> None: ...
    def put(self, work: Work) -> PoolError | None: ...
    def register(self, buffer: memoryview) -> None: ...
    def rows(self) -> list[tuple[Block, float]]: ...
    def on_lost(self, lost: Callable[[Block], None]) -> None: ...
    def forget(self, blocks: Iterable[Block]) -> None: ...
    def record(self, block: Block, use: float, done: Done, deadline_s: float) -> None: ...
    def confirm(self, block: Block, done: Done, deadline_s: float) -> bool: ...
    def used(self, uses: Iterable[Use]) -> None: ...
    def close(self, timeout_s: float) -> None: ...


def is_durable(member: Member) -> bool:
    """Whether a block is safe only once its row is recorded, and survives a restart then."""
    return bool(getattr(member, "durable", False))


def fenced_reason(member: Member) -> str | None:
    """Why a member is not used at present; None when it is. A member that answers again is used again."""
    return getattr(member, "fenced", None)


def queued(member: Member) -> tuple[int, int]:
    """Loads and stores that wait in front of a member."""
    ask = getattr(member, "queued", None)
    return ask() if ask else (0, 0)


def observed(member: Member) -> tuple[int, float]:
    """Bytes that a member read, and the time it took, while it had enough to do; both cumulative."""
    ask = getattr(member, "observed", None)
    return ask() if ask else (0, 0.0)


class GoneMember:
    """In the place of a member that was drained: nothing is here any more."""

    kind = "gone"
    barrier = 0
    refuses_stores = "the member is gone"

    def __init__(self, name: str) -> None:
        self.name = name
        self.capacity_bytes = self.start_offset = 0
        self.notes: list[str] = []
        self.read_bytes = self.written_bytes = self.errors = 0

    def start(self) -> None:
        """Nothing is here."""

    def put(self, work: Work) -> PoolError | None:
        return PoolError("device", f"{self.name} was drained and is gone")

    def register(self, buffer: memoryview) -> None:
        """Nothing is here."""

    def rows(self) -> list[tuple[Block, float]]:
        return []

    def on_lost(self, lost: Callable[[Block], None]) -> None:
        """Nothing is here."""

    def forget(self, blocks: Iterable[Block]) -> None:
        """Nothing is here."""

    def record(self, block: Block, use: float, done: Done, deadline_s: float) -> None:
        """Nothing is here."""

    def confirm(self, block: Block, done: Done, deadline_s: float) -> bool:
        return False

    def used(self, uses: Iterable[Use]) -> None:
        """Nothing is here."""

    def close(self, timeout_s: float) -> None:
        """Nothing is here."""
