"""The leaves of each group, the one of least worth first: heaps of numbers, no object per leaf."""

from __future__ import annotations

import heapq
from collections.abc import Callable

from penstock.core.pool.block_rows import PINNED, PRESENT, BlockRows

Group = tuple[int, bytes]  # a member and an account
TIDY_STEPS = 4  # items looked at per call while a heap is tidied
_ROW_BITS = 32
_ROW = (1 << _ROW_BITS) - 1
_TICKET_BITS = 32
_TICKET = (1 << _TICKET_BITS) - 1


class _Heap:
    """Items are numbers: the bits of a worth of at least 0 (they have its order), a ticket, a row."""

    __slots__ = ("main", "rest")

    def __init__(self) -> None:
        self.main: list[int] = []
        self.rest: list[int] = []  # moves to `main` from its end, item by item, without those that are dead


class LeafQueues:
    """A *candidate* is a present row without children and pins. O(log n) amortised for every call, and no call touches
    more than a few items: heaps are tidied step by step.

    LEAF-1  Each candidate has exactly one live item, in a heap of its group, whose worth is not above its own.
    LEAF-2  `_dead` counts the items that are not live, or whose row has children; they are tidied away once they are
            more than half of all, plus 64.
    LEAF-3  Each group with a candidate has an item in the heap of its family, whose worth is not above its next one.
    Verification: `check_integrity`, tests/core/pool/test_pool_eviction.py.
    """

    def __init__(self, rows: BlockRows, family_of: Callable[[Group], int | None]) -> None:
        """`family_of` puts groups into families, for `least_group`; None: it has none. `refamily` must be called when
        it has another answer for a group."""
        self._rows = rows
        self._heaps: dict[Group, _Heap] = {}
        self._families: dict[int, list[tuple[int, Group]]] = {}
        self._family_of = family_of
        self._ticket = self._queued = self._dead = 0
        self._untidy: list[_Heap] = []

    @property
    def groups(self) -> int:
        """How many groups have a heap."""
        return len(self._heaps)

    @property
    def items(self) -> int:
        """How many items all heaps have."""
        return self._queued

    def offer(self, row: int) -> None:
        """Queue a row if it is a candidate and not queued yet."""
        rows = self._rows
        if rows.ticket[row] or rows.children[row] or rows.flags[row] & (PRESENT | PINNED) != PRESENT:
            return
        self._ticket = self._ticket % _TICKET + 1
        rows.ticket[row] = self._ticket
        group = (rows.member[row], rows.account(row))
        heap = self._heaps.get(group)
        if heap is None:
            heap = self._heaps[group] = _Heap()
        item = self._item(row)
        heapq.heappush(heap.main, item)
        self._queued += 1
        if heap.main[0] == item:
            self._lead(item, group)
        self._tidy()

    def got_child(self, row: int) -> None:
        """A row has its first child."""
        if self._rows.ticket[row]:
            self._dead += 1

    def got_children(self, queued: int) -> None:
        """So many rows that have a ticket have their first child."""
        self._dead += queued

    def lost_children(self, row: int) -> None:
        """A row has no child any more."""
        if self._rows.ticket[row]:
            self._dead -= 1
        else:
            self.offer(row)

    def forget(self, row: int) -> None:
        """A row leaves its group; to be called before its children change."""
        if self._rows.ticket[row]:
            self._rows.ticket[row] = 0
            self._dead += not self._rows.children[row]
            self._tidy()

    def least(self, group: Group) -> int:
        """The candidate of a group with the least worth; -1 when there is none."""
        items = self._top(group)
        return items[0] & _ROW if items else -1

    def pop(self, group: Group) -> int:
        """Take the candidate of least worth out of its queue; -1 when there is none."""
        items = self._top(group)
        if items is None:
            return -1
        row = heapq.heappop(items) & _ROW
        self._queued -= 1
        self._rows.ticket[row] = 0
        return row

    def least_group(self, family: int) -> Group | None:
        """The group of a family whose candidate has the least worth; None when none has a candidate."""
        groups = self._families.get(family, [])
        while groups:
            item, group = groups[0]
            items = self._top(group)
            if self._family_of(group) != family or items is None:
                heapq.heappop(groups)
            elif items[0] != item:
                heapq.heapreplace(groups, (items[0], group))
            else:
                return group
        return None

    def refamily(self, group: Group) -> None:
        """A group belongs to another family than before: `least_group` finds it there from now on."""
        items = self._top(group)
        if items is not None:
            self._lead(items[0], group)

    def offer_many(self, queued: list[int]) -> None:
        """Queue many rows, none of which is queued."""
        for row in queued:
            self.offer(row)

    def check_integrity(self) -> None:
        """Assert LEAF-1..LEAF-3; O(n)."""
        rows, live, dead, queued = self._rows, {}, 0, 0
        for group, heap in self._heaps.items():
            for item in (*heap.main, *heap.rest):
                row = item & _ROW
                queued += 1
                if rows.ticket[row] != item >> _ROW_BITS & _TICKET:
                    dead += 1
                    continue
                assert row not in live, f"LEAF-1: row {row} has two live items"
                assert group == (rows.member[row], rows.account(row)), f"LEAF-1: row {row} is in another group"
                live[row] = item
                dead += rows.children[row] > 0
        assert (dead, queued) == (self._dead, self._queued), "LEAF-2: items are miscounted"
        for row in range(rows.high):
            if rows.flags[row] & (PRESENT | PINNED) == PRESENT and not rows.children[row]:
                assert row in live and live[row] <= self._item(row), f"LEAF-1: candidate {row} is not queued right"
        for group in list(self._heaps):
            items, family = self._top(group), self._family_of(group)
            if items is not None and family is not None:
                least = [item for item, other in self._families.get(family, []) if other == group]
                assert least and min(least) <= items[0], f"LEAF-3: group {group} is not in its family"

    # --- inside ---

    def _item(self, row: int) -> int:
        rows = self._rows
        return ((rows.worth_bits[row] << _TICKET_BITS | rows.ticket[row]) << _ROW_BITS) | row

    def _top(self, group: Group) -> list[int] | None:
        """The part of the group's heap that begins with its next candidate; None, and the heap is forgotten, when it
        has none."""
        heap = self._heaps.get(group)
        if heap is None:
            return None
        main = self._settle(heap.main)
        rest = bool(heap.rest) and self._settle(heap.rest)
        if main:
            return heap.rest if rest and heap.rest[0] < heap.main[0] else heap.main
        if rest:
            return heap.rest
        del self._heaps[group]
        return None

    def _settle(self, items: list[int]) -> bool:
        """Bring the candidate of least worth to the top; False when there is none."""
        rows = self._rows
        while items:
            item = items[0]
            row = item & _ROW
            if rows.ticket[row] != item >> _ROW_BITS & _TICKET:
                self._dead -= 1
            elif rows.children[row]:
                self._dead -= 1
                rows.ticket[row] = 0
            elif rows.flags[row] & PINNED:
                rows.ticket[row] = 0
            elif rows.worth_bits[row] != item >> _ROW_BITS + _TICKET_BITS:
                heapq.heapreplace(items, self._item(row))
                continue
            else:
                return True
            heapq.heappop(items)
            self._queued -= 1
        return False

    def _lead(self, item: int, group: Group) -> None:
        """A group has a new next candidate. Its stale items are dropped when they are half of the heap."""
        family = self._family_of(group)
        if family is None:
            return
        groups = self._families.setdefault(family, [])
        heapq.heappush(groups, (item, group))
        if len(groups) > 2 * len(self._heaps) + 64:
            first: dict[Group, int] = {}
            for one, name in sorted(groups):
                first.setdefault(name, one)
            groups[:] = sorted((one, name) for name, one in first.items())

    def _tidy(self) -> None:
        """For LEAF-2: look at a few items that may be dead."""
        if not self._untidy:
            if self._dead <= self._queued // 2 + 64:
                return
            self._untidy = [heap for heap in self._heaps.values() if heap.main]
            for heap in self._untidy:
                heap.rest, heap.main = heap.main, []
        rows = self._rows
        for _ in range(TIDY_STEPS):
            while self._untidy and not self._untidy[-1].rest:
                self._untidy.pop()
            if not self._untidy:
                return
            heap = self._untidy[-1]
            item = heap.rest.pop()
            row = item & _ROW
            if rows.ticket[row] != item >> _ROW_BITS & _TICKET:
                self._dead -= 1
            elif rows.children[row]:
                self._dead -= 1
                rows.ticket[row] = 0
            else:
                heapq.heappush(heap.main, item)
                continue
            self._queued -= 1
