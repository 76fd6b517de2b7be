"""Pages of generating requests, as arrays that grow by a page: a step reads only a request's new pages."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from penstock.engine.runner import Chunk

TABLES_MAX = 1024  # requests; above, those that have not generated for longest are removed


class _Table:
    """The first `count` pages of one request; `end` is the end of the last chunk."""

    __slots__ = ("array", "count", "end", "pages")

    def __init__(self, pages: Sequence[int]) -> None:
        self.pages = pages
        self.array = np.empty(0, np.int64)
        self.count = 0
        self.end = -1

    def grow(self, needed: int) -> np.ndarray:
        """Add pages up to `needed`; returns the new ones."""
        first, self.count = self.count, needed
        if needed > len(self.array):
            grown = np.empty(needed + needed // 8 + 8, np.int64)
            grown[:first] = self.array[:first]
            self.array = grown
        self.array[first:needed] = self.pages[first:needed]
        return self.array[first:needed]


class PageTables:
    """Tables by request. An array is reused while chunks of one token follow each other with the same list object (see
    `Chunk`); for any other chunk the list is read again. One thread at a time may call."""

    def __init__(self) -> None:
        self._tables: OrderedDict[str, _Table] = OrderedDict()

    def of(self, chunk: Chunk, needed: int, pages: int) -> np.ndarray:
        """The first `needed` pages of a chunk of one token. Raises ValueError for one outside `0 .. pages - 1`."""
        table = self._tables.get(chunk.request_id)
        if table is None or table.pages is not chunk.pages or table.end != chunk.start or table.count > needed:
            table = self._tables[chunk.request_id] = _Table(chunk.pages)
        fresh = table.grow(needed)
        if len(fresh) and (fresh.min() < 0 or fresh.max() >= pages):
            del self._tables[chunk.request_id]
            raise ValueError(f"request {chunk.request_id}: pages must be 0 to {pages - 1}")
        table.end = chunk.start + 1
        self._tables.move_to_end(chunk.request_id)
        while len(self._tables) > TABLES_MAX:
            self._tables.popitem(last=False)
        return table.array[:needed]
