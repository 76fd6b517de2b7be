"""The block table of a pool: where each block lies, where a new one is placed, and what is evicted for it.

Pure state, no I/O and no lock: the pool calls it under its own lock. Present blocks are rows of packed columns
(`core.pool.block_rows`); a `Block` is made for one that somebody takes up, and is the same one until all let it go.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from penstock.core.keys import KEY_BYTES, BlockKey
from penstock.core.layout import STAGING_ALIGNMENT_BYTES, staging_bytes
from penstock.core.new_block import NewBlock
from penstock.core.pool.block_rows import PINNED, PRESENT, WRITTEN_HERE
from penstock.core.pool.copies import is_copy
from penstock.core.pool.pool_eviction import STEPS, PoolEviction
from penstock.core.pool.quota import SHARED, TenantQuotas
from penstock.core.pool.striping import CYCLE_BLOCKS, Placement
from penstock.pool.block import Block
from penstock.pool.local.row_batches import Found, RowBatches
from penstock.pool.local.space import MemberSpace, Places
from penstock.pool.members.stored_rows import StoredRows, packed

EVICTION_REASONS = ("own", "shared", "over_quota")
SCAN_BLOCKS_FREE = 1024  # blocks of a member that one search may always visit
SCAN_BLOCKS_PER_CHANGE = 64  # further ones per change since a search that found nothing
FEW = 8  # blocks or keys, below which one by one is faster than a batch
SEEDS_MAX = 8  # holes whose neighbours are considered when free space is fragmented


@dataclass(slots=True)
class MemberState:
    """A member in the table. The number of a removed member is reused once its space is free."""

    space: MemberSpace
    healthy: bool = True
    draining: bool = False
    gone: bool = False
    durable: bool = False  # uses are noted for its table

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
        self.placement = Placement(weights)
        self.quotas = quotas or TenantQuotas()
        self.scans = 0  # searches over a whole member
        self.evictions = dict.fromkeys(EVICTION_REASONS, 0)  # blocks evicted for a new one, by reason
        self._eviction = PoolEviction(len(ranges), self.quotas, STAGING_ALIGNMENT_BYTES, secrets.randbits(64))
        self._rows = self._eviction.rows
        self._places = Places(self._rows)
        self._batches = RowBatches(self._eviction, self._places)
        self.members = [MemberState(self._new_space(*one, number)) for number, one in enumerate(ranges)]
        self._taken_up: WeakValueDictionary[int, Block] = WeakValueDictionary()  # of present rows
        self._pinned: dict[int, Block] = {}
        self._writing: dict[BlockKey, Block] = {}
        self._moving: dict[BlockKey, Block] = {}  # the copies that are being made
        self._detached: set[Block] = set()
        self._changes = 0  # extents allocated and freed
        self._no_scan_before: dict[int, int] = {}  # member -> `_changes` before which a search fails
        self.on_gone: Callable[[BlockKey], None] = lambda key: None  # a present block is a miss from now on
        self._note_capacity()

    def __len__(self) -> int:
        return self._rows.blocks

    @property
    def rows_used(self) -> int:
        """Rows that were ever used, of present blocks, absent parents and those that left."""
        return self._rows.high

    @property
    def leaves_queued(self) -> int:
        """Items in the queues of leaves, those of blocks that left or got children included."""
        return self._eviction.leaves.items

    @property
    def bytes_per_row(self) -> int:
        """Bytes of memory per row: all columns and links, and a bucket of each index."""
        return self._rows.row_bytes + self._places.row_bytes

    # --- blocks ---

    def find(self, key: BlockKey) -> Block | None:
        """The block, if it can be read now."""
        row = self._rows.find(key)
        return self._block(row) if row >= 0 and self.members[self._rows.member[row]].healthy else None

    def member_of(self, key: BlockKey) -> int | None:
        """The member of a block that can be read now; None for a miss."""
        row = self._rows.find(key)
        member = self._rows.member[row] if row >= 0 else -1
        return member if row >= 0 and self.members[member].healthy else None

    def holds(self, key: BlockKey, member: int) -> Block | None:
        """The block that this member has under the key, readable now or not."""
        row = self._rows.find(key)
        return self._block(row) if row >= 0 and self._rows.member[row] == member else None

    def knows(self, key: BlockKey) -> bool:
        """Whether a block has this key, readable or not, or is being written under it."""
        return key in self._writing or self._rows.find(key) >= 0

    def being_written(self, key: BlockKey) -> bool:
        """Whether a write of this block is under way."""
        return key in self._writing

    def being_moved(self, key: BlockKey) -> bool:
        """Whether a copy of this block to another member is under way."""
        return key in self._moving

    def lookup_many(self, keys: bytes) -> Found:
        """Find blocks by their keys (16 bytes each, one after the other), those that can be read now, and record the
        use of each in turn. A block is charged to its tenant's own account from now on, where that exists by now."""
        if len(keys) < FEW * KEY_BYTES:
            return self._lookup_few(keys)
        chain = self._batches.find_chain(keys)
        rows = self._batches.find(keys) if chain is None else chain
        hits = rows[rows >= 0] if chain is None else rows
        if not all(state.healthy for state in self.members):
            healthy = np.array([state.healthy for state in self.members])
            readable = healthy[self._batches.members_of(hits)]
            rows[np.flatnonzero(rows >= 0)[~readable]] = -1
            hits = rows[rows >= 0]
        if len(hits):
            self._charge_users(hits)
            self._batches.touch(hits)
            durable = [number for number, state in enumerate(self.members) if state.durable]
            if durable:
                members = self._batches.members_of(hits)
                for number in durable:
                    self._batches.note_uses(number, hits[members == number])
        return self._batches.found(rows, len(hits) == len(rows))

    def _lookup_few(self, keys: bytes) -> Found:
        sizes, members = [], []
        for at in range(0, len(keys), KEY_BYTES):
            row = self._rows.find(keys[at : at + KEY_BYTES])
            if row >= 0 and self.members[self._rows.member[row]].healthy:
                self._use(row)
                sizes.append(self._rows.size[row])
                members.append(self._rows.member[row])
            else:
                sizes.append(0)
                members.append(0)
        return Found(np.array(sizes, np.uint32), np.array(members, np.uint16))

    def touch(self, block: Block) -> float:
        """Record a use of a present block; returns its new eviction value. The block is charged to its tenant's own
        account from now on, where that exists by now."""
        assert block.row >= 0, f"block {block.key.hex()} is not present"
        value = self._use(block.row)
        block.uses = self._rows.uses[block.row]
        return value

    def _use(self, row: int) -> float:
        self._charge_user(row)
        member = self._rows.member[row]
        if self.members[member].durable:
            self._batches.note_uses(member, np.array([row]))
        return self._eviction.touch(row)

    def take_uses(self, member: int, limit: int) -> list[tuple[BlockKey, float, int]]:
        """Key, eviction value and count of uses of at most `limit` blocks of a member that were used since they were
        last taken."""
        return self._batches.take_uses(member, limit)

    def note_durable(self, member: int) -> None:
        """Uses of this member's blocks are noted from now on, for `take_uses`."""
        self.members[member].durable = True

    def value(self, key: BlockKey) -> float:
        """The eviction value of a present block, as a durable table stores it. Raises KeyError when it is absent."""
        row = self._rows.find(key)
        if row < 0:
            raise KeyError(key)
        return float(self._rows.worth[row])

    def pin(self, block: Block) -> None:
        """Pin a present block: it stays in place until there were as many `unpin` calls."""
        block.pins += 1
        if block.pins == 1:
            self._pinned[block.row] = block
            self._eviction.pin(block.row)

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
            del self._pinned[block.row]
            self._eviction.unpin(block.row)

    def drop(self, block: Block) -> None:
        """Make a present block a miss. The caller must delete its row now; its extent is free once nobody reads it."""
        assert block.row >= 0, f"block {block.key.hex()} is not present"
        self._drop_row(block.row)

    def evict_many(self, keys: bytes) -> list[tuple[int, BlockKey]]:
        """Drop those of the blocks (16 bytes of key each) that are present and not pinned; returns their members and
        keys, whose rows the caller must delete now."""
        gone = []
        for row in dict.fromkeys(self._batches.find(keys).tolist()):
            if row >= 0 and not self._rows.flags[row] & PINNED:
                gone.append((self._rows.member[row], self._rows.key(row)))
                self._drop_row(row)
        return gone

    def reserve(self, new: NewBlock, without: Container[int] = ()) -> tuple[Block | None, list[Block]]:
        """Reserve an extent for a block that is about to be written; returns the block, and the blocks that were
        evicted for it (their extents are in use again). None when no member that accepts blocks, except those in
        `without`, has room, or when only blocks of tenants within their quotas could be evicted. Whose blocks are
        evicted is decided over all members: a tenant within its quota does not lose a block only because no tenant on
        that member is over its quota."""
        account, length = self.quotas.account(new.tenant), staging_bytes(new.size_bytes)
        gone: list[Block] = []
        if new.tenant and is_copy(new.tenant) and not self._within_copies(account, length, gone):
            return None, gone
        # Charge it first: whose blocks are evicted must not change while the writer's own blocks are evicted.
        self.quotas.charge(account, length)
        order = [member for member in self.placement.order(new.position) if member not in without]
        found = self._find_room(order, length, account, gone)
        if found is None:
            self.quotas.credit(account, length)
            return None, gone
        self.quotas.note_written(account, length)
        return self._start(new, *found, account), gone

    def _within_copies(self, account: bytes, length: int, gone: list[Block]) -> bool:
        """Evict copies until one more of an account is within their share (`core.pool.copies`); False when it cannot
        be."""
        copies = self.quotas.copies
        if not copies.admits(account, length):
            return False
        while not copies.fit(length):
            loser = copies.loser(account, length)
            row = self._eviction.evict_copy(loser) if loser is not None else -1
            if row < 0:
                return False
            block = self._block(row)
            self._count_eviction(self._rows.account(row), account)
            self._left(row)
            gone.append(block)
        return True

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

    def reserve_many(
        self, news: Sequence[NewBlock], without: Container[int] = ()
    ) -> tuple[list[Block | None], list[tuple[int, BlockKey]]]:
        """As `reserve` of each in turn; returns the blocks, and members and keys of those that were evicted."""
        gone: list[tuple[int, BlockKey]] = []
        blocks = self._replace_least(news, without, gone)
        self._take_free(news, without, blocks)
        for at, new in enumerate(news):
            if blocks[at] is None:
                blocks[at], others = self.reserve(new, without)
                gone += [(old.member, old.key) for old in others]
        return blocks, gone

    def _alike(self, news: Sequence[NewBlock]) -> int:
        """The length of the extents of blocks that may be reserved together: of one length and tenant, while nobody has
        a quota; else 0."""
        first = news[0] if len(news) >= FEW and self.quotas.all_pay_together else None
        if (
            first is None
            or is_copy(first.tenant)
            or any((new.size_bytes, new.tenant) != (first.size_bytes, first.tenant) for new in news)
        ):
            return 0
        return staging_bytes(first.size_bytes)

    def _take_free(self, news: Sequence[NewBlock], without: Container[int], blocks: list[Block | None]) -> None:
        """Reserve free space for those of the blocks that have none yet, each on its owner, where nobody has a quota.
        None for those that `reserve` must find room for."""
        length = self._alike(news)
        if not length:
            return
        by_owner: dict[int | None, list[int]] = {}
        for at, new in enumerate(news):
            if blocks[at] is None:
                by_owner.setdefault(self.placement.owner(new.position), []).append(at)
        account = self.quotas.account(news[0].tenant)
        for owner, numbers in by_owner.items():
            if owner is None or owner in without:
                continue
            offsets = self._space(owner).allocator.take_many(length, len(numbers))
            if offsets:
                self.quotas.charge(account, length * len(offsets))
                self.quotas.note_written(account, length * len(offsets))
            for at, offset in zip(numbers, offsets, strict=False):
                blocks[at] = self._start(news[at], owner, offset, account)

    def _replace_least(
        self, news: Sequence[NewBlock], without: Container[int], gone: list[tuple[int, BlockKey]]
    ) -> list[Block | None]:
        """Where nobody has a quota and the members are full: reserve the extents of the blocks of least worth for
        blocks of the same length, each on its owner. None for those that `reserve` must find room for."""
        blocks: list[Block | None] = [None] * len(news)
        length = self._alike(news)
        taking = [member for member in self.placement.taking if member not in without]
        if not length or any(self._space(member).allocator.largest_bytes >= length for member in taking):
            return blocks
        owners = [-1 if (owner := self.placement.owner(new.position)) is None else owner for new in news]
        if not set(owners) <= set(taking):
            return blocks
        account = self.quotas.account(news[0].tenant)
        offsets = self._evict_in_turn(owners, account, length, gone)
        for at, (owner, offset) in enumerate(zip(owners, offsets, strict=False)):
            if offset is not None:
                self.quotas.note_written(account, length)
                blocks[at] = self._start(news[at], owner, offset, account)
        return blocks

    def _evict_in_turn(
        self, members: Sequence[int], account: bytes, length: int, gone: list[tuple[int, BlockKey]]
    ) -> list[int | None]:
        """Evict a block of each member in turn, as long as one may leave; returns where their extents begin, those of
        this length, which are charged to the account, and None for others, which are free."""
        rows = self._rows
        offsets: list[int | None] = []
        left = self._eviction.evict_in_turn(members)
        if not left:
            return offsets
        before = [(rows.member[row], rows.account(row)) for row in left]
        for row in set(left).intersection(self._taken_up.keys()):
            block = self._taken_up.pop(row, None)
            if block is not None:
                block.row, block.account, block.uses = -1, rows.account(row), rows.uses[row]
        for (member, payer), key, offset, extent in zip(before, *self._batches.remove(left), strict=True):
            self._count_eviction(payer, account)
            self._space(member).blocks -= 1
            if extent == length:
                self._changes += 1
                offsets.append(offset)
                if payer != account:
                    self.quotas.recharge(payer, account, length)
            else:
                offsets.append(None)
                self._free(member, offset, extent, payer)
            gone.append((member, key))
            self.on_gone(key)
        return offsets

    def commit(self, block: Block) -> Block | None:
        """Make a written block present; returns the block that had its key until now (on a fenced member, or replaced),
        which is dropped."""
        del self._writing[block.key]
        row = self._rows.find(block.key)
        old = self._block(row) if row >= 0 else None
        if old is not None:
            self.drop(old)
        self._add(block)
        return old

    def commit_many(self, blocks: Sequence[Block]) -> list[Block]:
        """As `commit` of each; returns the blocks that were dropped."""
        if len(blocks) < FEW:
            return [one for one in map(self.commit, blocks) if one is not None]
        old: list[Block] = []
        for block in blocks:
            del self._writing[block.key]
        for row in self._batches.find(b"".join(block.key for block in blocks)).tolist():
            if row >= 0:
                old.append(self._block(row))
                self._drop_row(row)
        for block, row in zip(blocks, self._batches.add(blocks).tolist(), strict=True):
            block.row = row
            self._taken_up[row] = block
            self._space(block.member).blocks += 1
        return old

    def abandon(self, block: Block) -> None:
        """Free the extent of a block that could not be written."""
        del self._writing[block.key]
        self._give_back(block)

    def restore(self, member: int, rows: Iterable[tuple[Block, float]]) -> list[Block]:
        """Add blocks, with their eviction values, from the durable table of a member that has none yet; returns those
        that were refused: malformed, outside, overlapping, or under a key that is present."""
        known = list(rows)
        refused = self.restore_many(member, packed(known))
        return [known[at][0] for at in refused]

    def restore_many(self, member: int, stored: StoredRows) -> list[int]:
        """As `restore`, of packed rows; returns the numbers of those that were refused."""
        return self._batches.restore(self._space(member), member, stored, self._writing)

    # --- moving a block to another member ---

    def blocks_on(self, member: int) -> list[Block]:
        """Present blocks of a member, in no order."""
        return [self._block(row) for row in self._batches.rows_on(member, 0, self._rows.high).tolist()]

    def keys_on(self, member: int, first: int, count: int) -> list[tuple[float, BlockKey]] | None:
        """Eviction values and keys of the present blocks of a member among `count` rows of the table from `first` on;
        None past its end."""
        if first >= self._rows.high:
            return None
        found = self._batches.rows_on(member, first, count).tolist()
        return [(self._rows.worth[row], self._rows.key(row)) for row in found]

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
        row, rows = block.row, self._rows
        if row < 0:
            self.abandon_move(copy)
            return False
        del self._moving[copy.key]
        copy.uses, account = rows.uses[row], rows.account(row)
        if copy.account != account:
            self.quotas.recharge(copy.account, account, copy.extent_bytes)
            copy.account = account
        if block.pins:
            self._eviction.unpin(row)
        self._places.remove(row)
        self._space(block.member).blocks -= 1
        self._let_go(row, block)
        self._eviction.move(row, copy.member)
        self._place(copy, row)
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
                self.members[number] = MemberState(self._new_space(start, end, number))
                self.placement.set_weight(number, weight)
                self.placement.set_health(number, True)
                self._note_capacity()
                return number
        self.members.append(MemberState(self._new_space(start, end, len(self.members))))
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
        self._places.check_integrity()
        rows = self._rows
        used: list[list[tuple[int, int]]] = [[] for _ in self.members]
        held: dict[bytes, int] = {}
        present = [0] * len(self.members)
        for row in range(rows.high):
            if rows.flags[row] & PRESENT:
                extent_bytes, account = rows.extent_bytes(row), rows.account(row)
                used[rows.member[row]].append((rows.page[row] * STAGING_ALIGNMENT_BYTES, extent_bytes))
                held[account] = held.get(account, 0) + extent_bytes
                present[rows.member[row]] += 1
                assert bool(rows.flags[row] & PINNED) == (row in self._pinned), "TABLE-2: a pin is miscounted"
        for block in (*self._writing.values(), *self._moving.values(), *self._detached):
            used[block.member].append((block.offset, block.extent_bytes))
            held[block.account] = held.get(block.account, 0) + block.extent_bytes
            assert block.row < 0, "TABLE-2: a block that is not present is found"
        assert all(block.pins > 0 for block in self._detached), "TABLE-2: a detached block has no reader"
        for row, block in self._taken_up.items():
            there = (rows.key(row), rows.member[row], rows.page[row] * STAGING_ALIGNMENT_BYTES)
            assert block.row == row and there == (block.key, block.member, block.offset), "TABLE-2: a block is stale"
            assert block.pins == 0 or self._pinned[row] is block, "TABLE-2: a pin is miscounted"
        assert not self._writing.keys() & self._moving.keys(), "TABLE-3: a key is written and moved"
        assert held == dict(self.quotas), "TABLE-4: accounts are charged wrong"
        for number, (state, extents) in enumerate(zip(self.members, used, strict=True)):
            assert not (state.gone and state.space.blocks), "TABLE-5: a block lies on a member that is gone"
            state.space.allocator.check_integrity()
            extents.sort()
            for (offset, length), (following, _) in pairwise(extents):
                assert offset + length <= following, "TABLE-1: two blocks share bytes"
            assert state.space.used_bytes == sum(length for _, length in extents), "TABLE-1: space is lost"
            assert state.space.blocks == present[number], "TABLE-6: a member miscounts its blocks"
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

    def _new_space(self, start: int, end: int, number: int) -> MemberSpace:
        return MemberSpace(start, end, number, self._places)

    def _block(self, row: int) -> Block:
        """The block of a present row: the same object as long as anybody has it."""
        block = self._taken_up.get(row)
        if block is None:
            block = self._taken_up[row] = self._batches.block(row)
        else:
            block.uses, block.account = self._rows.uses[row], self._rows.account(row)
        return block

    def _add(self, block: Block) -> None:
        size, account = block.size_bytes, block.account
        uses, tenant = block.uses, block.tenant
        row = self._eviction.add(
            block.key, block.parent, block.member, account, size, block.rebuild_s, uses, None, tenant
        )
        self._rows.position[row] = block.position
        if block.written_here:
            self._rows.flags[row] |= WRITTEN_HERE
        self._place(block, row)

    def _place(self, block: Block, row: int) -> None:
        """Set what differs between a block and its copy elsewhere."""
        rows = self._rows
        rows.page[row] = block.offset // STAGING_ALIGNMENT_BYTES
        rows.checksum[row] = block.checksum
        rows.set_mac(row, block.mac)
        if not block.written_here:
            rows.flags[row] &= ~WRITTEN_HERE
        block.row = row
        self._taken_up[row] = block
        self._places.add(row)
        self._space(block.member).blocks += 1

    def _drop_row(self, row: int) -> int | None:
        """Make a present block a miss; returns where its hole begins, None while it is still read."""
        self._rows.flags[row] &= ~PINNED
        self._eviction.leave(row)
        return self._left(row)

    def _left(self, row: int) -> int | None:
        """A block left the eviction order: take it from its member. Returns where its hole begins; None while it is
        still read."""
        rows = self._rows
        key, member = rows.key(row), rows.member[row]
        self._places.remove(row)
        self._space(member).blocks -= 1
        hole = self._let_go(row, self._taken_up.get(row))
        rows.release(row)
        self.on_gone(key)
        return hole

    def _let_go(self, row: int, block: Block | None) -> int | None:
        """Free the extent of a row, or leave it to the block that is still read there."""
        rows = self._rows
        account = rows.account(row)
        if block is not None:
            del self._taken_up[row]
            block.row, block.account, block.uses = -1, account, rows.uses[row]
            if block.pins:
                del self._pinned[row]
                self._detached.add(block)
                return None
        return self._free(rows.member[row], rows.page[row] * STAGING_ALIGNMENT_BYTES, rows.extent_bytes(row), account)

    def _give_back(self, block: Block) -> int:
        return self._free(block.member, block.offset, block.extent_bytes, block.account)

    def _free(self, member: int, offset: int, extent_bytes: int, account: bytes) -> int:
        self.quotas.credit(account, extent_bytes)
        self._changes += 1
        return self._space(member).allocator.give(offset, extent_bytes)

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
            freed = 0
            for row in self._eviction.evict(member, writer, 0, (step,)):
                block = self._block(row)
                self._count_eviction(self._rows.account(row), writer)
                hole = self._left(row)
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
        run = space.cheapest_local(holes[:SEEDS_MAX], length, lambda row: self._movable(row, writer))
        return self._clear(space, run, length, writer, gone)

    def _clear_anywhere(self, member: int, length: int, writer: bytes, gone: list[Block]) -> int | None:
        """Evict the cheapest neighbours of the whole member, where no member has a leaf whose surroundings can be
        evicted. After a search that found none, the next one waits for changes: writes that cannot succeed must not
        make the pool search all the time."""
        space = self._space(member)
        if length > space.capacity_bytes or self._changes < self._no_scan_before.get(member, 0):
            return None
        self.scans += 1
        pause = max(0, space.blocks - SCAN_BLOCKS_FREE) // SCAN_BLOCKS_PER_CHANGE
        self._no_scan_before[member] = self._changes + pause
        by_address = self._batches.by_address(member)
        run = space.cheapest_anywhere(by_address, length, lambda row: self._movable(row, writer))
        return self._clear(space, run, length, writer, gone)

    def _movable(self, row: int, writer: bytes) -> bool:
        return not self._rows.flags[row] & PINNED and self._eviction.may_displace(row, writer, 0)

    def _clear(
        self, space: MemberSpace, run: list[int] | None, length: int, writer: bytes, gone: list[Block]
    ) -> int | None:
        if run is None or not self._eviction.may_displace_all(run, writer, 0):
            return None
        for row in run:
            gone.append(self._block(row))
            self._count_eviction(self._rows.account(row), writer)
            self._drop_row(row)
        return space.allocator.take(length)

    def _charge_user(self, row: int) -> None:
        """Record that a block was used again; another account is charged with it from now on where its tenant has one
        of its own by now."""
        rows = self._rows
        before, tenant = rows.account(row), rows.tenant_of(row)
        account = self.quotas.used(tenant, before)
        if account == before:
            return
        self.quotas.recharge(before, account, rows.extent_bytes(row))
        self._eviction.charge_shared(row, account != tenant)
        block = self._taken_up.get(row)
        if block is not None:
            block.account = account

    def _charge_users(self, hits: NDArray[np.int64]) -> None:
        """As `_charge_user`, of many rows: once for those of one tenant and account, where nothing changes."""
        for part in self._batches.by_account(hits):
            row = int(part[0])
            before = self._rows.account(row)
            if self.quotas.used(self._rows.tenant_of(row), before) != before:
                for other in dict.fromkeys(part.tolist()):
                    self._charge_user(other)

    def _count_eviction(self, account: bytes, writer: bytes) -> None:
        if account == writer != SHARED:
            reason = "own"
        else:
            reason = "shared" if self.quotas.payer(account) == self.quotas.payer(writer) else "over_quota"
        self.evictions[reason] += 1

    def _note_capacity(self) -> None:
        self.quotas.set_capacity(sum(state.space.capacity_bytes for state in self.members if not state.gone))
