"""The order of requests: policies as ranks, and a queue ordered by rank whose members may change rank.

A rank is `(tier, key, sequence)`, smallest first. Tiers: 0 waited beyond the ageing bound, 1 ordinary, 2 deferred so
that others meet their deadlines (policy `feasible` only, see `feasibility`). CALVO gives `sjf` and `lstf`; `srpt` and
`feasible` go beyond it.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

from penstock.core.config import Policy

Rank = tuple[int, float, int]
AGED, ORDINARY, DEFERRED = 0, 1, 2


def policy_key(policy: Policy, arrival_s: float, deadline_s: float, load_s: float, compute_s: float) -> float:
    """The key of an ordinary request. `load_s` and `compute_s` are its service costs: of the whole request, and for
    `srpt` of what remains of it."""
    if policy == "fcfs":
        return arrival_s
    if policy == "sjf-compute":
        return compute_s
    if policy in ("sjf", "srpt"):
        return load_s + compute_s
    if policy == "edf":
        return deadline_s
    return deadline_s - load_s - compute_s


class Ranked(Protocol):
    """What has a rank; the least goes first."""

    rank: Rank


T = TypeVar("T", bound=Ranked)


class RankedQueue(Generic[T]):
    """Members by rank. `push` again after a member's rank changed; stale entries are skipped and swept when they
    outnumber the members. All operations are O(log n) amortised."""

    __slots__ = ("_entries", "_heap", "changes")

    def __init__(self) -> None:
        self.changes = 0  # how often its members, or their order, changed
        self._heap: list[tuple[Rank, int, T]] = []
        self._entries: dict[T, Rank] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, item: T) -> bool:
        return item in self._entries

    def push(self, item: T) -> None:
        """Add a member, or place it anew by its present rank."""
        if self._entries.get(item) == item.rank:
            return
        self.changes += 1
        self._entries[item] = item.rank
        heapq.heappush(self._heap, (item.rank, id(item), item))
        if len(self._heap) > 2 * len(self._entries) + 64:
            self._heap = [(rank, id(member), member) for member, rank in self._entries.items()]
            heapq.heapify(self._heap)

    def discard(self, item: T) -> None:
        """Take a member out; one that is not in is ignored."""
        if self._entries.pop(item, None) is not None:
            self.changes += 1

    def peek(self) -> T | None:
        """The member of least rank."""
        heap = self._heap
        while heap:
            rank, _, item = heap[0]
            if self._entries.get(item) == rank:
                return item
            heapq.heappop(heap)
        return None

    def first(self, count: int) -> list[T]:
        """Up to `count` members of least rank, in order; they stay in the queue."""
        taken: list[tuple[Rank, int, T]] = []
        while self._heap and len(taken) < count:
            entry = heapq.heappop(self._heap)
            if self._entries.get(entry[2]) == entry[0] and not (taken and taken[-1][2] is entry[2]):
                taken.append(entry)
        for entry in taken:
            heapq.heappush(self._heap, entry)
        return [entry[2] for entry in taken]

    def __iter__(self) -> Iterator[T]:
        return iter(self._entries)
