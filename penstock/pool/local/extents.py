"""Free space of a member: extents of any aligned length, best fit, lowest address first, neighbours merged."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from penstock.core.layout import STAGING_ALIGNMENT_BYTES


class ExtentAllocator:
    """Allocates from `[start, end)` of a member. Each call is O(log holes), plus one step per length that occurs. Not
    thread-safe; the caller holds a lock.

    EXTENT-1  Statement: Free extents do not overlap, do not touch, lie inside the range and are aligned.
    EXTENT-2  Statement: `_lengths`, `_starts` and `_by_length` name the same extents. Stale entries of `_by_length` are
              at most as many as valid ones, plus 16.
    Verification: `check_integrity`, tests/pool/local/test_extents_and_table.py.
    """

    def __init__(self, start: int, end: int) -> None:
        if start < 0 or end <= start or start % STAGING_ALIGNMENT_BYTES or end % STAGING_ALIGNMENT_BYTES:
            raise ValueError(f"range [{start}, {end}) must be aligned to {STAGING_ALIGNMENT_BYTES} and not empty")
        self.start, self.end = start, end
        self.free_bytes = 0
        self._lengths: dict[int, int] = {}  # by start
        self._starts: dict[int, int] = {}  # by end
        self._by_length: dict[int, list[int]] = {}  # heap of starts; some are stale
        self._live: dict[int, int] = {}  # valid entries of each length
        self._sizes: list[int] = []  # lengths that occur, ascending
        self._insert(start, end - start)

    @property
    def holes(self) -> int:
        """Number of free extents."""
        return len(self._lengths)

    @property
    def largest_bytes(self) -> int:
        """Length of the largest free extent."""
        return self._sizes[-1] if self._sizes else 0

    def hole_at(self, offset: int) -> int:
        """Length of the free extent that begins here; 0 when none does."""
        return self._lengths.get(offset, 0)

    def hole_before(self, offset: int) -> int:
        """Length of the free extent that ends here; 0 when none does."""
        start = self._starts.get(offset)
        return 0 if start is None else offset - start

    def take(self, length: int) -> int | None:
        """Offset of a new extent of `length` bytes, from the smallest hole that fits; None when none fits."""
        self._check(length)
        at = bisect_left(self._sizes, length)
        if at == len(self._sizes):
            return None
        have = self._sizes[at]
        starts = self._by_length[have]
        while self._lengths.get(starts[0]) != have:
            heapq.heappop(starts)
        offset = starts[0]
        self._remove(offset)
        if have > length:
            self._insert(offset + length, have - length)
        return offset

    def take_many(self, length: int, count: int) -> list[int]:
        """Offsets of at most `count` new extents of `length` bytes, as `take` of each in turn; as many as fit."""
        offsets: list[int] = []
        while len(offsets) < count and self.largest_bytes >= length:
            hole = self._sizes[bisect_left(self._sizes, length)]
            some = min(count - len(offsets), hole // length)
            offset = self.take(some * length)
            assert offset is not None, "EXTENT-2: a hole is missing"
            offsets += range(offset, offset + some * length, length)
        return offsets

    def take_listed(self, extents: Sequence[tuple[int, int]] | NDArray[np.int64]) -> list[bool]:
        """Allocate exactly these extents (offset, length), to rebuild an unused range from a table; False for one that
        is malformed, outside, or overlaps one that begins before it."""
        assert self.free_bytes == self.end - self.start, "the range is in use already"
        self._remove(self.start)
        offsets, lengths = (np.ascontiguousarray(one) for one in np.asarray(extents, np.int64).reshape(-1, 2).T)
        fit = (lengths > 0) & (offsets >= self.start) & (lengths <= self.end - offsets)
        fit &= ((offsets | lengths) % STAGING_ALIGNMENT_BYTES) == 0
        fitting = np.flatnonzero(fit)
        order = fitting[np.argsort(offsets[fitting])]
        if (offsets[order][1:] == offsets[order][:-1]).any():
            order = fitting[np.lexsort((lengths[fitting], offsets[fitting]))]
        ends = offsets[order] + lengths[order]
        if (offsets[order][1:] < ends[:-1]).any():
            at = self.start
            for i in order.tolist():
                fit[i] = offsets[i] >= at
                at = int(offsets[i] + lengths[i]) if fit[i] else at
            order = order[fit[order]]
        begins = np.append(offsets[order], self.end)
        holes = np.append(self.start, offsets[order] + lengths[order])
        for i in np.flatnonzero(begins > holes).tolist():
            self._insert(int(holes[i]), int(begins[i] - holes[i]))
        taken: list[bool] = fit.tolist()
        return taken

    def give(self, offset: int, length: int) -> int:
        """Free an extent; returns where the hole that it is now part of begins. Raises ValueError when it begins or
        ends in free space, or lies outside."""
        self._check(length)
        end = offset + length
        twice = offset in self._lengths or end in self._starts
        if twice or offset < self.start or end > self.end or offset % STAGING_ALIGNMENT_BYTES:
            raise ValueError(f"extent [{offset}, {end}) is free already or outside")
        after = self._lengths.get(end)
        if after is not None:
            self._remove(end)
            end += after
        before = self._starts.get(offset)
        if before is not None:
            self._remove(before)
            offset = before
        self._insert(offset, end - offset)
        return offset

    def check_integrity(self) -> None:
        """Assert EXTENT-1 and EXTENT-2; O(n)."""
        end = self.start - 1
        for offset in sorted(self._lengths):
            length = self._lengths[offset]
            assert offset > end and length > 0, "EXTENT-1: free extents overlap or touch"
            assert offset % STAGING_ALIGNMENT_BYTES == 0 and length % STAGING_ALIGNMENT_BYTES == 0, (
                "EXTENT-1: alignment"
            )
            end = offset + length
            assert self._starts.get(end) == offset, "EXTENT-2: an end is missing"
            assert offset in self._by_length[length], "EXTENT-2: a length is missing"
        assert end <= self.end, "EXTENT-1: a free extent lies outside"
        assert len(self._starts) == len(self._lengths), "EXTENT-2: an end names no extent"
        assert self.free_bytes == sum(self._lengths.values())
        lengths = list(self._lengths.values())
        assert self._live == {length: lengths.count(length) for length in set(lengths)}, "EXTENT-2: lengths differ"
        assert self._sizes == sorted(self._live) and self._by_length.keys() == self._live.keys()
        assert all(len(starts) <= 2 * self._live[length] + 16 for length, starts in self._by_length.items())

    def _check(self, length: int) -> None:
        if length <= 0 or length % STAGING_ALIGNMENT_BYTES:
            raise ValueError(f"extent of {length} bytes; it must be a positive multiple of {STAGING_ALIGNMENT_BYTES}")

    def _insert(self, offset: int, length: int) -> None:
        self.free_bytes += length
        self._lengths[offset] = length
        self._starts[offset + length] = offset
        starts = self._by_length.get(length)
        if starts is None:
            self._by_length[length] = [offset]
            self._live[length] = 1
            insort(self._sizes, length)
            return
        heapq.heappush(starts, offset)
        self._live[length] += 1
        if len(starts) > 2 * self._live[length] + 16:
            self._tidy(length)

    def _remove(self, offset: int) -> None:
        length = self._lengths.pop(offset)
        del self._starts[offset + length]
        self.free_bytes -= length
        self._live[length] -= 1
        if not self._live[length]:
            del self._live[length], self._by_length[length]
            del self._sizes[bisect_left(self._sizes, length)]
        elif len(self._by_length[length]) > 2 * self._live[length] + 16:
            self._tidy(length)

    def _tidy(self, length: int) -> None:
        """Remove stale entries of one length; amortised over the calls that left them."""
        self._by_length[length] = sorted(
            {start for start in self._by_length[length] if self._lengths.get(start) == length}
        )
