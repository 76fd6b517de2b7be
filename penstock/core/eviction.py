"""Which block is evicted next: the one of least worth, leaf before root, never a pinned one.

`PrefixIndex` is that of L1 of the engine; the pool's is `core.pool.leaf_queues`, without an object per block. It has no
clock: callers pass what a key is worth at each use. The time makes it least recently used; `RebuildValue` makes it
GreedyDual-Size-Frequency (Cherkasova 1998).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)

USES_MAX = 4  # further uses add no worth, so that blocks that were hot once can leave
NS_PER_BYTE_MAX = 1024.0  # 2 s for a block of 2 MiB: an upper limit
TICK = 2.0**-30  # added by each use: equal costs are ordered by last use, also after values were stored


class RebuildValue:
    """The worth of a block: `inflation + uses * rebuild_s / size_bytes`, in nanoseconds per byte.

    Inflation is the value of what was evicted last, so that worth ages with evictions, plus one `TICK` per use. With
    costs of 0 (not known) the order is that of last use.
    """

    __slots__ = ("inflation",)

    def __init__(self) -> None:
        self.inflation = 0.0

    def used(self, uses: int, rebuild_s: float, size_bytes: int) -> float:
        """Value of a block that is used now, for the `uses`-th time."""
        self.inflation += TICK
        return self.inflation + rebuild_cost(uses, rebuild_s, size_bytes)

    def passed(self, uses: int) -> None:
        """So many uses happened elsewhere: the next use counts as later than all of them."""
        self.inflation += uses * TICK

    def evicted(self, value: float) -> None:
        """A block of this value was evicted: from now on values are counted from there (inflation)."""
        self.inflation = max(self.inflation, value)

    def restored(self, value: float, uses: int, rebuild_s: float, size_bytes: int) -> float:
        """Take over a value that an earlier process computed; later uses are worth no less."""
        value = value if math.isfinite(value) else 0.0
        self.inflation = max(self.inflation, value - rebuild_cost(uses, rebuild_s, size_bytes))
        return value


def rebuild_cost(uses: int, rebuild_s: float, size_bytes: int) -> float:
    """What `RebuildValue` adds to inflation: nanoseconds per byte."""
    if not 0.0 < rebuild_s < math.inf:
        return 0.0
    return max(1, min(uses, USES_MAX)) * min(rebuild_s * 1e9 / size_bytes, NS_PER_BYTE_MAX)


class _Entry(Generic[Key]):
    """One present key. `ticket` names its one live heap item, 0 when it has none."""

    __slots__ = ("group", "parent", "pins", "ticket", "use")

    def __init__(self, parent: Key, group: Hashable, use: tuple[float, int]) -> None:
        self.parent = parent
        self.group = group
        self.use = use
        self.pins = 0
        self.ticket = 0


class PrefixIndex(Generic[Key]):
    """Present keys, the key before each, pins and the use of each: a time or a worth, the least goes first. O(log n)
    amortised for every call.

    A *leaf* has no present child; children count by their parent's key even while that parent is absent.
    A *candidate* is an unpinned leaf. Equal uses are ordered by the order of the calls.

    PREFIX-1  Each candidate has exactly one live heap item, in the heap of its group, whose use is not above its own.
    PREFIX-2  `children[k]` is the number of present keys whose parent is k, and is never 0.
    PREFIX-3  All heaps together hold at most 2 n + 64 items, and are counted right.
    Verification: tests/core/test_eviction.py.
    """

    def __init__(self) -> None:
        self._entries: dict[Key, _Entry[Key]] = {}
        self._children: dict[Key, int] = {}
        self._heaps: dict[Hashable, list[tuple[tuple[float, int], int, Key]]] = {}
        self._serial = 0
        self._ticket = 0
        self._pinned = 0
        self._queued = 0  # items of all heaps

    def __contains__(self, key: Key) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Key]:
        return iter(self._entries)

    @property
    def unpinned(self) -> int:
        """How many present keys have no pin. All of them can be evicted where ancestors of pinned keys are pinned."""
        return len(self._entries) - self._pinned

    def pins(self, key: Key) -> int:
        """Number of pins of this key. Raises KeyError for a key that is not present."""
        return self._entries[key].pins

    def last_use(self, key: Key) -> float:
        """The use that orders this key, a time or a worth. Raises KeyError for a key that is not present."""
        return self._entries[key].use[0]

    def add(self, key: Key, parent: Key, now: float, group: Hashable = None, pins: int = 0) -> None:
        """Put a key in, with the use `now` and so many pins. Raises ValueError when it is present or its own parent."""
        if key in self._entries:
            raise ValueError(f"key {key!r} is in the index already")
        if key == parent:
            raise ValueError(f"key {key!r} is given as its own parent")
        self._serial += 1
        entry = _Entry(parent, group, (now, self._serial))
        self._entries[key] = entry
        self._children[parent] = self._children.get(parent, 0) + 1
        if pins:
            entry.pins = pins
            self._pinned += 1
        else:
            self._offer(key, entry)

    def touch(self, key: Key, now: float) -> None:
        """Note a use of a present key; one below its last use counts as that last use."""
        entry = self._entries[key]
        self._serial += 1
        entry.use = (max(now, entry.use[0]), self._serial)

    def pin(self, key: Key) -> None:
        """Protect a present key from eviction until as many `unpin` calls. Pins nest."""
        entry = self._entries[key]
        entry.pins += 1
        if entry.pins == 1:
            self._pinned += 1

    def unpin(self, key: Key) -> int:
        """Undo one `pin`; how many are left. Raises ValueError when there is none."""
        entry = self._entries[key]
        if entry.pins == 0:
            raise ValueError(f"key {key!r} has no pin")
        entry.pins -= 1
        if entry.pins == 0:
            self._pinned -= 1
            self._offer(key, entry)
        return entry.pins

    def remove(self, key: Key) -> None:
        """Take a key out, whether a leaf or not. Raises KeyError when absent, ValueError when pinned."""
        entry = self._entries[key]
        if entry.pins:
            raise ValueError(f"key {key!r} has {entry.pins} pins and cannot be removed")
        self._drop(key, entry)

    def evict_one(self, group: Hashable = None) -> Key | None:
        """Take out the candidate of `group` with the least use (None: of all groups); None when there is none."""
        heap = self._settled(group) if group is not None else self._least_heap()
        if not heap:
            return None
        key = heap[0][2]
        self._drop(key, self._entries[key])
        return key

    def check_integrity(self) -> None:
        """Assert PREFIX-1..PREFIX-3 and the counters; O(n), for tests and idle moments."""
        live: dict[Key, tuple[float, int]] = {}
        assert self._queued <= 2 * len(self._entries) + 64, "PREFIX-3: the heaps outgrew the index"
        assert self._queued == sum(map(len, self._heaps.values())), "PREFIX-3: heap items are miscounted"
        for group, heap in self._heaps.items():
            for use, ticket, key in heap:
                entry = self._entries.get(key)
                if entry is not None and entry.ticket == ticket:
                    assert key not in live, f"PREFIX-1: {key!r} has two live heap items"
                    assert entry.group == group, f"PREFIX-1: {key!r} is queued in another group"
                    live[key] = use
        children: dict[Key, int] = {}
        for key, entry in self._entries.items():
            children[entry.parent] = children.get(entry.parent, 0) + 1
            assert entry.pins >= 0
            if entry.pins == 0 and key not in self._children:
                assert key in live, f"PREFIX-1: candidate {key!r} is in no heap"
                assert live[key] <= entry.use, f"PREFIX-1: {key!r} is queued after its last use"
        assert children == self._children, "PREFIX-2: children are miscounted"
        assert self._pinned == sum(entry.pins > 0 for entry in self._entries.values())

    def _offer(self, key: Key, entry: _Entry[Key]) -> None:
        """Queue an entry for eviction if it is a candidate and not queued yet."""
        if entry.pins or entry.ticket or key in self._children:
            return
        self._ticket += 1
        entry.ticket = self._ticket
        heap = self._heaps.setdefault(entry.group, [])
        heapq.heappush(heap, (entry.use, entry.ticket, key))
        self._queued += 1
        self._bound_heaps()

    def _drop(self, key: Key, entry: _Entry[Key]) -> None:
        del self._entries[key]
        left = self._children[entry.parent] - 1
        if left:
            self._children[entry.parent] = left
        else:
            del self._children[entry.parent]
            parent = self._entries.get(entry.parent)
            if parent is not None:
                self._offer(entry.parent, parent)
        self._bound_heaps()

    def _settled(self, group: Hashable) -> list[tuple[tuple[float, int], int, Key]] | None:
        """The heap of a group with a candidate on top; one without any is forgotten."""
        heap = self._heaps.get(group)
        if heap is None or self._settle(heap):
            return heap
        del self._heaps[group]
        return None

    def _settle(self, heap: list[tuple[tuple[float, int], int, Key]]) -> bool:
        """Bring the group's candidate of least use to the top of its heap; False when there is none."""
        while heap:
            use, ticket, key = heap[0]
            entry = self._entries.get(key)
            if entry is None or entry.ticket != ticket:
                heapq.heappop(heap)
                self._queued -= 1
            elif entry.pins or key in self._children:
                entry.ticket = 0
                heapq.heappop(heap)
                self._queued -= 1
            elif entry.use != use:
                heapq.heapreplace(heap, (entry.use, ticket, key))
            else:
                return True
        return False

    def _least_heap(self) -> list[tuple[tuple[float, int], int, Key]] | None:
        if len(self._heaps) == 1:
            (heap,) = self._heaps.values()
            return heap if self._settle(heap) else None
        settled = [heap for heap in self._heaps.values() if self._settle(heap)]
        return min(settled, key=lambda heap: heap[0][0], default=None)

    def _bound_heaps(self) -> None:
        """For PREFIX-3: drop heap items whose key is gone or was queued anew. Amortised over calls."""
        if self._queued <= 2 * len(self._entries) + 64:
            return
        for group, heap in list(self._heaps.items()):
            heap[:] = [item for item in heap if (e := self._entries.get(item[2])) is not None and e.ticket == item[1]]
            heapq.heapify(heap)
            if not heap:
                del self._heaps[group]
        self._queued = sum(map(len, self._heaps.values()))
