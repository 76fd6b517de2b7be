"""L1: pages of device memory, the cached blocks in them, and eviction (leaf before root)."""

from __future__ import annotations

import heapq

from penstock.core.engine.blocks_in_use import BlocksInUse
from penstock.core.eviction import PrefixIndex
from penstock.core.keys import BlockKey


class DevicePages:
    """Pages are free, private (one request's, not yet a full block), or cached under a key. A cached page stays after
    its requests end, until its space is needed. A pinned one (in use, or being saved) is never evicted. `in_use`: the
    pinned blocks, and those of loads with a page."""

    def __init__(self, pages: int) -> None:
        self.total = pages
        self._free = list(range(pages - 1, -1, -1))
        self._page_of: dict[BlockKey, int] = {}
        self._key_of: dict[int, BlockKey] = {}
        self._index: PrefixIndex[BlockKey] = PrefixIndex()
        self.in_use = BlocksInUse()
        self._inserted: dict[BlockKey, int] = {}  # cached blocks, in the order in which they came
        self._insertions = 0
        self._unpinned: list[tuple[int, BlockKey]] = []  # heap of blocks without pins; may have stale items
        self.evictions = 0

    @property
    def available(self) -> int:
        """Pages that `take` can give: free, or cached and not pinned."""
        return len(self._free) + self._index.unpinned

    @property
    def cached(self) -> int:
        """Pages that hold a block under its key."""
        return len(self._page_of)

    def __contains__(self, key: BlockKey) -> bool:
        return key in self._page_of

    def is_cached(self, page: int) -> bool:
        """Whether this page holds a block under its key."""
        return page in self._key_of

    def take(self) -> int | None:
        """A private page; evicts a cached block when none is free. None when every page is in use."""
        if self._free:
            return self._free.pop()
        key = self._index.evict_one() or self._unpinned_root()
        if key is None:
            return None
        self.evictions += 1
        return self._forget(key)

    def _unpinned_root(self) -> BlockKey | None:
        """Take out the oldest unpinned block with pinned descendants: the save of a descendant may last longer than the
        request that pinned both. O(log n) amortised."""
        while self._unpinned:
            number, key = heapq.heappop(self._unpinned)
            if self._inserted.get(key) == number and not self._index.pins(key):
                self._index.remove(key)
                return key
        return None

    def _forget(self, key: BlockKey) -> int:
        """The block is not cached any more; its page."""
        page = self._page_of.pop(key)
        del self._key_of[page], self._inserted[key]
        return page

    def _note_unpinned(self, key: BlockKey) -> None:
        """The block may be given up from now on."""
        heapq.heappush(self._unpinned, (self._inserted[key], key))
        if len(self._unpinned) > 2 * self.total + 64:
            self._unpinned = [(number, key) for key, number in self._inserted.items() if not self._index.pins(key)]

    def give_back(self, page: int) -> None:
        """Free a private page."""
        assert page not in self._key_of
        self._free.append(page)

    def insert(self, key: BlockKey, parent: BlockKey, page: int, pins: int) -> None:
        """A private page becomes the cached block `key`, pinned `pins` times."""
        assert key not in self._page_of and page not in self._key_of
        self._page_of[key] = page
        self._key_of[page] = key
        self._insertions += 1
        self._inserted[key] = self._insertions
        self._index.add(key, parent, 0.0, pins=pins)  # order of use, not time, decides
        if pins:
            self.in_use.add(key)
        else:
            self._note_unpinned(key)

    def pin(self, key: BlockKey) -> int:
        """Use a cached block; returns its page."""
        self._index.touch(key, 0.0)
        self._index.pin(key)
        self.in_use.add(key)
        return self._page_of[key]

    def page_of(self, key: BlockKey) -> int:
        """The page that holds this block. Raises KeyError when none does."""
        return self._page_of[key]

    def unpin(self, page: int) -> None:
        """End one use of a cached block."""
        key = self._key_of[page]
        if not self._index.unpin(key):
            self.in_use.discard(key)
            self._note_unpinned(key)

    def discard(self, key: BlockKey) -> None:
        """Drop a cached block and free its page; nothing happens while it is in use."""
        if key in self._page_of and not self._index.pins(key):
            self._index.remove(key)
            self._free.append(self._forget(key))

    def check_integrity(self, private: set[int], reserved: set[BlockKey]) -> None:
        """Every page is exactly one of free, private (`private`: those held by requests and loads), cached. `reserved`:
        blocks on their way that have pages."""
        free = set(self._free)
        cached = set(self._key_of)
        assert len(free) == len(self._free), "a page is free twice"
        assert not free & private and not free & cached and not private & cached, "a page has two owners"
        assert len(free) + len(private) + len(cached) == self.total, "a page leaked"
        unpinned = {key for key in self._index if not self._index.pins(key)}
        assert unpinned <= {key for number, key in self._unpinned if self._inserted.get(key) == number}
        assert len(self._unpinned) <= 2 * self.total + 64
        assert list(self._inserted) == list(self._index), "the order of insertion is wrong"
        assert {page: key for key, page in self._page_of.items()} == self._key_of
        self._index.check_integrity()
        self.in_use.check_integrity({key for key in self._index if self._index.pins(key)} | reserved)
