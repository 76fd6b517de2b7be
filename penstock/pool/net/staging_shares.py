"""Limits of a node's staging memory for one connection and for one source address, so that none blocks the others.

A connection may hold half, all connections of an address three quarters; for blocks of other nodes, half of that. A
connection may have one block that is larger than its share, and nothing else at the same time. An address has at most
BLOCKS_OF_SOURCE_MAX blocks in it, so that many small blocks do not fill the queues behind it. A request for which its
share has no room waits until that connection, or that address, frees some. Requests of a connection stay in order;
connections of an address take turns.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable

BLOCKS_OF_SOURCE_MAX = 1024
_Waiting = tuple[int, Callable[[], None], Callable[[], None]]  # (bytes, begin, refuse: called at the connection's end)


class _Source:
    """One address: the bytes that its connections hold, and those connections that wait."""

    __slots__ = ("blocks", "held_bytes", "users", "waiting")

    def __init__(self) -> None:
        self.blocks = 0
        self.held_bytes = 0
        self.users = 0  # connections
        self.waiting: OrderedDict[StagingShare, deque[_Waiting]] = OrderedDict()


class StagingShares:
    """The shares of one staging memory."""

    def __init__(self, capacity_bytes: int) -> None:
        self._lock = threading.Lock()
        self._capacity_bytes = capacity_bytes
        self._sources: dict[tuple[str, bool], _Source] = {}

    def is_large(self, length: int, remote: bool = False) -> bool:
        """Whether a block is larger than the share of a connection."""
        return length > self._of_connection(remote)

    def _of_connection(self, remote: bool) -> int:
        return self._capacity_bytes // (4 if remote else 2)

    def _of_source(self, remote: bool) -> int:
        return 3 * self._capacity_bytes // (8 if remote else 4)

    def grown(self, capacity_bytes: int) -> None:
        """The memory has grown: begin requests that now have room."""
        with self._lock:
            self._capacity_bytes = capacity_bytes
            begun = [begin for source in self._sources.values() for begin in self._begun(source)]
        for begin in begun:
            begin()

    def join(self, share: StagingShare) -> _Source:
        """Register a new share with its source address; returns the record of that address."""
        with self._lock:
            source = self._sources.setdefault((share.source, share.remote), _Source())
            source.users += 1
            return source

    def leave(self, share: StagingShare) -> None:
        """Remove a share whose connection has ended; its waiting requests are refused."""
        with self._lock:
            waiting = share.of_source.waiting.pop(share, ())
            share.of_source.users -= 1
            self._forget_unused(share)
        for _, _, refuse in waiting:
            refuse()

    def take(self, share: StagingShare, length: int) -> bool:
        """Charge `length` bytes to the share, if it has room; returns whether it did."""
        with self._lock:
            return self._take(share, length)

    def reserve(self, share: StagingShare, length: int, begin: Callable[[], None], refuse: Callable[[], None]) -> None:
        """Call `begin` once `length` bytes are charged to the share, or `refuse` when it is removed before."""
        with self._lock:
            waiting = share.of_source.waiting
            here = share not in waiting and self._take(share, length)
            if not here:
                waiting.setdefault(share, deque()).append((length, begin, refuse))
        if here:
            begin()

    def give(self, share: StagingShare, length: int) -> None:
        """Uncharge `length` bytes, and begin requests that now have room."""
        with self._lock:
            share.held_bytes -= length
            share.of_source.held_bytes -= length
            share.of_source.blocks -= 1
            begun = self._begun(share.of_source)
            self._forget_unused(share)
        for begin in begun:
            begin()

    def _forget_unused(self, share: StagingShare) -> None:
        source = share.of_source
        if not source.users and not source.held_bytes:
            self._sources.pop((share.source, share.remote), None)

    def _take(self, share: StagingShare, length: int) -> bool:
        remote, source = share.remote, share.of_source
        if source.blocks >= BLOCKS_OF_SOURCE_MAX:
            return False
        if self.is_large(length, remote):
            if share.held_bytes:
                return False
        elif share.held_bytes + length > self._of_connection(remote) or (
            source.held_bytes and source.held_bytes + length > self._of_source(remote)
        ):
            return False
        share.held_bytes += length
        source.held_bytes += length
        source.blocks += 1
        return True

    def _begun(self, source: _Source) -> list[Callable[[], None]]:
        """The waiting requests of this address that have room now; they are charged from now on."""
        begun: list[Callable[[], None]] = []
        for share in list(source.waiting):
            waiting = source.waiting[share]
            if not self._take(share, waiting[0][0]):
                continue
            begun.append(waiting.popleft()[1])
            if waiting:
                source.waiting.move_to_end(share)
            else:
                del source.waiting[share]
        return begun


class StagingShare:
    """The staging memory of one connection, for blocks of this node or (`remote`) of other nodes. Any thread may
    call."""

    __slots__ = ("_shares", "end_peer", "held_bytes", "of_source", "remote", "source")

    def __init__(self, shares: StagingShares, source: str, end_peer: Callable[[], None], remote: bool) -> None:
        """`end_peer` ends the connection; called with locks of the staging memory held."""
        self._shares = shares
        self.source, self.remote = source, remote
        self.end_peer = end_peer
        self.held_bytes = 0  # changed under the lock of `StagingShares`
        self.of_source = shares.join(self)

    def is_large(self, length: int) -> bool:
        """Whether a block of `length` bytes is larger than this share."""
        return self._shares.is_large(length, self.remote)

    def take(self, length: int) -> bool:
        """Charge `length` bytes; False when the share has no room now."""
        return self._shares.take(self, length)

    def reserve(self, length: int, begin: Callable[[], None], refuse: Callable[[], None]) -> None:
        """Call `begin` once `length` bytes are charged: now, or from another thread as soon as there is room; or call
        `refuse` when the connection ends before."""
        self._shares.reserve(self, length, begin, refuse)

    def give(self, length: int) -> None:
        """Uncharge `length` bytes."""
        self._shares.give(self, length)

    def leave(self) -> None:
        """The connection has ended; the bytes that it holds must still be uncharged by `give`."""
        self._shares.leave(self)
