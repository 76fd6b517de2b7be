"""L1: pages of device memory, which of them hold cached blocks, and their reuse (leaf before root)."""

from __future__ import annotations

from penstock.core.eviction import PrefixIndex
from penstock.core.keys import BlockKey


class DevicePages:
    """Pages are free, private (one request's, not yet a full block), or cached under a key. A cached page stays after
    its requests end, until its space is needed. A pinned one (in use, or being saved) is never evicted."""

    def __init__(self, pages: int) -> None:
        self.total = pages
        self._free = list(range(pages - 1, -1, -1))
        self._page_of: dict[BlockKey, int] = {}
        self._key_of: dict[int, BlockKey] = {}
        self._index: PrefixIndex[BlockKey] = PrefixIndex()
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

    def is_pinned(self, key: BlockKey) -> bool:
        """Whether somebody uses the block of this key, so that its page is not taken."""
        return self._index.pins(key) > 0

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
        page = self._page_of.pop(key)
        del self._key_of[page]
        return page

    def _unpinned_root(self) -> BlockKey | None:
        """Takes out an unpinned block with pinned descendants (the save of a descendant may outlast the request that
        pinned them both)."""
        if not self._index.unpinned:
            return None
        key = next(key for key in self._index if not self._index.pins(key))
        self._index.remove(key)
        return key

    def give_back(self, page: int) -> None:
        """Free a private page."""
        assert page not in self._key_of
        self._free.append(page)

    def insert(self, key: BlockKey, parent: BlockKey, page: int, pins: int) -> None:
        """A private page becomes the cached block `key`, pinned `pins` times."""
        assert key not in self._page_of and page not in self._key_of
        self._page_of[key] = page
        self._key_of[page] = key
        self._index.add(key, parent, 0.0)  # order of use, not time, decides
        for _ in range(pins):
            self._index.pin(key)

    def pin(self, key: BlockKey) -> int:
        """Use a cached block; returns its page."""
        self._index.touch(key, 0.0)
        self._index.pin(key)
        return self._page_of[key]

    def page_of(self, key: BlockKey) -> int:
        """The page that holds this block. Raises KeyError when none does."""
        return self._page_of[key]

    def unpin(self, page: int) -> None:
        """End one use of a cached block."""
        self._index.unpin(self._key_of[page])

    def discard(self, key: BlockKey) -> None:
        """Drop a cached block and free its page; nothing happens while somebody uses it."""
        if key in self._page_of and not self._index.pins(key):
            self._index.remove(key)
            page = self._page_of.pop(key)
            del self._key_of[page]
            self._free.append(page)

    def check_integrity(self, private: set[int]) -> None:
        """Every page is exactly one of free, private (`private`: those held by requests and loads), cached."""
        free = set(self._free)
        cached = set(self._key_of)
        assert len(free) == len(self._free), "a page is free twice"
        assert not free & private and not free & cached and not private & cached, "a page has two owners"
        assert len(free) + len(private) + len(cached) == self.total, "a page leaked"
        assert {page: key for key, page in self._page_of.items()} == self._key_of
        self._index.check_integrity()
