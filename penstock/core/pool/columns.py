"""Packed columns that grow, and chains of rows by hash: the memory of a table that has no object per row."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable

WORD = (1 << 64) - 1
ROWS_MIN = 1024
BUCKETS_MIN = 64  # a power of 2
MIX = 0x9E3779B97F4A7C15
FINISH = 0xD6E8FEB86659FD93


class Column:
    """An array of numbers of one type, 0 where nothing was written. Growing it moves pages, it copies nothing. `memory`
    has all bytes; whoever takes a view of them gives it up before `grow`."""

    __slots__ = ("_code", "_per_row", "items", "memory", "raw")

    def __init__(self, code: str, rows: int, per_row: int = 1) -> None:
        """`code` is that of `struct`; a row has `per_row` numbers."""
        self._code, self._per_row = code, per_row
        self.memory = mmap.mmap(-1, self._size(rows), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._view()

    @property
    def row_bytes(self) -> int:
        """Bytes per row."""
        return self._size(1)

    def grow(self, rows: int) -> None:
        """Make room for so many rows. `items` and `raw` are other views from now on. Raises OSError without memory:
        what was there stays."""
        self.items.release()
        self.raw.release()
        try:
            self.memory.resize(self._size(rows))
        finally:
            self._view()

    def _size(self, rows: int) -> int:
        return rows * self._per_row * struct.calcsize(self._code)

    def _view(self) -> None:
        self.raw = memoryview(self.memory)
        self.items: memoryview = self.raw.cast(self._code)  # type: ignore[call-overload]


class HashChains:
    """Rows by a hash: a chain for each bucket, linked in a column. As many buckets as rows, added one at a time (linear
    hashing), so that no call rehashes more than a chain; what is removed leaves nothing behind. Links are row + 1.

    CHAIN-1  Statement: Each row that was added is in the chain of its hash exactly once, and no other row is.
    Verification: `check_integrity`, tests/core/pool/test_columns.py.
    """

    __slots__ = ("_column", "_hash_of", "_heads", "buckets", "count", "heads", "mask", "next")

    def __init__(self, rows: int, hash_of: Callable[[int], int]) -> None:
        """`hash_of` is the hash of a row that was added: at least 32 bits, the lower ones count."""
        self._hash_of = hash_of
        self._heads = Column("i", ROWS_MIN)
        self._column = Column("i", rows)
        self.heads, self.next = self._heads.items, self._column.items
        self.buckets, self.mask, self.count = BUCKETS_MIN, BUCKETS_MIN - 1, 0

    @property
    def columns(self) -> tuple[Column, Column]:
        """The heads of the chains, and the links of the rows."""
        return self._heads, self._column

    def grow(self, rows: int) -> None:
        """Make room for so many rows."""
        try:
            self._column.grow(rows)
        finally:
            self.next = self._column.items

    def bucket(self, hashed: int) -> int:
        """The bucket of a hash."""
        at = hashed & self.mask
        return at if at < self.buckets else at & (self.mask >> 1)

    def add(self, row: int, hashed: int) -> None:
        """Add a row that is not in a chain."""
        at = hashed & self.mask
        if at >= self.buckets:
            at &= self.mask >> 1
        self.next[row] = self.heads[at]
        self.heads[at] = row + 1
        self.count += 1
        if self.count > self.buckets:
            self.split()

    def remove(self, row: int, hashed: int) -> None:
        """Remove a row that was added with this hash."""
        at = hashed & self.mask
        if at >= self.buckets:
            at &= self.mask >> 1
        links, link = self.next, row + 1
        follows = self.heads[at]
        if follows == link:
            self.heads[at] = links[row]
        else:
            while links[follows - 1] != link:
                follows = links[follows - 1]
            links[follows - 1] = links[row]
        self.count -= 1

    def split(self) -> None:
        """Add one bucket, which takes its rows from one other."""
        if self.buckets == len(self.heads):
            self._grow_heads(2 * self.buckets)
        if self.buckets == self.mask + 1:
            self.mask = 2 * self.mask + 1
        new, old = self.buckets, self.buckets - (self.mask + 1) // 2
        self.buckets += 1
        heads, links, mask = self.heads, self.next, self.mask
        link, heads[old] = heads[old], 0
        while link:
            row = link - 1
            link = links[row]
            to = new if self._hash_of(row) & mask == new else old
            links[row] = heads[to]
            heads[to] = row + 1

    def add_buckets(self, more: int) -> tuple[int, int]:
        """Add at most `more` buckets, for which `make_room` made room; returns the first of those whose rows they
        share, and how many they are. The caller moves the rows."""
        if self.buckets == self.mask + 1:
            self.mask = 2 * self.mask + 1
        old = self.buckets - (self.mask + 1) // 2
        some = min(more, self.mask + 1 - self.buckets)
        self.buckets += some
        return old, some

    def make_room(self, buckets: int) -> None:
        """Have memory for so many buckets. Raises OSError without it; nothing has changed then."""
        if buckets > len(self.heads):
            self._grow_heads(max(buckets, 2 * len(self.heads)))

    def make_buckets(self, count: int) -> None:
        """Have at least `count` buckets; for an empty table."""
        assert not self.count, "the table is in use"
        if count > self.buckets:
            self.buckets, self.mask = count, (1 << (count - 1).bit_length()) - 1
            if count > len(self.heads):
                self._grow_heads(count)

    def _grow_heads(self, count: int) -> None:
        try:
            self._heads.grow(count)
        finally:
            self.heads = self._heads.items

    def check_integrity(self, rows: set[int]) -> None:
        """Assert CHAIN-1 for these rows; O(n)."""
        found: list[int] = []
        for at in range(self.buckets):
            link = self.heads[at]
            while link:
                found.append(link - 1)
                assert self.bucket(self._hash_of(link - 1)) == at, "CHAIN-1: a row is in another chain"
                assert len(found) <= self.count, "CHAIN-1: a chain has a circle"
                link = self.next[link - 1]
        assert len(found) == self.count and set(found) == rows, "CHAIN-1: rows are missing"


def mixed(low: int, high: int, salt: int) -> int:
    """A hash of 32 bits of two words; `salt` is odd and secret, so that nobody makes long chains."""
    word = (low * salt + high * (salt ^ MIX | 1)) & WORD
    return ((word ^ word >> 29) * FINISH & WORD) >> 32
