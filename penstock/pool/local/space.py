"""The space of one member: where its blocks lie, and which neighbours could be evicted together for a larger one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from penstock.core.pool.block_rows import PRESENT, BlockRows
from penstock.core.pool.columns import MIX, WORD, HashChains
from penstock.pool.local.chain_batches import chain_many, unchain_many
from penstock.pool.local.extents import ExtentAllocator


class Places:
    """Rows of present blocks by where their extents begin and end; those of all members.

    SPACE-1  Statement: Each present block is found by its start and by its end.
    Verification: `check_integrity`, tests/pool/local/test_extents_and_table.py.
    """

    def __init__(self, rows: BlockRows) -> None:
        self.rows = rows
        self.starts = HashChains(rows.capacity, lambda row: place_hash(rows.member[row], rows.page[row]))
        self.ends = HashChains(rows.capacity, lambda row: place_hash(rows.member[row], self._end(row)))

    @property
    def row_bytes(self) -> int:
        """Bytes per row: links and buckets."""
        return sum(column.row_bytes for chains in (self.starts, self.ends) for column in chains.columns)

    def add(self, row: int) -> None:
        """Add a present block whose member and offset are set."""
        rows = self.rows
        if len(self.starts.next) < rows.capacity:
            self.grow()
        member = rows.member[row]
        self.starts.add(row, place_hash(member, rows.page[row]))
        self.ends.add(row, place_hash(member, self._end(row)))

    def add_many(self, rows: NDArray[np.int64]) -> None:
        """Add many present blocks."""
        if len(self.starts.next) < self.rows.capacity:
            self.grow()
        for at, (chains, hashes) in enumerate(self._hashes(rows)):
            chain_many(chains, rows, hashes, lambda moved, at=at: self._hashes(moved)[at][1])  # type: ignore[misc]

    def remove_many(self, rows: NDArray[np.int64], flags: NDArray[np.uint8]) -> None:
        """Remove many blocks that were added: those whose flags say LEAVING."""
        for chains, hashes in self._hashes(rows):
            unchain_many(chains, hashes, flags)

    def _hashes(self, rows: NDArray[np.int64]) -> list[tuple[HashChains, NDArray[np.uint64]]]:
        members, pages, sizes = (
            np.frombuffer(self.rows.columns[name].memory, kind)[rows].astype(np.uint64)
            for name, kind in (("member", np.uint16), ("page", np.uint64), ("size", np.uint32))
        )
        unit = np.uint64(self.rows.unit_bytes)
        ends = pages + (sizes + unit - np.uint64(1)) // unit
        return [
            (chains, ((at << np.uint64(12) ^ members) * np.uint64(MIX)) >> np.uint64(24))
            for chains, at in ((self.starts, pages), (self.ends, ends))
        ]

    def grow(self) -> None:
        """Make room for as many rows as the table has."""
        self.starts.grow(self.rows.capacity)
        self.ends.grow(self.rows.capacity)

    def remove(self, row: int) -> None:
        """Remove a block that was added."""
        member = self.rows.member[row]
        self.starts.remove(row, place_hash(member, self.rows.page[row]))
        self.ends.remove(row, place_hash(member, self._end(row)))

    def starting(self, member: int, offset: int) -> int:
        """The block that begins here; -1 when none does."""
        page, rows = offset // self.rows.unit_bytes, self.rows
        link = self.starts.heads[self.starts.bucket(place_hash(member, page))]
        while link:
            if rows.page[link - 1] == page and rows.member[link - 1] == member:
                return int(link - 1)
            link = self.starts.next[link - 1]
        return -1

    def ending(self, member: int, offset: int) -> int:
        """The block that ends here; -1 when none does."""
        page, rows = offset // self.rows.unit_bytes, self.rows
        link = self.ends.heads[self.ends.bucket(place_hash(member, page))]
        while link:
            if rows.member[link - 1] == member and self._end(link - 1) == page:
                return int(link - 1)
            link = self.ends.next[link - 1]
        return -1

    def check_integrity(self) -> None:
        """Assert SPACE-1; O(n)."""
        present = {row for row in range(self.rows.high) if self.rows.flags[row] & PRESENT}
        self.starts.check_integrity(present)
        self.ends.check_integrity(present)

    def _end(self, row: int) -> int:
        rows = self.rows
        return int(rows.page[row] - (-rows.size[row] // rows.unit_bytes))


class MemberSpace:
    """Extents of one member: the free ones, and its present blocks."""

    def __init__(self, start: int, end: int, number: int, places: Places) -> None:
        self.allocator = ExtentAllocator(start, end)
        self.blocks = 0  # present ones
        self._number = number
        self._places = places
        self._rows = places.rows

    @property
    def capacity_bytes(self) -> int:
        """Bytes of the member that blocks may occupy."""
        return self.allocator.end - self.allocator.start

    @property
    def used_bytes(self) -> int:
        """Bytes of extents that are not free, including those of blocks that are being written."""
        return self.capacity_bytes - self.allocator.free_bytes

    def cheapest_local(self, seeds: Sequence[int], length: int, movable: Callable[[int], bool]) -> list[int] | None:
        """Blocks around one of the holes that begin at `seeds` whose eviction would make a hole of `length` bytes: the
        set with the fewest bytes; None when there is no such set. Looks `length` bytes to either side of each seed."""
        best: list[int] | None = None
        best_bytes = 0
        for seed in seeds:
            found = self._around(seed, length, movable)
            if found is not None:
                found_bytes = sum(map(self._rows.extent_bytes, found))
                if best is None or found_bytes < best_bytes:
                    best, best_bytes = found, found_bytes
        return best

    def cheapest_anywhere(
        self, by_address: Iterable[int], length: int, movable: Callable[[int], bool]
    ) -> list[int] | None:
        """As `cheapest_local`, over the whole member, whose blocks are given in the order of their addresses; O(n), for
        the rare case that nothing near a leaf can be evicted."""
        best: list[int] | None = None
        best_bytes = 0
        run: list[int] = []
        run_bytes, begin, at = 0, self.allocator.start, self.allocator.start
        for row in by_address:
            offset, extent_bytes = self._offset(row), self._rows.extent_bytes(row)
            if at + self.allocator.hole_at(at) != offset or not movable(row):
                # The gap is being written, or waits for its last reader; or this block cannot be evicted.
                run, run_bytes = [], 0
                begin = offset - self.allocator.hole_before(offset)
            at = offset + extent_bytes
            if not movable(row):
                begin = at
                continue
            run.append(row)
            run_bytes += extent_bytes
            end = at + self.allocator.hole_at(at)
            while len(run) > 1 and end - self._end(run[0]) >= length:
                begin = self._end(run[0])
                run_bytes -= self._rows.extent_bytes(run[0])
                run = run[1:]
            if end - begin >= length and (best is None or run_bytes < best_bytes):
                best, best_bytes = list(run), run_bytes
        return best

    def _around(self, seed: int, length: int, movable: Callable[[int], bool]) -> list[int] | None:
        """The cheapest range around one hole: it begins as far to the left as allowed, then moves to the right, block
        by block."""
        hole = self.allocator.hole_at(seed)
        left: list[int] = []
        begin = seed
        while seed + hole - begin < length:
            row = self._places.ending(self._number, begin)
            if row < 0 or not movable(row):
                break
            left.append(row)
            begin = self._offset(row) - self.allocator.hole_before(self._offset(row))
        end = seed + hole
        right: list[int] = []
        best: list[int] | None = None
        best_bytes = 0
        while True:
            while end - begin < length:
                row = self._places.starting(self._number, end)
                if row < 0 or not movable(row):
                    return best
                right.append(row)
                end = self._end(row) + self.allocator.hole_at(self._end(row))
            run = [*left, *right]
            run_bytes = sum(map(self._rows.extent_bytes, run))
            if best is None or run_bytes < best_bytes:
                best, best_bytes = run, run_bytes
            if not left:
                return best
            begin = self._end(left.pop())

    def _offset(self, row: int) -> int:
        return int(self._rows.page[row]) * self._rows.unit_bytes

    def _end(self, row: int) -> int:
        return self._offset(row) + self._rows.extent_bytes(row)


def place_hash(member: int, page: int) -> int:
    """The hash of an address: 40 bits, of which the lower ones count."""
    return ((page << 12 ^ member) * MIX & WORD) >> 24
