"""Free space of a member: extents of any aligned length, best fit, neighbours merged."""

from __future__ import annotations

from bisect import bisect_left, insort

from penstock.core.layout import STAGING_ALIGNMENT_BYTES


class ExtentAllocator:
    """Owns `[start, end)` of a member. Not thread-safe; the caller holds a lock.

    I1  free extents do not overlap, do not touch, lie inside the range and are aligned
    I2  both orders (by offset, by length) hold the same extents
    """

    def __init__(self, start: int, end: int) -> None:
        if start < 0 or end <= start or start % STAGING_ALIGNMENT_BYTES or end % STAGING_ALIGNMENT_BYTES:
            raise ValueError(f"range [{start}, {end}) must be aligned to {STAGING_ALIGNMENT_BYTES} and not empty")
        self.start, self.end = start, end
        self.free_bytes = end - start
        self._offsets = [start]
        self._lengths = {start: end - start}
        self._by_length = [(end - start, start)]

    @property
    def largest_bytes(self) -> int:
        """Length of the largest free extent."""
        return self._by_length[-1][0] if self._by_length else 0

    def take(self, length: int) -> int | None:
        """Offset of a new extent of `length` bytes, from the smallest hole that fits; None when none fits."""
        self._check(length)
        at = bisect_left(self._by_length, (length, -1))
        if at == len(self._by_length):
            return None
        have, offset = self._by_length[at]
        self._remove(offset, have)
        if have > length:
            self._insert(offset + length, have - length)
        self.free_bytes -= length
        return offset

    def take_at(self, offset: int, length: int) -> bool:
        """Take exactly this extent (rebuilding from a table); False when any of it is taken or outside."""
        if length <= 0 or length % STAGING_ALIGNMENT_BYTES or offset % STAGING_ALIGNMENT_BYTES:
            return False
        at = bisect_left(self._offsets, offset + 1) - 1
        if at < 0:
            return False
        hole = self._offsets[at]
        have = self._lengths[hole]
        if offset + length > hole + have:
            return False
        self._remove(hole, have)
        if offset > hole:
            self._insert(hole, offset - hole)
        if hole + have > offset + length:
            self._insert(offset + length, hole + have - offset - length)
        self.free_bytes -= length
        return True

    def give(self, offset: int, length: int) -> None:
        """Return an extent. Raises ValueError when any of it is free already or outside."""
        self._check(length)
        at = bisect_left(self._offsets, offset)
        left = self._offsets[at - 1] if at else None
        right = self._offsets[at] if at < len(self._offsets) else None
        before = left is not None and left + self._lengths[left] > offset
        after = right is not None and offset + length > right
        if before or after or offset < self.start or offset + length > self.end or offset % STAGING_ALIGNMENT_BYTES:
            raise ValueError(f"extent [{offset}, {offset + length}) is free already or outside")
        self.free_bytes += length
        if right is not None and right == offset + length:
            length += self._lengths[right]
            self._remove(right, self._lengths[right])
        if left is not None and left + self._lengths[left] == offset:
            have = self._lengths[left]
            self._remove(left, have)
            offset, length = left, have + length
        self._insert(offset, length)

    def check_integrity(self) -> None:
        """Assert I1 and I2."""
        assert self._offsets == sorted(self._lengths)
        assert self._by_length == sorted((length, offset) for offset, length in self._lengths.items())
        assert self.free_bytes == sum(self._lengths.values())
        end = self.start - 1
        for offset in self._offsets:
            length = self._lengths[offset]
            assert offset > end and length > 0
            assert offset % STAGING_ALIGNMENT_BYTES == 0 and length % STAGING_ALIGNMENT_BYTES == 0
            end = offset + length
        assert end <= self.end

    def _check(self, length: int) -> None:
        if length <= 0 or length % STAGING_ALIGNMENT_BYTES:
            raise ValueError(f"extent of {length} bytes; it must be a positive multiple of {STAGING_ALIGNMENT_BYTES}")

    def _insert(self, offset: int, length: int) -> None:
        insort(self._offsets, offset)
        self._lengths[offset] = length
        insort(self._by_length, (length, offset))

    def _remove(self, offset: int, length: int) -> None:
        del self._offsets[bisect_left(self._offsets, offset)]
        del self._lengths[offset]
        del self._by_length[bisect_left(self._by_length, (length, offset))]
