"""Space that clients may fill with one-sided writes: who may use which for how long, and when it is free again.

A grant is open until its client commits it, returns it, or its time is over. A write that has begun cannot be stopped
by itself: the space of a grant that ended without a word of its client is used again only after a quarantine, or once
its client can write nothing any more. No quarantine is long enough for every writer (a process can be stopped for
hours); what such a writer damages, the checksums find.

GRANT-1  Statement: The bytes of a client's grants, open or being stored, never exceed the limit for one client.
GRANT-2  Statement: Each grant ends exactly once. Until then nobody else is granted its space.
GRANT-3  Statement: Only its own client can commit or return a grant, and only before its time is over can it commit.
Verification: `check_integrity`, tests/core/pool/test_grants.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

GRANT_FIRST = 1 << 48  # a client returns leases (`core.pool.leases`) and grants alike, by their number


@dataclass(slots=True)
class _Grant:
    client: object
    size_bytes: int
    until_s: float  # of an open one: the end of its time; of one in quarantine: the end of that
    state: Literal["open", "storing", "quarantine"] = "open"


class GrantTable:
    """Not thread-safe: the caller holds a lock, and passes the time."""

    def __init__(self, bytes_of_client_max: int, grants_max: int, quarantine_s: float) -> None:
        """`grants_max`: how many grants there may be that have not ended."""
        self._bytes_of_client_max, self._grants_max = bytes_of_client_max, grants_max
        self._quarantine_s = quarantine_s
        self._grants: dict[int, _Grant] = {}
        self._bytes_of: dict[object, int] = {}  # of grants that are open or being stored
        self._next = GRANT_FIRST

    def __len__(self) -> int:
        return len(self._grants)

    def count(self, state: Literal["open", "storing", "quarantine"]) -> int:
        """How many grants are in this state."""
        return sum(grant.state == state for grant in self._grants.values())

    def may_grant(self, client: object, size_bytes: int) -> bool:
        """Whether the limits allow the client another grant."""
        within = self._bytes_of.get(client, 0) + size_bytes <= self._bytes_of_client_max
        return within and len(self._grants) < self._grants_max

    def grant(self, client: object, size_bytes: int, until_s: float) -> int:
        """A new grant, a number from GRANT_FIRST on; `may_grant` allows it."""
        number, self._next = self._next, self._next + 1
        self._grants[number] = _Grant(client, size_bytes, until_s)
        self._bytes_of[client] = self._bytes_of.get(client, 0) + size_bytes
        return number

    def commit(self, client: object, number: int, now_s: float) -> bool:
        """The client has filled its space: from now on it is being stored, until `stored`. False where it is not an
        open grant of this client."""
        grant = self._grants.get(number)
        if grant is None or grant.client != client or grant.state != "open" or grant.until_s <= now_s:
            return False
        grant.state = "storing"
        return True

    def stored(self, number: int) -> None:
        """The space of a grant that was committed is free."""
        self._uncount(self._grants.pop(number))

    def give_back(self, client: object, numbers: Iterable[int]) -> list[int]:
        """The client's writes to these have ended: returns those whose space is free now."""
        ended = []
        for number in numbers:
            grant = self._grants.get(number)
            if grant is None or grant.client != client or grant.state == "storing":
                continue
            del self._grants[number]
            if grant.state == "open":
                self._uncount(grant)
            ended.append(number)
        return ended

    def leave(self, client: object, now_s: float, writes_ended: bool = False) -> list[int]:
        """The client is gone: its open grants are in quarantine from now on. `writes_ended`: it can write nothing any
        more, so none of its grants needs a quarantine. Returns those whose space is free now."""
        for grant in self._grants.values():
            if grant.client == client and grant.state == "open":
                self._to_quarantine(grant, now_s)
        if not writes_ended:
            return []
        return self._end_quarantine(lambda grant: grant.client == client)

    def run_out(self, now_s: float) -> list[int]:
        """End what has run out by now; returns the grants whose space is free."""
        for grant in self._grants.values():
            if grant.state == "open" and grant.until_s <= now_s:
                self._to_quarantine(grant, grant.until_s)
        return self._end_quarantine(lambda grant: grant.until_s <= now_s)

    def _end_quarantine(self, of: Callable[[_Grant], bool]) -> list[int]:
        ended = [number for number, grant in self._grants.items() if grant.state == "quarantine" and of(grant)]
        for number in ended:
            del self._grants[number]
        return ended

    def _to_quarantine(self, grant: _Grant, from_s: float) -> None:
        grant.state, grant.until_s = "quarantine", from_s + self._quarantine_s
        self._uncount(grant)

    def _uncount(self, grant: _Grant) -> None:
        left = self._bytes_of[grant.client] - grant.size_bytes
        if left:
            self._bytes_of[grant.client] = left
        else:
            del self._bytes_of[grant.client]

    def check_integrity(self) -> None:
        """Assert GRANT-1 and that the sums are right; for tests."""
        found: dict[object, int] = {}
        for grant in self._grants.values():
            if grant.state != "quarantine":
                found[grant.client] = found.get(grant.client, 0) + grant.size_bytes
        assert found == self._bytes_of
        assert all(size <= self._bytes_of_client_max for size in found.values())
        assert len(self._grants) <= self._grants_max
