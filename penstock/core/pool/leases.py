"""Leases of blocks that clients read one-sided: how many bytes each client may have pinned, and for how long.

LEASE-1  Statement: The leased bytes of a client, and of all together, never exceed their limits, except for one lease
         of a client that has no other, as long as all together stay within theirs.
LEASE-2  Statement: A lease ends exactly once: given back, run out, or with its client.
LEASE-3  Statement: Only its own client can give a lease back. A lease that ended has no effect when it is given back.
Verification: `check_integrity`, tests/core/pool/test_leases.py.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(slots=True)
class _Client:
    held_bytes: int = 0
    leases: set[int] = field(default_factory=set)


class LeaseTable:
    """Not thread-safe: the caller holds a lock, and passes the time."""

    def __init__(self, bytes_of_client_max: int, bytes_max: int, leases_max: int) -> None:
        """`leases_max`: how many leases there may be at the same time."""
        self._bytes_of_client_max, self._bytes_max, self._leases_max = bytes_of_client_max, bytes_max, leases_max
        self._leases: dict[int, tuple[object, int]] = {}  # lease -> client, bytes
        self._clients: dict[object, _Client] = {}
        self._ends: list[tuple[float, int]] = []  # a heap; leases that ended before stay in it until their time
        self._next = 1
        self.held_bytes = 0

    def __len__(self) -> int:
        return len(self._leases)

    def held_of(self, client: object) -> int:
        """Bytes that are leased to a client."""
        found = self._clients.get(client)
        return found.held_bytes if found is not None else 0

    def grant(self, client: object, size_bytes: int, until_s: float) -> int | None:
        """A lease, a number above 0; None when a limit would be exceeded."""
        of_client = self.held_of(client)
        if len(self._leases) >= self._leases_max or self.held_bytes + size_bytes > self._bytes_max:
            return None
        if of_client and of_client + size_bytes > self._bytes_of_client_max:
            return None
        lease, self._next = self._next, self._next + 1
        self._leases[lease] = client, size_bytes
        whose = self._clients.setdefault(client, _Client())
        whose.leases.add(lease)
        whose.held_bytes += size_bytes
        self.held_bytes += size_bytes
        heapq.heappush(self._ends, (until_s, lease))
        return lease

    def give_back(self, client: object, leases: Iterable[int]) -> list[int]:
        """End those of the leases that the client has; returns them."""
        return [lease for lease in leases if self._leases.get(lease, (None, 0))[0] == client and self._end(lease)]

    def leave(self, client: object) -> list[int]:
        """End all leases of a client; returns them."""
        whose = self._clients.get(client)
        return [lease for lease in list(whose.leases) if self._end(lease)] if whose is not None else []

    def run_out(self, now_s: float) -> list[int]:
        """End the leases whose time has come; returns them."""
        ended = []
        while self._ends and self._ends[0][0] <= now_s:
            lease = heapq.heappop(self._ends)[1]
            if self._end(lease):
                ended.append(lease)
        return ended

    @property
    def next_s(self) -> float | None:
        """When `run_out` must be called next; None: no lease runs."""
        while self._ends and self._ends[0][1] not in self._leases:
            heapq.heappop(self._ends)
        return self._ends[0][0] if self._ends else None

    def _end(self, lease: int) -> bool:
        found = self._leases.pop(lease, None)
        if found is None:
            return False
        client, size_bytes = found
        whose = self._clients[client]
        whose.leases.discard(lease)
        whose.held_bytes -= size_bytes
        self.held_bytes -= size_bytes
        if not whose.leases:
            del self._clients[client]
        if len(self._ends) > 2 * len(self._leases) + 64:  # most of them ended before their time
            self._ends = [entry for entry in self._ends if entry[1] in self._leases]
            heapq.heapify(self._ends)
        return True

    def check_integrity(self) -> None:
        """Assert LEASE-1 and that the sums are right; for tests."""
        assert self.held_bytes == sum(size for _, size in self._leases.values()) <= max(self._bytes_max, 0)
        assert len(self._leases) <= self._leases_max
        assert {lease for whose in self._clients.values() for lease in whose.leases} == set(self._leases)
        for client, whose in self._clients.items():
            assert whose.leases and whose.held_bytes == sum(self._leases[lease][1] for lease in whose.leases)
            assert all(self._leases[lease][0] == client for lease in whose.leases)
            assert whose.held_bytes <= self._bytes_of_client_max or len(whose.leases) == 1
        assert set(self._leases) <= {lease for _, lease in self._ends}
        assert len(self._ends) <= 2 * len(self._leases) + 65
