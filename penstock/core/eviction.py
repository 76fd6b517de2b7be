"""Which block goes next: least recently used, leaf before root, never a pinned one.

One index serves both the pool (groups are members) and L1 of the engine (one group). It has no clock: callers pass
the time, or any counter that does not run backwards.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


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
    """Present keys, the key before each, pins and last uses; O(log n) amortised for every call.

    A *leaf* has no present child; children count by their parent's key even while that parent is absent.
    A *candidate* is an unpinned leaf. Equal times are ordered by the order of the calls.

    I1  each candidate has exactly one live heap item, whose use is not after its own last use
    I2  children[k] is the number of present keys whose parent is k, and is never 0
    I3  all heaps together hold at most 2 n + 64 items
    """

    def __init__(self) -> None:
        self._entries: dict[Key, _Entry[Key]] = {}
        self._children: dict[Key, int] = {}
        self._heaps: dict[Hashable, list[tuple[tuple[float, int], int, Key]]] = {}
        self._serial = 0
        self._ticket = 0
        self._pinned = 0

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

    def parent(self, key: Key) -> Key:
        return self._entries[key].parent

    def pins(self, key: Key) -> int:
        return self._entries[key].pins

    def last_use(self, key: Key) -> float:
        return self._entries[key].use[0]

    def is_leaf(self, key: Key) -> bool:
        """Whether no present key has `key` as its parent."""
        return key not in self._children

    def add(self, key: Key, parent: Key, now: float, group: Hashable = None) -> None:
        """Put a key in, unpinned, used `now`. Raises ValueError when it is present or its own parent."""
        if key in self._entries:
            raise ValueError(f"key {key!r} is in the index already")
        if key == parent:
            raise ValueError(f"key {key!r} is given as its own parent")
        self._serial += 1
        entry = _Entry(parent, group, (now, self._serial))
        self._entries[key] = entry
        self._children[parent] = self._children.get(parent, 0) + 1
        self._offer(key, entry)

    def touch(self, key: Key, now: float) -> None:
        """Note a use of a present key; a time before its last use counts as that last use."""
        entry = self._entries[key]
        self._serial += 1
        entry.use = (max(now, entry.use[0]), self._serial)

    def pin(self, key: Key) -> None:
        """Keep a present key from eviction until as many `unpin` calls. Pins nest."""
        entry = self._entries[key]
        entry.pins += 1
        if entry.pins == 1:
            self._pinned += 1

    def unpin(self, key: Key) -> None:
        """Undo one `pin`. Raises ValueError when there is none."""
        entry = self._entries[key]
        if entry.pins == 0:
            raise ValueError(f"key {key!r} has no pin")
        entry.pins -= 1
        if entry.pins == 0:
            self._pinned -= 1
            self._offer(key, entry)

    def remove(self, key: Key) -> None:
        """Take a key out, whether a leaf or not. Raises KeyError when absent, ValueError when pinned."""
        entry = self._entries[key]
        if entry.pins:
            raise ValueError(f"key {key!r} has {entry.pins} pins and cannot be removed")
        self._drop(key, entry)

    def evict_one(self, group: Hashable = None) -> Key | None:
        """Take out the least recently used candidate of `group` (None: of all groups); None when there is none."""
        heap = self._heaps.get(group) if group is not None else self._oldest_heap()
        if not heap or not self._settle(heap):
            return None
        key = heap[0][2]
        self._drop(key, self._entries[key])
        return key

    def check_integrity(self) -> None:
        """Assert I1..I3 and the counters; O(n), for tests and idle moments."""
        live: dict[Key, tuple[float, int]] = {}
        assert sum(map(len, self._heaps.values())) <= 2 * len(self._entries) + 64, "I3: the heaps outgrew the index"
        for heap in self._heaps.values():
            for use, ticket, key in heap:
                entry = self._entries.get(key)
                if entry is not None and entry.ticket == ticket:
                    assert key not in live, f"I1: {key!r} has two live heap items"
                    live[key] = use
        children: dict[Key, int] = {}
        for key, entry in self._entries.items():
            children[entry.parent] = children.get(entry.parent, 0) + 1
            assert entry.pins >= 0
            if entry.pins == 0 and key not in self._children:
                assert key in live, f"I1: candidate {key!r} is in no heap"
                assert live[key] <= entry.use, f"I1: {key!r} is queued after its last use"
        assert children == self._children, "I2: children are miscounted"
        assert self._pinned == sum(entry.pins > 0 for entry in self._entries.values())

    def _offer(self, key: Key, entry: _Entry[Key]) -> None:
        """Queue an entry for eviction if it is a candidate and not queued yet."""
        if entry.pins or entry.ticket or key in self._children:
            return
        self._ticket += 1
        entry.ticket = self._ticket
        heap = self._heaps.setdefault(entry.group, [])
        heapq.heappush(heap, (entry.use, entry.ticket, key))
        self._bound_heaps()

    def _drop(self, key: Key, entry: _Entry[Key]) -> None:
        del self._entries[key]
        left = self._children[entry.parent] - 1
        if left:
            self._children[entry.parent] = left
            self._bound_heaps()
            return
        del self._children[entry.parent]
        parent = self._entries.get(entry.parent)
        if parent is not None:
            self._offer(entry.parent, parent)
        self._bound_heaps()

    def _settle(self, heap: list[tuple[tuple[float, int], int, Key]]) -> bool:
        """Bring the group's least recently used candidate to the top of its heap; False when there is none."""
        while heap:
            use, ticket, key = heap[0]
            entry = self._entries.get(key)
            if entry is None or entry.ticket != ticket:
                heapq.heappop(heap)
            elif entry.pins or key in self._children:
                entry.ticket = 0
                heapq.heappop(heap)
            elif entry.use != use:
                heapq.heapreplace(heap, (entry.use, ticket, key))
            else:
                return True
        return False

    def _oldest_heap(self) -> list[tuple[tuple[float, int], int, Key]] | None:
        settled = [heap for heap in self._heaps.values() if self._settle(heap)]
        return min(settled, key=lambda heap: heap[0][0], default=None)

    def _bound_heaps(self) -> None:
        """Keep I3: forget heap items whose key is gone or was queued anew. Amortised over the calls that left them."""
        if sum(map(len, self._heaps.values())) <= 2 * len(self._entries) + 64:
            return
        for heap in self._heaps.values():
            heap[:] = [item for item in heap if (e := self._entries.get(item[2])) is not None and e.ticket == item[1]]
            heapq.heapify(heap)
