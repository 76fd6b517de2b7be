"""The lookup table of a pool: which block lies where, who may use it, where the next one goes, who leaves for it.

Pure state, no I/O and no lock: the pool calls it under its own lock.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from penstock.core.eviction import PrefixIndex
from penstock.core.keys import BlockKey
from penstock.core.layout import staging_bytes
from penstock.core.new_block import NewBlock
from penstock.core.placement import CYCLE_BLOCKS, Placement
from penstock.pool.extents import ExtentAllocator


@dataclass(slots=True, eq=False)
class Block:
    """One block and its extent. `position` is its place in the spread of its prefix over the members."""

    key: BlockKey
    parent: BlockKey
    member: int
    offset: int
    size_bytes: int
    position: int
    checksum: int = 0
    doomed: bool = False  # a miss already, its extent waits for the last reader

    @property
    def extent_bytes(self) -> int:
        return staging_bytes(self.size_bytes)


class Table:
    """Blocks, extents, pins and last uses of all members.

    I1  an extent belongs to at most one block, present or being written
    I2  a doomed block is pinned; it goes with its last pin
    I3  a key is present, being written, or neither
    """

    def __init__(self, ranges: Sequence[tuple[int, int]], weights: Sequence[float]) -> None:
        """`ranges` are the usable bytes `[start, end)` of each member."""
        self.allocators = [ExtentAllocator(start, end) for start, end in ranges]
        self.placement = Placement(weights)
        self.healthy = [True] * len(self.allocators)
        self.counts = [0] * len(self.allocators)
        self.uses = 0
        self._blocks: dict[BlockKey, Block] = {}
        self._writing: dict[BlockKey, Block] = {}
        self._index: PrefixIndex[BlockKey] = PrefixIndex()

    def __len__(self) -> int:
        return len(self._blocks)

    def find(self, key: BlockKey) -> Block | None:
        """The block, if it can be read now."""
        block = self._blocks.get(key)
        return block if block is not None and not block.doomed and self.healthy[block.member] else None

    def occupied(self, key: BlockKey) -> bool:
        """Whether the key cannot be written now: it is being written, or waits for its last reader to leave."""
        block = self._blocks.get(key)
        return key in self._writing or (block is not None and (block.doomed or not self.healthy[block.member]))

    def touch(self, block: Block) -> None:
        """Note a use."""
        self.uses += 1
        self._index.touch(block.key, self.uses)

    def last_use(self, key: BlockKey) -> int:
        return int(self._index.last_use(key))

    def pin(self, block: Block) -> None:
        self._index.pin(block.key)

    def unpin(self, block: Block) -> bool:
        """Undo a pin; True when that was the last one of a doomed block, which is gone now and its extent free."""
        self._index.unpin(block.key)
        if block.doomed and self._index.pins(block.key) == 0:
            self._forget(block)
            return True
        return False

    def doom(self, block: Block) -> bool:
        """Make a present block a miss; True when it is gone already, False when a reader still holds its extent."""
        block.doomed = True
        if self._index.pins(block.key):
            return False
        self._forget(block)
        return True

    def evictable(self, key: BlockKey) -> Block | None:
        """The block, if nothing holds it."""
        block = self._blocks.get(key)
        return block if block is not None and not block.doomed and not self._index.pins(key) else None

    def reserve(self, new: NewBlock, without: Container[int] = ()) -> tuple[Block | None, list[Block]]:
        """An extent for a block that is about to be written, and the blocks that had to leave for it (their extents
        are in use again from now on). None when no healthy member, save those in `without`, can hold it."""
        order = [member for member in self.placement.order(new.position) if member not in without]
        length = staging_bytes(new.size_bytes)
        gone: list[Block] = []
        for member in order:
            offset = self.allocators[member].take(length)
            if offset is not None:
                return self._start(new, member, offset), gone
        for make_room in (self._evict_leaves, self._clear_run):
            for member in order:
                offset = make_room(member, length, gone)
                if offset is not None:
                    return self._start(new, member, offset), gone
        return None, gone

    def commit(self, block: Block) -> None:
        """A written block becomes present."""
        del self._writing[block.key]
        self._add(block)

    def abandon(self, block: Block) -> None:
        """A block that could not be written gives its extent back."""
        del self._writing[block.key]
        self.allocators[block.member].give(block.offset, block.extent_bytes)

    def restore(self, block: Block) -> bool:
        """Take over a block from a durable table; False when its extent or key is taken, or outside the member."""
        if block.key in self._blocks or block.size_bytes < 1 or block.key == block.parent:
            return False
        if not self.allocators[block.member].take_at(block.offset, block.extent_bytes):
            return False
        self._add(block)
        return True

    def fence(self, member: int) -> None:
        """A member that fails: its blocks are misses from now on, and no block is placed there."""
        self.healthy[member] = False
        self.placement.set_health(member, False)

    def present(self) -> Iterable[Block]:
        return self._blocks.values()

    def check_integrity(self) -> None:
        """Assert I1..I3 and those of the parts."""
        self._index.check_integrity()
        assert set(self._index) == set(self._blocks)
        assert not set(self._blocks) & set(self._writing)
        used: list[list[tuple[int, int]]] = [[] for _ in self.allocators]
        for block in (*self._blocks.values(), *self._writing.values()):
            used[block.member].append((block.offset, block.extent_bytes))
        for block in self._blocks.values():
            assert not block.doomed or self._index.pins(block.key)
        for allocator, extents in zip(self.allocators, used, strict=True):
            allocator.check_integrity()
            extents.sort()
            for (offset, length), (following, _) in pairwise(extents):
                assert offset + length <= following, "I1: two blocks share bytes"
            assert allocator.free_bytes + sum(length for _, length in extents) == allocator.end - allocator.start

    def _start(self, new: NewBlock, member: int, offset: int) -> Block:
        block = Block(new.key, new.parent, member, offset, new.size_bytes, new.position % CYCLE_BLOCKS)
        self._writing[block.key] = block
        return block

    def _add(self, block: Block) -> None:
        self.uses += 1
        self._blocks[block.key] = block
        self._index.add(block.key, block.parent, self.uses, group=block.member)
        self.counts[block.member] += 1

    def _forget(self, block: Block) -> None:
        self._index.remove(block.key)
        self._freed(block)

    def _freed(self, block: Block) -> None:
        del self._blocks[block.key]
        self.counts[block.member] -= 1
        self.allocators[block.member].give(block.offset, block.extent_bytes)

    def _evict_leaves(self, member: int, length: int, gone: list[Block]) -> int | None:
        """Evict leaves of a member, twice `length` bytes of them at most, until a hole of `length` exists."""
        allocator = self.allocators[member]
        freed_bytes = 0
        while length <= allocator.end - allocator.start and freed_bytes < 2 * length:
            key = self._index.evict_one(member)
            if key is None:
                return None
            block = self._blocks[key]
            self._freed(block)
            gone.append(block)
            freed_bytes += block.extent_bytes
            offset = allocator.take(length)
            if offset is not None:
                return offset
        return None

    def _clear_run(self, member: int, length: int, gone: list[Block]) -> int | None:
        """Evict neighbours where a member has the bytes, but in pieces: fragments never cost the whole cache."""
        allocator = self.allocators[member]
        if allocator.free_bytes < length:
            return None
        for block in self._cheapest_run(member, length):
            self._forget(block)
            gone.append(block)
        return allocator.take(length)

    def _cheapest_run(self, member: int, length: int) -> list[Block]:
        """Neighbours without pins whose extents and holes span `length` bytes, with the fewest bytes to evict."""
        allocator = self.allocators[member]
        held = [*self._blocks.values(), *self._writing.values()]
        blocks = sorted((b for b in held if b.member == member), key=lambda b: b.offset)
        best: list[Block] = []
        best_bytes = allocator.end + 1
        run: list[Block] = []
        begin = allocator.start
        for i, block in enumerate(blocks):
            if block.key in self._writing or self._index.pins(block.key):
                run, begin = [], block.offset + block.extent_bytes
                continue
            run.append(block)
            end = blocks[i + 1].offset if i + 1 < len(blocks) else allocator.end
            while len(run) > 1 and end - (run[0].offset + run[0].extent_bytes) >= length:
                begin = run[0].offset + run[0].extent_bytes
                run = run[1:]
            run_bytes = sum(b.extent_bytes for b in run)
            if end - begin >= length and run_bytes < best_bytes:
                best, best_bytes = list(run), run_bytes
        return best
