"""The space of one member: where its blocks lie, and which neighbours could be evicted together for a larger one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from penstock.pool.block import Block
from penstock.pool.local.extents import ExtentAllocator


class MemberSpace:
    """Extents of one member: the free ones, and its present blocks in address order.

    SPACE-1  Statement: Each present block of the member is found by its start and by its end.
    Verification: `check_integrity`, tests/pool/local/test_extents_and_table.py.
    """

    def __init__(self, start: int, end: int) -> None:
        self.allocator = ExtentAllocator(start, end)
        self.blocks: dict[int, Block] = {}  # by start
        self._ending: dict[int, Block] = {}  # by end

    @property
    def capacity_bytes(self) -> int:
        """Bytes of the member that blocks may occupy."""
        return self.allocator.end - self.allocator.start

    @property
    def used_bytes(self) -> int:
        """Bytes of extents that are not free, including those of blocks that are being written."""
        return self.capacity_bytes - self.allocator.free_bytes

    def add(self, block: Block) -> None:
        """Add a present block; its extent was allocated before."""
        self.blocks[block.offset] = block
        self._ending[block.offset + block.extent_bytes] = block

    def remove(self, block: Block) -> None:
        """Remove a block; the caller frees its extent, now or later."""
        del self.blocks[block.offset], self._ending[block.offset + block.extent_bytes]

    def cheapest_local(self, seeds: Sequence[int], length: int, movable: Callable[[Block], bool]) -> list[Block] | None:
        """Blocks around one of the holes that begin at `seeds` whose eviction would make a hole of `length` bytes: the
        set with the fewest bytes; None when there is no such set. Looks `length` bytes to either side of each seed."""
        best: list[Block] | None = None
        best_bytes = 0
        for seed in seeds:
            found = self._around(seed, length, movable)
            if found is not None:
                found_bytes = sum(block.extent_bytes for block in found)
                if best is None or found_bytes < best_bytes:
                    best, best_bytes = found, found_bytes
        return best

    def cheapest_anywhere(self, length: int, movable: Callable[[Block], bool]) -> list[Block] | None:
        """As `cheapest_local`, over the whole member; O(n log n), for the rare case that nothing near a leaf can be
        evicted."""
        best: list[Block] | None = None
        best_bytes = 0
        run: list[Block] = []
        run_bytes, begin, at = 0, self.allocator.start, self.allocator.start
        for offset in sorted(self.blocks):
            block = self.blocks[offset]
            if at + self.allocator.hole_at(at) != offset or not movable(block):
                # The gap is being written, or waits for its last reader; or this block cannot be evicted.
                run, run_bytes = [], 0
                begin = offset - self.allocator.hole_before(offset)
            at = offset + block.extent_bytes
            if not movable(block):
                begin = at
                continue
            run.append(block)
            run_bytes += block.extent_bytes
            end = at + self.allocator.hole_at(at)
            while len(run) > 1 and end - (run[0].offset + run[0].extent_bytes) >= length:
                begin = run[0].offset + run[0].extent_bytes
                run_bytes -= run[0].extent_bytes
                run = run[1:]
            if end - begin >= length and (best is None or run_bytes < best_bytes):
                best, best_bytes = list(run), run_bytes
        return best

    def _around(self, seed: int, length: int, movable: Callable[[Block], bool]) -> list[Block] | None:
        """The cheapest range around one hole: it begins as far to the left as allowed, then moves to the right, block
        by block."""
        hole = self.allocator.hole_at(seed)
        left: list[Block] = []
        begin = seed
        while seed + hole - begin < length:
            block = self._ending.get(begin)
            if block is None or not movable(block):
                break
            left.append(block)
            begin = block.offset - self.allocator.hole_before(block.offset)
        end = seed + hole
        right: list[Block] = []
        best: list[Block] | None = None
        best_bytes = 0
        while True:
            while end - begin < length:
                block = self.blocks.get(end)
                if block is None or not movable(block):
                    return best
                right.append(block)
                end = end + block.extent_bytes + self.allocator.hole_at(end + block.extent_bytes)
            run = [*left, *right]
            run_bytes = sum(block.extent_bytes for block in run)
            if best is None or run_bytes < best_bytes:
                best, best_bytes = run, run_bytes
            if not left:
                return best
            last = left.pop()
            begin = last.offset + last.extent_bytes

    def check_integrity(self) -> None:
        """Assert SPACE-1 and those of the allocator."""
        self.allocator.check_integrity()
        assert {b.offset + b.extent_bytes: b for b in self.blocks.values()} == self._ending, "SPACE-1: ends differ"
        assert all(block.offset == offset for offset, block in self.blocks.items()), "SPACE-1: starts differ"
