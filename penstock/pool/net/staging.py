"""Staging memory of a pool node: slots of any aligned length out of bounded arenas.

It begins with one arena. A block that is too large for it gets another arena, as long as all arenas together stay
within `limit_bytes`: the size that a node needs is known only when the first such block arrives.

A connection may use at most half of it, and all connections of one address three quarters (`pool.net.staging_shares`).
Where the memory may not grow, a single block larger than that gets its slot nevertheless. While other requests wait,
the connection of such a block is ended if its peer sends or receives it more slowly than LARGE_BYTES_PER_S_MIN.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from penstock.core.layout import STAGING_ALIGNMENT_BYTES, staging_bytes
from penstock.io.memory import aligned_buffer
from penstock.pool.local.extents import ExtentAllocator
from penstock.pool.losses import note_loss
from penstock.pool.net.staging_shares import StagingShare, StagingShares
from penstock.units import format_bytes

log = logging.getLogger(__name__)

GROW_BLOCKS = 2  # a new arena has room for so many of the blocks that it is made for
LARGE_LOOK_S = 0.25  # interval of the rate check of a block larger than a share, while others wait
LARGE_BYTES_PER_S_MIN = 32 << 20


class _Arena:
    def __init__(self, capacity_bytes: int) -> None:
        self.memory = aligned_buffer(capacity_bytes)
        self.free = ExtentAllocator(0, capacity_bytes)


class Slot:
    """A part of staging memory; `view` is valid until `give`, which frees it."""

    __slots__ = ("_arena", "_moved_bytes", "_moving_s", "_offset", "_share", "_staging", "view")

    def __init__(self, staging: Staging, arena: _Arena, offset: int, length: int, share: StagingShare | None) -> None:
        self._staging: Staging | None = staging
        self._arena, self._offset, self._share = arena, offset, share
        self._moved_bytes = 0
        self._moving_s: float | None = None  # when its peer began to send or receive it
        self.view = arena.memory[offset : offset + length]

    def give(self) -> None:
        """Free the slot; later calls do nothing."""
        staging, self._staging = self._staging, None
        if staging is not None:
            staging.take_back(self, self._arena, self._offset, len(self.view), self._share)

    def moved(self, size_bytes: int) -> None:
        """Note that the peer has sent or received `size_bytes` more; the first call starts the clock of the rate
        check."""
        if self._moving_s is None:
            self._moving_s = time.monotonic()
        self._moved_bytes += size_bytes

    def end_if_slow(self, now_s: float) -> bool:
        """End the connection of a peer that is slow with the slot; returns whether it did."""
        if self._moving_s is None or self._share is None or now_s - self._moving_s < LARGE_LOOK_S:
            return False
        if self._moved_bytes >= (now_s - self._moving_s) * LARGE_BYTES_PER_S_MIN:
            return False
        self._share.end_peer()
        return True


class Staging:
    """Arenas from which many threads take slots."""

    def __init__(
        self,
        capacity_bytes: int,
        limit_bytes: int | None = None,
        register: Callable[[memoryview], None] = lambda memory: None,
    ) -> None:
        """`limit_bytes`: limit of growth (None: it does not grow). `register` is called with each arena. Raises OSError
        when the memory cannot be allocated."""
        capacity_bytes = staging_bytes(capacity_bytes)
        self.limit_bytes = max(capacity_bytes, limit_bytes or 0)
        self._register = register
        self._arenas = [_Arena(capacity_bytes)]
        self._changed = threading.Condition()
        self._growing = threading.Lock()
        self._closed = False
        self._shares = StagingShares(capacity_bytes)
        self._large: set[Slot] = set()  # slots in use by blocks larger than a share
        register(self._arenas[0].memory)

    @property
    def capacity_bytes(self) -> int:
        """Sum of all arenas."""
        return sum(len(arena.memory) for arena in self._arenas)

    @property
    def free_bytes(self) -> int:
        """Bytes of all arenas that are in no slot."""
        return sum(arena.free.free_bytes for arena in self._arenas)

    def largest_bytes(self, shared: bool) -> int:
        """The largest block that a slot can hold, with the present arenas and one more within the limit."""
        arenas, total = self._arenas, self.capacity_bytes
        there = max(len(arena.memory) for arena in arenas)
        largest = max(min(there, total // 2) if shared else there, (self.limit_bytes - total) // GROW_BLOCKS)
        return largest - largest % STAGING_ALIGNMENT_BYTES

    def span_bytes_max(self, shared: bool) -> int:
        """Half of a connection's share; `shared`: also of blocks of other nodes."""
        return self.capacity_bytes // (8 if shared else 4)

    def share(self, source: str, end_peer: Callable[[], None], remote: bool = False) -> StagingShare:
        """The share of a connection from that source address; `end_peer` ends the connection, from any thread. Blocks
        of other nodes (`remote`) are counted separately. `StagingShare.leave` must follow."""
        return StagingShare(self._shares, source, end_peer, remote)

    def take(
        self,
        size_bytes: int,
        deadline_s: float,
        shared: bool = False,
        share: StagingShare | None = None,
        reserved: bool = False,
    ) -> Slot | None:
        """A slot for `size_bytes`, padded to the alignment. None when there is none by the deadline, when it can never
        fit, and after `close`. With `shared`, half of the memory stays free for others. The slot is charged to `share`
        (None: to nobody), and waits for room there unless it was `reserved` before."""
        length = staging_bytes(size_bytes)
        found = None
        if self._make_fit(length, shared, share is not None):
            found = self._wait(length, deadline_s, shared, None if reserved else share)
        if found is None:
            if reserved and share is not None:
                self.give_reserved(length, share)
            return None
        slot = Slot(self, *found, length, share)
        if share is not None and share.is_large(length):
            with self._changed:
                self._large.add(slot)
        return slot

    def _wait(
        self, length: int, deadline_s: float, shared: bool, share: StagingShare | None
    ) -> tuple[_Arena, int] | None:
        hurries = share is None or not share.is_large(length)
        with self._changed:
            while not self._closed:
                if share is None or share.take(length):
                    found = self._find(length, shared)
                    if found is not None:
                        return found
                    if share is not None:
                        share.give(length)
                remaining_s = deadline_s - time.monotonic()
                if remaining_s <= 0:
                    return None
                self._changed.wait(min(remaining_s, LARGE_LOOK_S) if self._large and hurries else remaining_s)
                if self._large and hurries:
                    self._end_slow()
        return None

    def _end_slow(self) -> None:
        """End peers that are slow with a block larger than a share. Called by a thread that waits for memory; the lock
        is held."""
        now_s = time.monotonic()
        for slot in [slot for slot in self._large if slot.end_if_slow(now_s)]:
            self._large.discard(slot)
            size = format_bytes(len(slot.view))
            note_loss("staging_slow", "slow", "a connection is slow with a block of %s, and others wait: ended", size)

    def take_back(self, slot: Slot, arena: _Arena, offset: int, length: int, share: StagingShare | None) -> None:
        """Called by `Slot.give`."""
        with self._changed:
            arena.free.give(offset, length)
            self._large.discard(slot)
            if share is None:
                self._changed.notify_all()
        if share is not None:
            self.give_reserved(length, share)

    def give_reserved(self, length: int, share: StagingShare) -> None:
        """Return a reservation in a share for which no slot was taken."""
        share.give(length)
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        """End every wait; slots in use may still be freed."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _find(self, length: int, shared: bool) -> tuple[_Arena, int] | None:
        if self.free_bytes < length + (self.capacity_bytes // 2 if shared else 0):
            return None
        for arena in self._arenas:
            if length <= len(arena.memory) and (offset := arena.free.take(length)) is not None:
                return arena, offset
        return None

    def _fits(self, length: int, shared: bool) -> bool:
        capacity_bytes = self.capacity_bytes
        enough = length + (capacity_bytes // 2 if shared else 0) <= capacity_bytes
        return enough and any(length <= len(arena.memory) for arena in self._arenas)

    def would_grow(self, size_bytes: int) -> bool:
        """Whether a block of this size needs more memory than there is, within a connection's share."""
        length = staging_bytes(size_bytes)
        return self._shares.is_large(length) or not self._fits(length, False)

    def _make_fit(self, length: int, shared: bool, within_share: bool) -> bool:
        """Whether a slot of this length is possible, in a new arena if needed. The arena is made here, where the limit
        allows it, also to bring a block `within_share`."""
        if self._fits(length, shared) and not (within_share and self._shares.is_large(length)):
            return True
        with self._growing:
            fits = self._fits(length, shared)
            if fits and not (within_share and self._shares.is_large(length)):
                return True
            more_bytes = GROW_BLOCKS * length
            if self._closed or self.capacity_bytes + more_bytes > self.limit_bytes:
                return fits
            try:
                arena = _Arena(more_bytes)
                self._register(arena.memory)
            except (OSError, MemoryError) as error:
                note_loss("staging", "grow", "no memory to stage blocks of %s: %s", format_bytes(length), error)
                return fits
            with self._changed:
                self._arenas = [*self._arenas, arena]
                self._changed.notify_all()
            self._shares.grown(self.capacity_bytes)
            total = format_bytes(self.capacity_bytes)
            log.warning("staging memory grew to %s for blocks of %s", total, format_bytes(length))
            return True
