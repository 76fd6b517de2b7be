"""The block table of a pool: where each block lies, where a new one is placed, and what is evicted for it.

Pure state, no I/O and no lock: the pool calls it under its own lock.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from penstock.core.keys import BlockKey
from penstock.core.layout import staging_bytes
from penstock.core.new_block import NewBlock
from penstock.core.pool.pool_eviction import STEPS, PoolEviction
from penstock.core.pool.quota import SHARED, TenantQuotas
from penstock.core.pool.striping import CYCLE_BLOCKS, Placement
from penstock.pool.block import Block
from penstock.pool.local.space import MemberSpace

EVICTION_REASONS = ("own", "shared", "over_quota")
SCAN_BLOCKS_FREE = 1024  # blocks of a member that one search may always visit
SCAN_BLOCKS_PER_CHANGE = 64  # further ones per change since a search that found nothing
SEEDS_MAX = 8  # holes whose neighbours are considered when free space is fragmented


@dataclass(slots=True)
class MemberState:
    """A member in the table. The number of a removed member is reused once its space is free."""

    space: MemberSpace
    healthy: bool = True
    draining: bool = False
    gone: bool = False

    @property
    def label(self) -> str:
        """The state as `penstock pool stat` prints it: ok, draining or fenced."""
        return "draining" if self.draining else "ok" if self.healthy else "fenced"

    @property
    def free(self) -> bool:
        """Whether the member was removed and holds no bytes any more, so that its number may be reused."""
        return self.gone and not self.space.used_bytes


class Table:
    """Blocks, extents, pins and worth of all members.

    TABLE-1  Statement: An extent belongs to at most one block: present, being written, being moved to, or detached.
    TABLE-2  Statement: A detached block is pinned and cannot be found; its extent is freed with its last pin.
    TABLE-3  Statement: A key has at most one present block, and at most one write or move under way.
    TABLE-4  Statement: Each account is charged exactly the extents of its blocks.
    TABLE-5  Statement: A block is placed only on members that are healthy, not draining and not removed; a removed
             member has no block.
    TABLE-6  Statement: The present blocks are those in the eviction order, and each member counts its own.
    Verification: `check_integrity`, tests/pool/local/test_extents_and_table.py,
    tests/pool/local/test_table_histories.py.
    """

    def __init__(
        self, ranges: Sequence[tuple[int, int]], weights: Sequence[float], quotas: TenantQuotas | None = None
    ) -> None:
        """`ranges` are the usable bytes `[start, end)` of each member."""
        self.members = [MemberState(MemberSpace(start, end)) for start, end in ranges]
        self.placement = Placement(weights)
        self.quotas = quotas or TenantQuotas()
        self.scans = 0  # searches over a whole member
        self.evictions = dict.fromkeys(EVICTION_REASONS, 0)  # blocks evicted for a new one, by reason
        self._eviction = PoolEviction(len(self.members), self.quotas)
        self._blocks: dict[BlockKey, Block] = {}
        self._writing: dict[BlockKey, Block] = {}
        self._moving: dict[BlockKey, Block] = {}  # the copies that are being made
        self._detached: set[Block] = set()
        self._changes = 0  # extents allocated and freed
        self._no_scan_before: dict[int, int] = {}  # member -> `_changes` before which a search fails
        self.on_gone: Callable[[BlockKey], None] = lambda key: None  # a present block is a miss from now on
        self._note_capacity()

    def __len__(self) -> int:
        return len(self._blocks)

    # --- blocks ---

    def find(self, key: BlockKey) -> Block | None:
        """The block, if it can be read now."""
        block = self._blocks.get(key)
        return block if block is not None and self.members[block.member].healthy else None

    def holds(self, key: BlockKey, member: int) -> Block | None:
        """The block that this member has under the key, readable now or not."""
        block = self._blocks.get(key)
        return block if block is not None and block.member == member else None

    def being_written(self, key: BlockKey) -> bool:
        """Whether a write of this block is under way."""
        return key in self._writing

    def being_moved(self, key: BlockKey) -> bool:
        """Whether a copy of this block to another member is under way."""
        return key in self._moving

    def touch(self, block: Block) -> float:
        """Record a use; returns the block's new eviction value. The block is charged to its tenant's own account from
        now on, where that exists by now."""
        if self._charge_user(block):
            self._eviction.set_account(block.key, block.account)
        value = self._eviction.touch(block.key)
        block.uses = self._eviction.uses(block.key)
        return value

    def value(self, key: BlockKey) -> float:
        """The eviction value of a present block, as a durable table stores it."""
        return self._eviction.value(key)

    def pin(self, block: Block) -> None:
        """Pin a present block: it stays in place until there were as many `unpin` calls."""
        block.pins += 1
        if block.pins == 1:
            self._eviction.pin(block.key)

    def unpin(self, block: Block) -> None:
        """Undo a pin; the extent of a detached block is freed with its last one."""
        assert block.pins > 0, f"block {block.key.hex()} has no pin"
        block.pins -= 1
        if block.pins:
            return
        if block in self._detached:
            self._detached.discard(block)
            self._give_back(block)
        else:
            self._eviction.unpin(block.key)

    def drop(self, block: Block) -> None:
        """Make a present block a miss. The caller must delete its row now; its extent is free once nobody reads it."""
        if block.pins:
            self._eviction.unpin(block.key)
        self._eviction.remove(block.key)
        self._leave(block)
        self.on_gone(block.key)

    def evictable(self, key: BlockKey) -> Block | None:
        """The block, if it is present and not pinned."""
        block = self._blocks.get(key)
        return block if block is not None and not block.pins else None

    def reserve(self, new: NewBlock, without: Container[int] = ()) -> tuple[Block | None, list[Block]]:
        """Reserve an extent for a block that is about to be written; returns the block, and the blocks that were
        evicted for it (their extents are in use again). None when no member that accepts blocks, except those in
        `without`, has room, or when only blocks of tenants within their quotas could be evicted. Whose blocks are
        evicted is decided over all members: a tenant within its quota does not lose a block only because no tenant on
        that member is over its quota."""
        account, length = self.quotas.account(new.tenant), staging_bytes(new.size_bytes)
        gone: list[Block] = []
        # Charge it first: whose blocks are evicted must not change while the writer's own blocks are evicted.
        self.quotas.charge(account, length)
        order = [member for member in self.placement.order(new.position) if member not in without]
        found = self._find_room(order, length, account, gone)
        if found is None:
            self.quotas.credit(account, length)
            return None, gone
        self.quotas.note_written(account, length)
        return self._start(new, *found, account), gone

    def _find_room(self, order: list[int], length: int, account: bytes, gone: list[Block]) -> tuple[int, int] | None:
        """Find a member, and an offset on it, for a block that is charged already."""
        for member in order:
            offset = self._space(member).allocator.take(length)
            if offset is not None:
                return member, offset
        for step in STEPS:
            for member in order:
                offset = self._make_room(member, length, account, step, gone)
                if offset is not None:
                    return member, offset
        for member in order if self._eviction.may_gain(account, length) else ():
            offset = self._clear_anywhere(member, length, account, gone)
            if offset is not None:
                return member, offset
        return None

    def commit(self, block: Block) -> Block | None:
        """Make a written block present; returns the block that had its key until now (on a fenced member, or replaced),
        which is dropped."""
        del self._writing[block.key]
        old = self._blocks.get(block.key)
        if old is not None:
            self.drop(old)
        self._add(block, None)
        return old

    def abandon(self, block: Block) -> None:
        """Free the extent of a block that could not be written."""
        del self._writing[block.key]
        self._give_back(block)

    def restore(self, member: int, rows: Iterable[tuple[Block, float]]) -> list[Block]:
        """Add blocks, with their eviction values, from the durable table of a member that has none yet; returns those
        that were refused: malformed, outside, overlapping, or under a key that is present."""
        known = sorted(rows, key=lambda row: row[1])
        wrong = [block for block, _ in known if block.size_bytes < 1 or block.key == block.parent]
        doubled = set(map(id, wrong))
        seen: set[BlockKey] = set()
        for block, _ in known:
            if block.key in seen or block.key in self._blocks or block.key in self._writing:
                doubled.add(id(block))
            seen.add(block.key)
        fit = [(block, value) for block, value in known if id(block) not in doubled]
        space = self._space(member)
        taken = space.allocator.take_listed([(block.offset, block.extent_bytes) for block, _ in fit])
        kept = set()
        fitting = [one for one, ok in zip(fit, taken, strict=True) if ok]
        for block, _ in reversed(
            fitting
        ):  # the most valuable first: default quotas are limited, and go to their tenants
            block.account = self.quotas.account(block.tenant)
            self.quotas.charge(block.account, block.extent_bytes)
        for block, value in fitting:
            block.member = member
            if block.uses > 1:
                self._charge_user(block)
            self._add(block, value)
            kept.add(id(block))
        return [block for block, _ in known if id(block) not in kept]

    # --- moving a block to another member ---

    def blocks_on(self, member: int) -> list[Block]:
        """Present blocks of a member, in no order."""
        return list(self._space(member).blocks.values())

    def writes_on(self, member: int) -> int:
        """How many blocks are being written or moved to a member."""
        return sum(block.member == member for block in (*self._writing.values(), *self._moving.values()))

    def in_use(self, member: int) -> int:
        """Bytes of a member that are in use, including those being written or still read."""
        return self._space(member).used_bytes

    def reserve_move(self, block: Block, without: Container[int] = ()) -> Block | None:
        """Reserve an extent for a copy of a present block, in free space of another member; None when there is none, or
        when its key is being written or moved."""
        if block.key in self._moving or block.key in self._writing:
            return None
        for member in self.placement.order(block.position):
            if member == block.member or member in without:
                continue
            offset = self._space(member).allocator.take(block.extent_bytes)
            if offset is not None:
                copy = Block(block.key, block.parent, member, offset, block.size_bytes, block.position)
                copy.checksum, copy.tenant, copy.rebuild_s = block.checksum, block.tenant, block.rebuild_s
                copy.account, copy.mac = block.account, block.mac
                self.quotas.charge(copy.account, copy.extent_bytes)
                self._moving[copy.key] = copy
                return copy
        return None

    def commit_move(self, block: Block, copy: Block) -> bool:
        """Replace the block by its complete copy; the caller must delete the old row now. False, and the copy is
        dropped, when the block was dropped meanwhile."""
        if self._blocks.get(block.key) is not block:
            self.abandon_move(copy)
            return False
        del self._moving[copy.key]
        copy.uses = block.uses
        if copy.account != block.account:
            self.quotas.recharge(copy.account, block.account, copy.extent_bytes)
            copy.account = block.account
        if block.pins:
            self._eviction.unpin(block.key)
        self._eviction.move(block.key, copy.member)
        self._leave(block)
        self._place(copy)
        return True

    def abandon_move(self, copy: Block) -> None:
        """Free the extent of a copy that did not succeed; the original stays."""
        del self._moving[copy.key]
        self._give_back(copy)

    # --- members ---

    def set_healthy(self, member: int, healthy: bool) -> None:
        """Fence a member: its blocks are misses meanwhile. Or use it again, with the blocks that were not rewritten
        elsewhere."""
        state = self.members[member]
        state.healthy = healthy
        self._eviction.set_fenced(member, not healthy)
        self.placement.set_health(member, state.healthy and not state.draining)

    def add_member(self, start: int, end: int, weight: float) -> int:
        """Add a member; returns its number, which may be that of a removed member."""
        for number, state in enumerate(self.members):
            if state.free:
                self.members[number] = MemberState(MemberSpace(start, end))
                self.placement.set_weight(number, weight)
                self.placement.set_health(number, True)
                self._note_capacity()
                return number
        self.members.append(MemberState(MemberSpace(start, end)))
        self._eviction.add_member()
        self._note_capacity()
        return self.placement.add(weight)

    def start_drain(self, member: int) -> None:
        """Place no further block on a member; its blocks stay readable."""
        self.members[member].draining = True
        self.placement.set_health(member, False)

    def remove_member(self, member: int) -> None:
        """Remove a member without present blocks; reads that are under way there may end."""
        state = self.members[member]
        assert not state.space.blocks, "a member with blocks cannot be removed"
        state.gone, state.draining, state.healthy = True, False, True
        self._eviction.set_fenced(member, False)
        self.placement.set_health(member, False)
        self.placement.set_weight(member, 0.0)
        self._note_capacity()

    def check_integrity(self) -> None:
        """Assert TABLE-1..TABLE-6 and the invariants of the parts; O(n log n)."""
        self._eviction.check_integrity()
        used: list[list[tuple[int, int]]] = [[] for _ in self.members]
        held: dict[bytes, int] = {}
        for block in (*self._blocks.values(), *self._writing.values(), *self._moving.values(), *self._detached):
            used[block.member].append((block.offset, block.extent_bytes))
            held[block.account] = held.get(block.account, 0) + block.extent_bytes
        assert all(block.pins > 0 for block in self._detached), "TABLE-2: a detached block has no reader"
        assert not any(self._blocks.get(block.key) is block for block in self._detached), (
            "TABLE-2: a detached block is found"
        )
        assert not self._writing.keys() & self._moving.keys(), "TABLE-3: a key is written and moved"
        assert held == dict(self.quotas), "TABLE-4: accounts are charged wrong"
        assert len(self._eviction) == len(self._blocks) and all(key in self._eviction for key in self._blocks), (
            "TABLE-6"
        )
        for number, (state, extents) in enumerate(zip(self.members, used, strict=True)):
            assert not (state.gone and state.space.blocks), "TABLE-5: a block lies on a member that is gone"
            state.space.check_integrity()
            extents.sort()
            for (offset, length), (following, _) in pairwise(extents):
                assert offset + length <= following, "TABLE-1: two blocks share bytes"
            assert state.space.used_bytes == sum(length for _, length in extents), "TABLE-1: space is lost"
            here = {block for block in self._blocks.values() if block.member == number}
            assert set(state.space.blocks.values()) == here, "TABLE-6: a member does not hold its blocks"
        placed = {member for position in range(CYCLE_BLOCKS) for member in self.placement.order(position)[:1]}
        assert all(self.members[m].healthy and not self.members[m].draining for m in placed), "TABLE-5: placed wrong"
        assert not any(self.members[m].gone for m in placed), "TABLE-5: placed on a member that is gone"

    # --- inside ---

    def _space(self, member: int) -> MemberSpace:
        return self.members[member].space

    def _start(self, new: NewBlock, member: int, offset: int, account: bytes) -> Block:
        block = Block(new.key, new.parent, member, offset, new.size_bytes, new.position % CYCLE_BLOCKS)
        block.tenant, block.rebuild_s, block.account = new.tenant, new.rebuild_s, account
        block.mac, block.written_here = new.mac, True
        self._changes += 1
        self._writing[block.key] = block
        return block

    def _add(self, block: Block, value: float | None) -> None:
        size, uses = block.extent_bytes, block.uses
        account, tenant = block.account, block.tenant
        self._eviction.add(block.key, block.parent, block.member, account, size, block.rebuild_s, uses, value, tenant)
        self._place(block)

    def _place(self, block: Block) -> None:
        self._blocks[block.key] = block
        self._space(block.member).add(block)

    def _leave(self, block: Block) -> int | None:
        """Remove from its member a block that left the eviction order, or that has a copy elsewhere now. Returns where
        its hole begins; None while it is still read."""
        del self._blocks[block.key]
        self._space(block.member).remove(block)
        if block.pins:
            self._detached.add(block)
            return None
        return self._give_back(block)

    def _give_back(self, block: Block) -> int:
        self.quotas.credit(block.account, block.extent_bytes)
        self._changes += 1
        return self._space(block.member).allocator.give(block.offset, block.extent_bytes)

    def _make_room(self, member: int, length: int, writer: bytes, step: int, gone: list[Block]) -> int | None:
        """Evict leaves of a member, `length` bytes or a little more, until a hole of `length` exists. If the free space
        is still fragmented then, evict the cheapest neighbours of the evicted blocks, leaves or not. `step` selects the
        leaves (`PoolEviction.evict`)."""
        space = self._space(member)
        if length > space.capacity_bytes:
            return None
        holes: list[int] = []
        freed_bytes = 0
        while freed_bytes < length:
            blocks = [self._blocks[key] for key in self._eviction.evict(member, writer, 0, (step,))]
            freed = 0
            for block in blocks:
                self._count_eviction(block, writer)
                hole = self._leave(block)
                self.on_gone(block.key)
                gone.append(block)
                if block.member == member and hole is not None:
                    freed += block.extent_bytes
                    holes.append(hole)
            offset = space.allocator.take(length)
            if offset is not None:
                return offset
            if not freed:
                break
            freed_bytes += freed
        holes = [hole for hole in holes if space.allocator.hole_at(hole)]
        run = space.cheapest_local(holes[:SEEDS_MAX], length, lambda block: self._movable(block, writer))
        return self._clear(space, run, length, writer, gone)

    def _clear_anywhere(self, member: int, length: int, writer: bytes, gone: list[Block]) -> int | None:
        """Evict the cheapest neighbours of the whole member, where no member has a leaf whose surroundings can be
        evicted. After a search that found none, the next one waits for changes: writes that cannot succeed must not
        make the pool search all the time."""
        space = self._space(member)
        if length > space.capacity_bytes or self._changes < self._no_scan_before.get(member, 0):
            return None
        self.scans += 1
        pause = max(0, len(space.blocks) - SCAN_BLOCKS_FREE) // SCAN_BLOCKS_PER_CHANGE
        self._no_scan_before[member] = self._changes + pause
        run = space.cheapest_anywhere(length, lambda block: self._movable(block, writer))
        return self._clear(space, run, length, writer, gone)

    def _movable(self, block: Block, writer: bytes) -> bool:
        return not block.pins and self._eviction.may_displace(block.key, writer, 0)

    def _clear(
        self, space: MemberSpace, run: list[Block] | None, length: int, writer: bytes, gone: list[Block]
    ) -> int | None:
        if run is None or not self._eviction.may_displace_all([block.key for block in run], writer, 0):
            return None
        for block in run:
            self._count_eviction(block, writer)
            self.drop(block)
            gone.append(block)
        return space.allocator.take(length)

    def _charge_user(self, block: Block) -> bool:
        """Record that a block was used again; returns whether another account is charged with it from now on."""
        account = self.quotas.used(block.tenant, block.account)
        if account == block.account:
            return False
        self.quotas.recharge(block.account, account, block.extent_bytes)
        block.account = account
        return True

    def _count_eviction(self, block: Block, writer: bytes) -> None:
        if block.account == writer != SHARED:
            reason = "own"
        else:
            reason = "shared" if self.quotas.payer(block.account) == self.quotas.payer(writer) else "over_quota"
        self.evictions[reason] += 1

    def _note_capacity(self) -> None:
        self.quotas.set_capacity(sum(state.space.capacity_bytes for state in self.members if not state.gone))
