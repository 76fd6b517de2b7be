"""Requests that wait to be placed: first come first served, or least cost first with bounded ageing.

Requests that start over go before all others. Entries leave in any order: a removed entry is skipped when it is found,
and swept when such entries are the majority.

Invariant, checked by `check_integrity`:
  WAIT-1 `len` counts the live entries. Each list holds at most twice as many entries, and `SWEEP` more.
"""

from __future__ import annotations

import heapq
from collections import deque
from typing import Generic, Literal, TypeVar

Order = Literal["fcfs", "sjf"]
Item = TypeVar("Item")
SWEEP = 1024


class Entry(Generic[Item]):
    """One item's place in the queue."""

    __slots__ = ("alive", "item", "since_s")

    def __init__(self, item: Item, since_s: float) -> None:
        self.item = item
        self.since_s = since_s
        self.alive = True


class WaitingQueue(Generic[Item]):
    """See the module. Times never go backwards."""

    def __init__(self, order: Order, age_bound_s: float) -> None:
        self._by_cost = order == "sjf"
        self._age_bound_s = age_bound_s
        self._again: deque[Entry[Item]] = deque()
        self._arrived: deque[Entry[Item]] = deque()
        self._cheapest: list[tuple[float, int, Entry[Item]]] = []
        self._sequence = 0
        self._alive = 0

    def __len__(self) -> int:
        return self._alive

    def push(self, item: Item, now: float, cost: float) -> Entry[Item]:
        """An arrival. O(log n) by cost, else O(1)."""
        entry = Entry(item, now)
        self._arrived.append(entry)
        if self._by_cost:
            self._sequence += 1
            heapq.heappush(self._cheapest, (cost, self._sequence, entry))
        self._alive += 1
        return entry

    def push_again(self, item: Item, now: float) -> Entry[Item]:
        """An item that starts over."""
        entry = Entry(item, now)
        self._again.append(entry)
        self._alive += 1
        return entry

    def first(self, now: float) -> Entry[Item] | None:
        """The next entry; it stays in the queue."""
        for queue in (self._again, self._arrived):
            while queue and not queue[0].alive:
                queue.popleft()
        if self._again:
            return self._again[0]
        if not self._arrived:
            return None
        oldest = self._arrived[0]
        if not self._by_cost or now - oldest.since_s > self._age_bound_s:
            return oldest
        cheapest = self._cheapest
        while not cheapest[0][2].alive:
            heapq.heappop(cheapest)
        return cheapest[0][2]

    def remove(self, entry: Entry[Item]) -> None:
        """The entry's item waits no more."""
        assert entry.alive
        entry.alive = False
        self._alive -= 1
        listed = len(self._again) + len(self._arrived)
        if listed > SWEEP + 2 * self._alive or len(self._cheapest) > SWEEP + 2 * self._alive:
            self._again = deque(e for e in self._again if e.alive)
            self._arrived = deque(e for e in self._arrived if e.alive)
            self._cheapest = [e for e in self._cheapest if e[2].alive]
            heapq.heapify(self._cheapest)

    def since_before(self, limit_s: float) -> list[Entry[Item]]:
        """Entries that have waited since before `limit_s`, oldest first. O(1) when there are none."""
        found = []
        for queue in (self._again, self._arrived):
            for entry in queue:
                if entry.since_s >= limit_s:
                    break
                if entry.alive:
                    found.append(entry)
        return found

    def items(self) -> list[Item]:
        """Everything that waits, requests placed again first; in no order of cost."""
        return [entry.item for queue in (self._again, self._arrived) for entry in queue if entry.alive]

    def check_integrity(self) -> None:
        """Assert WAIT-1; O(n)."""
        assert len(self.items()) == self._alive, "WAIT-1: the entries alive are miscounted"
        listed = len(self._again) + len(self._arrived)
        assert max(listed, len(self._cheapest)) <= SWEEP + 2 * self._alive + 1, "WAIT-1: too many removed entries"
