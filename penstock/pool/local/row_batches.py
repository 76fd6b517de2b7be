"""The rows of a table, many at a time: found, touched, restored; numpy over the packed columns.

A view of a column must not outlive the call that made it: a column that grows has no views.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.core.eviction import NS_PER_BYTE_MAX, TICK, USES_MAX, rebuild_cost
from penstock.core.keys import KEY_BYTES, BlockKey
from penstock.core.layout import STAGING_ALIGNMENT_BYTES, staging_bytes
from penstock.core.pool.block_rows import LEAVING, PAID_SHARED, PRESENT, USED, USES_COUNTED_MAX, WRITTEN_HERE
from penstock.core.pool.columns import FINISH, MIX
from penstock.core.pool.pool_eviction import PoolEviction
from penstock.core.pool.quota import SHARED
from penstock.pool.block import Block
from penstock.pool.local.chain_batches import buckets, chain_many, stable_order, unchain_many, views
from penstock.pool.local.space import MemberSpace, Places
from penstock.pool.members.stored_rows import StoredRows, tenant_tag_of, unchecked

ROWS_AT_ONCE = 8192
FEW_LEFT = 20  # keys that are not found yet, below which one by one is faster
CHAIN_KEYS_MAX = 256  # with more, to search all at once is as fast as to follow their chain
_FROM_STORED = ("size", "checksum", "rebuild_s", "position")
Rows = NDArray[np.int64]
Words = NDArray[np.uint64]
_TYPES = {"keys": np.uint64, "checksum": np.uint64, "worth": np.float64, "tenant": np.uint32, "rebuild_s": np.float32}
_TYPES |= {"page": np.uint64, "size": np.uint32, "parent": np.int32, "children": np.uint32, "ticket": np.uint32}
_SHIFT, _FINISH, _HALF = np.uint64(29), np.uint64(FINISH), np.uint64(32)
_TYPES |= {"uses": np.uint16, "position": np.uint16, "member": np.uint16, "flags": np.uint8}


@dataclass(slots=True)
class Found:
    """Where blocks lie, by key asked for: `sizes` in bytes (0 for a miss), `members` by number (0 for a miss)."""

    sizes: NDArray[np.uint32]
    members: NDArray[np.uint16]

    @property
    def alike(self) -> bool:
        """Whether all keys were found, on one member and of one size."""
        return bool(self.sizes[0]) and _alike(self.sizes) and _alike(self.members)


class RowBatches:
    """Batches over the rows of one table."""

    def __init__(self, eviction: PoolEviction, places: Places) -> None:
        self._eviction = eviction
        self._rows = eviction.rows
        self._places = places
        self._salts = np.uint64(self._rows.salt), np.uint64((self._rows.salt ^ MIX) | 1)
        self._unsaved: dict[int, deque[NDArray[np.int32]]] = {}  # by member: rows used since `take_uses`

    # --- finding ---

    def find(self, keys: bytes) -> Rows:
        """The row of each key (16 bytes each); -1 for a block that is not present."""
        words = np.frombuffer(keys, np.uint64).reshape(-1, 2)
        return self._search(words, None)

    def find_chain(self, keys: bytes) -> Rows | None:
        """As `find`, of blocks that are all present, each the parent of the next but for a few: for some dozens of keys
        the faster way. None where they are not, or too many."""
        chain = self._rows.chain(keys, FEW_LEFT) if len(keys) <= CHAIN_KEYS_MAX * KEY_BYTES else None
        if chain is None:
            return None
        rows = np.array(chain)
        return rows if self._column("keys").reshape(-1, 2).take(rows, 0).tobytes() == keys else None

    def found(self, rows: Rows, all_hit: bool) -> Found:
        """Sizes and members of rows, of which some are -1 unless `all_hit`."""
        if all_hit:
            return Found(self._column("size")[rows], self._column("member")[rows])
        hit = rows >= 0
        sizes = np.where(hit, self._column("size")[rows], np.uint32(0))
        return Found(sizes, np.where(hit, self._column("member")[rows], np.uint16(0)))

    def members_of(self, rows: Rows) -> NDArray[np.uint16]:
        """The member of each row."""
        members: NDArray[np.uint16] = self._column("member")[rows]
        return members

    def rows_on(self, member: int, first: int, count: int) -> Rows:
        """Present rows of a member among `count` rows from `first` on."""
        last = min(first + count, self._rows.high)
        here = (self._column("flags")[first:last] & PRESENT).astype(bool)
        here &= self._column("member")[first:last] == member
        return np.flatnonzero(here) + first

    def by_address(self, member: int) -> list[int]:
        """Present rows of a member in the order of their addresses; O(n log n)."""
        rows = self.rows_on(member, 0, self._rows.high)
        order: list[int] = rows[np.argsort(self._column("page")[rows])].tolist()
        return order

    def by_account(self, rows: Rows) -> list[Rows]:
        """The rows in parts, each of one tenant and account, in the order in which they first occur."""
        tenants, flags = self._column("tenant")[rows], self._column("flags")[rows]
        if _alike(tenants) and _alike(flags):
            return [rows]
        accounts = tenants.astype(np.int64) * 2
        accounts += (flags & PAID_SHARED) > 0
        names, first = np.unique(accounts, return_index=True)
        return [rows[accounts == names[at]] for at in np.argsort(first)]

    def block(self, row: int) -> Block:
        """The block of a present row."""
        rows = self._rows
        offset, position = rows.page[row] * STAGING_ALIGNMENT_BYTES, rows.position[row]
        block = Block(rows.key(row), rows.parent_key(row), rows.member[row], offset, rows.size[row], position)
        block.checksum, block.tenant, block.rebuild_s = rows.checksum[row], rows.tenant_of(row), rows.rebuild_s[row]
        block.uses, block.account, block.mac = rows.uses[row], rows.account(row), rows.mac(row)
        block.written_here = bool(rows.flags[row] & WRITTEN_HERE)
        block.row = row
        return block

    # --- uses ---

    def touch(self, rows: Rows) -> None:
        """Note a use of each row in turn."""
        worth = self._column("worth")
        numbers = np.arange(1.0, len(rows) + 1.0)
        before = worth[rows]
        worth[rows] = numbers
        twice = worth[rows].tobytes() != numbers.tobytes()
        worth[rows] = before
        if twice:
            for row in rows.tolist():
                self._eviction.touch(row)
            return
        inflation, members = self._eviction.use_many(len(rows)), self._column("member")[rows]
        value = inflation[members[0]] if _alike(members) else np.array(inflation)[members]
        numbers *= TICK
        numbers += value
        numbers += self._cost_of(rows, self._count_use(rows))
        worth[rows] = np.maximum(numbers, before)

    def _count_use(self, rows: Rows) -> NDArray[np.uint16]:
        """How often each of these rows was used, with one more use."""
        uses = self._column("uses")
        count = uses[rows]
        if _alike(count):
            count[:] = min(int(count[0]) + 1, USES_COUNTED_MAX)
        else:
            count += count < USES_COUNTED_MAX
        uses[rows] = count
        return count

    def note_uses(self, member: int, rows: Rows) -> None:
        """Remember that these rows of a member were used, for `take_uses`."""
        flags = self._column("flags")
        new = rows[(flags[rows] & USED) == 0]
        if len(new):
            flags[new] |= USED
            self._unsaved.setdefault(member, deque()).append(new.astype(np.int32))

    def take_uses(self, member: int, limit: int) -> list[tuple[BlockKey, float, int]]:
        """Key, eviction value and count of uses of at most `limit` rows that were used since they were last taken."""
        unsaved, rows = self._unsaved.get(member), self._rows
        taken: list[tuple[BlockKey, float, int]] = []
        while unsaved and len(taken) < limit:
            some = unsaved.popleft()
            if len(some) > limit - len(taken):
                unsaved.appendleft(some[limit - len(taken) :])
            for row in some[: limit - len(taken)].tolist():
                used = rows.flags[row] & (USED | PRESENT) == USED | PRESENT
                rows.flags[row] &= ~USED
                if used and rows.member[row] == member:
                    taken.append((rows.key(row), rows.worth[row], rows.uses[row]))
        return taken

    # --- a durable table ---

    def restore(self, space: MemberSpace, member: int, stored: StoredRows, writing: Container[BlockKey]) -> list[int]:
        """Add the blocks of a durable table to a member that has none; returns the numbers of those that were refused:
        malformed, outside, overlapping, or under a key that is present or being written."""
        worth, sizes = np.ascontiguousarray(stored["worth"]), np.ascontiguousarray(stored["size"])
        keys, parents = np.ascontiguousarray(stored["key"]), np.ascontiguousarray(stored["parent"])
        order = stable_order(worth)
        fit = (sizes >= 1) & ((keys[:, 0] != parents[:, 0]) | (keys[:, 1] != parents[:, 1]))
        fit &= self._only_once(keys, order, writing)
        at = np.flatnonzero(fit)
        offsets = np.minimum(stored["offset"][at], np.uint64(1 << 62)).astype(np.int64)
        fit[at] = space.allocator.take_listed(np.stack((offsets, _extents(sizes[at]))).T)
        refused: list[int] = []
        if not fit.all():
            refused = order[~fit[order]].tolist()
            order = (np.cumsum(fit) - 1)[order[fit[order]]]
            stored, worth, sizes = stored[fit], worth[fit], sizes[fit]
            if not len(stored):
                return refused
        elif not len(stored):
            return refused
        charged = self._charge(stored, _extents(sizes), order)
        rows = self._insert(np.full(len(stored), member), stored, charged)
        column, cost = self._column("worth"), self._cost_of(rows, self._column("uses")[rows])
        column[rows] = worth = np.maximum(np.where(np.isfinite(worth), worth, 0.0), 0.0)
        self._eviction.raise_inflation(member, float((worth - cost).max()))
        del column
        self._link(rows, order)
        space.blocks += len(rows)
        return refused

    def remove(self, gone: list[int]) -> tuple[list[BlockKey], list[int], list[int]]:
        """Free the rows of blocks that left the eviction order, none of which has children; returns their keys, where
        they began, and the lengths of their extents."""
        rows = np.array(gone)
        words = self._column("keys").reshape(-1, 2)[rows]
        offsets: list[int] = (self._column("page")[rows] * np.uint64(STAGING_ALIGNMENT_BYTES)).tolist()
        lengths: list[int] = _extents(self._column("size")[rows]).tolist()
        flags = self._column("flags")
        flags[rows] = LEAVING
        unchain_many(self._rows.by_key, self._hashes(words), flags)
        self._places.remove_many(rows, flags)
        flags[rows] = 0
        self._rows.free_many(gone)
        keys = words.tobytes()
        return [keys[at : at + KEY_BYTES] for at in range(0, len(keys), KEY_BYTES)], offsets, lengths

    def add(self, blocks: Sequence[Block]) -> Rows:
        """Make written blocks present, whose keys are not; returns their rows."""
        stored = unchecked(blocks)
        members = np.array([block.member for block in blocks])
        charged: dict[tuple[bytes, bytes], list[int]] = {}
        for at, block in enumerate(blocks):
            charged.setdefault((block.tenant, block.account), []).append(at)
        rows = self._insert(members, stored, [(*one, np.array(at)) for one, at in charged.items()], WRITTEN_HERE)
        inflation = np.array(self._eviction.use_many(len(rows)))[members]
        cost = self._cost_of(rows, self._column("uses")[rows])
        self._column("worth")[rows] = inflation + np.arange(1, len(rows) + 1) * TICK + cost
        self._link(rows)
        return rows

    def _only_once(self, keys: Words, order: Rows, writing: Container[BlockKey]) -> NDArray[np.bool_]:
        """Which keys are neither present nor being written, nor named by a row before in this order."""
        new: NDArray[np.bool_] = self._search(keys, None) < 0
        low = np.sort(keys[:, 0])
        if writing or (low[1:] == low[:-1]).any():
            seen: set[BlockKey] = set()
            for at in order.tolist():
                key = keys[at].tobytes()
                if key in seen or key in writing:
                    new[at] = False
                seen.add(key)
        return new

    def _charge(self, stored: StoredRows, extents: NDArray[np.int64], order: Rows) -> list[tuple[bytes, bytes, Rows]]:
        """Charge blocks, in this order (of their worth), to accounts; returns tenants, accounts and the numbers of
        their blocks. Those worth most come first: default quotas are limited, and go to their tenants."""
        quotas, parts = self._eviction.quotas, _by_tenant(stored, order)
        again = np.ascontiguousarray(stored["uses"]) > 1
        accounts = {}
        for tenant, at in reversed(parts):  # by their last block
            accounts[tenant] = quotas.account(tenant)
            quotas.charge(accounts[tenant], int(extents[at].sum()))
        rank = np.empty(len(order), np.int64)
        rank[order] = np.arange(len(order))
        charged = []
        used_again = [(tenant, at[again[at]]) for tenant, at in parts]
        for tenant, at in sorted((one for one in used_again if len(one[1])), key=lambda one: int(rank[one[1][0]])):
            account = quotas.used(tenant, accounts[tenant])
            if account != accounts[tenant]:
                quotas.recharge(accounts[tenant], account, int(extents[at].sum()))
            charged.append((tenant, account, at))
        for tenant, account, _ in sorted(charged, key=lambda one: int(rank[one[2][-1]])):
            quotas.used(tenant, account)
        once = [(tenant, accounts[tenant], at[~again[at]]) for tenant, at in parts]
        return [*charged, *(one for one in once if len(one[2]))]

    def _insert(
        self, members: Rows, stored: StoredRows, charged: list[tuple[bytes, bytes, Rows]], more_flags: int = 0
    ) -> Rows:
        """Make rows present whose keys are not; the caller sets their worth, then calls `_link`."""
        rows = self._rows
        tenants = np.zeros(len(stored), np.uint32)
        shared = np.zeros(len(stored), np.uint8)
        for tenant, account, at in charged:
            tenants[at] = rows.tenant_number(tenant, 0)
            shared[at] = PAID_SHARED if account == SHARED != tenant else 0
        where = self._nodes(np.ascontiguousarray(stored["key"]), tenants)
        above = self._nodes(np.ascontiguousarray(stored["parent"]), tenants)
        self._column("member")[where] = members
        self._column("parent")[where] = above
        columns = {name: self._column(name) for name in _FROM_STORED}
        flags, pages, uses = self._column("flags"), self._column("page"), self._column("uses")
        for first in range(0, len(where), ROWS_AT_ONCE):  # a part fits into the processor's caches
            part, at = stored[first : first + ROWS_AT_ONCE], where[first : first + ROWS_AT_ONCE]
            for name, column in columns.items():
                column[at] = part[name]
            uses[at] = np.minimum(part["uses"], USES_COUNTED_MAX)
            pages[at] = part["offset"] // STAGING_ALIGNMENT_BYTES
            flags[at] = PRESENT | more_flags | shared[first : first + ROWS_AT_ONCE]
            for number in np.flatnonzero(part["mac_bytes"]).tolist():
                rows.set_mac(int(at[number]), part["mac"][number].tobytes())
        rows.blocks += len(where)
        for _, account, at in charged:
            for member, count in zip(*map(np.ndarray.tolist, np.unique(members[at], return_counts=True)), strict=True):
                self._eviction.count_present(member, account, count)
        return where

    def _cost_of(self, rows: Rows, uses: NDArray[np.uint16]) -> NDArray[np.float64] | float:
        """What so many uses of each row add to inflation; 0 where that is nothing for all."""
        rebuild_s, sizes = self._column("rebuild_s")[rows], self._column("size")[rows]
        if not (_alike(rebuild_s) and _alike(sizes)):
            return _cost(uses, rebuild_s, _extents(sizes))
        once = rebuild_cost(1, float(rebuild_s[0]), staging_bytes(int(sizes[0])))
        return np.maximum(np.minimum(uses, USES_MAX), 1) * once if once else 0.0

    def _link(self, rows: Rows, order: Rows | None = None) -> None:
        """Count new rows as children, queue those that are leaves, in this order (None: as they are), and note where
        all lie."""
        children, ticket, leaves = self._column("children"), self._column("ticket"), self._eviction.leaves
        above = self._column("parent")[rows]
        if leaves.items:
            parents = np.unique(above)
            leaves.got_children(int(((children[parents] == 0) & (ticket[parents] != 0)).sum()))
        if 4 * len(rows) < self._rows.high:
            np.add.at(children, above, 1)
        else:
            children[: self._rows.high] += np.bincount(above, minlength=self._rows.high).astype(np.uint32)
        queued = rows if order is None else rows[order]
        leaves.offer_many(queued[children[queued] == 0].tolist())
        self._places.add_many(rows)

    def _nodes(self, keys: Words, tenants: NDArray[np.uint32]) -> Rows:
        """The rows with these keys and tenants, made where there are none."""
        rows, nodes = self._rows, self._search(keys, tenants)
        missing = np.flatnonzero(nodes < 0)
        if not len(missing):
            return nodes
        words, numbers = keys[missing], tenants[missing]
        new, same = _distinct(words, numbers)
        if rows.high - rows.by_key.count >= len(new):
            made = np.array(rows.take_many(len(new)))
        else:
            made = np.arange(rows.take_range(len(new)), rows.high)
        self._column("keys").reshape(-1, 2)[made] = words[new]
        self._column("tenant")[made] = numbers[new]
        self._column("parent")[made] = -1
        for number, count in zip(*(one.tolist() for one in np.unique(numbers[new], return_counts=True)), strict=True):
            rows.tenant_number(rows.tenant_name(number), count)
        chain_many(rows.by_key, made, self._hashes(words[new]), self._key_hashes)
        nodes[missing] = made[same]
        return nodes

    # --- inside ---

    def _column(self, name: str) -> NDArray[Any]:
        return np.frombuffer(self._rows.columns[name].memory, _TYPES[name])

    def _hashes(self, words: Words) -> NDArray[np.uint64]:
        """`core.pool.columns.mixed` of many keys."""
        low, high = self._salts
        word = words[:, 0] * low + words[:, 1] * high
        hashes: NDArray[np.uint64] = ((word ^ word >> _SHIFT) * _FINISH) >> _HALF
        return hashes

    def _key_hashes(self, rows: Rows) -> NDArray[np.uint64]:
        return self._hashes(self._column("keys").reshape(-1, 2)[rows])

    def _search(self, words: Words, tenants: NDArray[np.uint32] | None) -> Rows:
        """The present row of each key, or, with `tenants`, the row of each key and tenant; -1 where there is none."""
        chains = self._rows.by_key
        rows = np.full(len(words), -1, np.int64)
        if not chains.count:
            return rows
        keys, flags, numbers = self._column("keys"), self._column("flags"), self._column("tenant")
        heads, links = views(chains)
        low, high = np.ascontiguousarray(words[:, 0]), np.ascontiguousarray(words[:, 1])
        link = heads.take(buckets(chains, self._hashes(words)))
        todo = link.nonzero()[0]
        link = link.take(todo)
        while len(todo) > FEW_LEFT:
            at = link.astype(np.int64) - 1
            same = keys.take(2 * at) == low.take(todo)
            same &= keys.take(2 * at + 1) == high.take(todo)
            same &= (flags.take(at) & PRESENT) > 0 if tenants is None else numbers.take(at) == tenants.take(todo)
            rows[todo[same]] = at[same]
            link = links.take(at)
            on = ((link > 0) & ~same).nonzero()[0]
            todo, link = todo.take(on), link.take(on)
        for number, first in zip(todo.tolist(), link.tolist(), strict=True):
            tenant = -1 if tenants is None else int(tenants[number])
            rows[number] = self._follow(first, int(low[number]), int(high[number]), tenant)
        return rows

    def _follow(self, link: int, low: int, high: int, tenant: int) -> int:
        """As `_search`, of one key, along the rest of its chain; `tenant` is -1 for a present row of any."""
        rows, links = self._rows, self._rows.by_key.next
        keys = rows.keys
        while link:
            row = link - 1
            fits = rows.flags[row] & PRESENT if tenant < 0 else rows.tenant[row] == tenant
            if fits and keys[2 * row] == low and keys[2 * row + 1] == high:
                return row
            link = links[row]
        return -1


def _alike(values: NDArray[Any]) -> bool:
    """Whether all values are the same; there is at least one."""
    data = values.tobytes()  # compared as bytes: faster than by numpy, for some dozens
    return data == data[: values.itemsize] * len(values)


def _distinct(words: Words, numbers: NDArray[np.uint32]) -> tuple[Rows, Rows]:
    """The first of each of some names, in order, and for each name which of these it is."""
    each = np.arange(len(words))
    low = np.sort(words[:, 0])
    if not (low[1:] == low[:-1]).any():
        return each, each
    order = np.lexsort((numbers, words[:, 1], words[:, 0]))
    first = np.ones(len(order), bool)
    first[1:] = (words[order][1:] != words[order][:-1]).any(1) | (numbers[order][1:] != numbers[order][:-1])
    by_place = np.argsort(order[first])
    rank, same = np.empty(len(by_place), np.int64), np.empty(len(order), np.int64)
    rank[by_place] = np.arange(len(by_place))
    same[order] = rank[np.cumsum(first) - 1]
    return order[first][by_place], same


def _by_tenant(stored: StoredRows, order: Rows) -> list[tuple[bytes, Rows]]:
    """Tenants and the numbers of their rows in this order, in the order of their last one."""
    tenant, length = stored["tenant"], stored["tenant_bytes"]
    if (tenant == tenant[0]).all() and (length == length[0]).all():
        return [(tenant_tag_of(int(tenant[0]), int(length[0])), order)]
    names = np.stack((tenant, length.astype(np.uint64)), 1)[order]
    distinct, number = np.unique(names, axis=0, return_inverse=True)
    by_name = np.argsort(number.reshape(-1), kind="stable")
    parts = np.split(by_name, np.flatnonzero(np.diff(number.reshape(-1)[by_name])) + 1)
    tags = [tenant_tag_of(*name) for name in distinct.tolist()]
    found = sorted(zip(tags, parts, strict=True), key=lambda one: int(one[1][-1]))
    return [(tag, order[part]) for tag, part in found]


def _extents(sizes: NDArray[np.uint32]) -> NDArray[np.int64]:
    """`staging_bytes` of many blocks."""
    return -(-sizes.astype(np.int64) // STAGING_ALIGNMENT_BYTES) * STAGING_ALIGNMENT_BYTES


def _cost(uses: NDArray[Any], rebuild_s: NDArray[Any], extents: NDArray[np.int64]) -> NDArray[np.float64]:
    """What `RebuildValue` adds to inflation, of many blocks."""
    each = np.minimum(rebuild_s.astype(np.float64) * 1e9 / extents, NS_PER_BYTE_MAX)
    known = (rebuild_s > 0) & np.isfinite(rebuild_s)
    return np.where(known, np.minimum(np.maximum(uses, 1), USES_MAX).astype(np.float64) * each, 0.0)
