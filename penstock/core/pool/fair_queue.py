"""Which tenant is served next: tenants with queued items get equal bytes, each tenant's items in order.

Start-time fair queueing (Goyal, Vin, Cheng 1996): an item starts, in virtual bytes, where its tenant's last one ended,
but not before the item that was taken last; the earliest start is taken first.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")

IDLE_TENANTS_MAX = 256  # tenants without queued items whose service is remembered


class FairQueue(Generic[Item]):
    """Items with a tenant and a size; O(log tenants) to put and take.

    While two tenants both have items queued, the bytes taken of one exceed those of the other by at most the largest
    item of each. Items of one tenant stay in order; with one tenant the queue is first in, first out.

    FAIR-1  Every tenant with queued items is in the heap once, with the start of its first item.
    FAIR-2  No tenant that is remembered as idle has queued items.
    FAIR-3  The length is the number of queued items.
    Verification: tests/core/pool/test_fair_queue.py.
    """

    def __init__(self) -> None:
        self._queues: dict[bytes, deque[tuple[Item, int]]] = {}
        self._heap: list[tuple[int, int, bytes]] = []  # start of the tenant's first item, order of arrival, tenant
        self._ends: dict[bytes, int] = {}  # where service of an idle tenant ended
        self._now = 0  # start of the item taken last
        self._serial = 0
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Item]:
        """Every queued item, in no promised order."""
        return (item for queue in self._queues.values() for item, _ in queue)

    def put(self, item: Item, tenant: bytes, size_bytes: int) -> None:
        """Queue an item behind those of its tenant."""
        queue = self._queues.get(tenant)
        if queue is None:
            queue = self._queues[tenant] = deque()
            self._push(tenant, max(self._now, self._ends.pop(tenant, 0)))
        queue.append((item, max(1, size_bytes)))
        self._length += 1

    def peek(self) -> Item | None:
        """What `take` would return now."""
        return self._queues[self._heap[0][2]][0][0] if self._heap else None

    def take(self) -> Item | None:
        """The next item, taken out; None when the queue is empty."""
        if not self._heap:
            return None
        start, _, tenant = heapq.heappop(self._heap)
        queue = self._queues[tenant]
        item, size_bytes = queue.popleft()
        self._length -= 1
        self._now = start
        if queue:
            self._push(tenant, start + size_bytes)
        else:
            self._idle(tenant, start + size_bytes)
        return item

    def remove_if(self, condition: Callable[[Item], bool]) -> list[Item]:
        """Take out every item that meets the condition; O(n). It does not count as served."""
        removed: list[Item] = []
        for start, _, tenant in list(self._heap):
            queue = self._queues[tenant]
            gone = [item for item, _ in queue if condition(item)]
            if not gone:
                continue
            removed += gone
            left = set(map(id, gone))
            self._queues[tenant] = deque(entry for entry in queue if id(entry[0]) not in left)
            if not self._queues[tenant]:
                self._heap = [entry for entry in self._heap if entry[2] != tenant]
                self._idle(tenant, start)
        heapq.heapify(self._heap)
        self._length -= len(removed)
        return removed

    def displace(self, tenant: bytes) -> Item | None:
        """Where the queue is full: take out the last item of the tenant with the most, for an item of `tenant`. None
        when `tenant` would then have as many as that one; O(tenants)."""
        longest = max(self._queues, key=lambda name: len(self._queues[name]), default=None)
        if longest is None or len(self._queues[longest]) < len(self._queues.get(tenant, ())) + 2:
            return None
        item, _ = self._queues[longest].pop()
        self._length -= 1
        return item

    def drain(self) -> list[Item]:
        """Everything, taken out in the order of `take`."""
        rest: list[Item] = []
        while (item := self.take()) is not None:
            rest.append(item)
        return rest

    def check_integrity(self) -> None:
        """Assert FAIR-1..FAIR-3; O(n)."""
        assert sorted(tenant for _, _, tenant in self._heap) == sorted(self._queues), "FAIR-1: a tenant is missing"
        assert all(self._queues.values()), "FAIR-1: a tenant without items is in the heap"
        assert not self._queues.keys() & self._ends.keys(), "FAIR-2: a tenant is idle and not"
        assert self._length == sum(map(len, self._queues.values())), "FAIR-3: the length is wrong"
        assert len(self._ends) <= IDLE_TENANTS_MAX

    def _push(self, tenant: bytes, start: int) -> None:
        self._serial += 1
        heapq.heappush(self._heap, (start, self._serial, tenant))

    def _idle(self, tenant: bytes, end: int) -> None:
        """Remember where service of an idle tenant ended, so that it gains nothing by leaving and coming back."""
        del self._queues[tenant]
        self._ends[tenant] = end
        if len(self._ends) > IDLE_TENANTS_MAX:
            self._ends = {name: at for name, at in self._ends.items() if at > self._now}
        while len(self._ends) > IDLE_TENANTS_MAX:
            del self._ends[min(self._ends, key=self._ends.__getitem__)]
