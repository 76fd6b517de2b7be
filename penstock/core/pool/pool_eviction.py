"""Which blocks of the pool are evicted: by worth, quotas, leaf before root, one order per member.

EVICT-1  A block that is pinned, or has a child of its own tenant in the pool, is never evicted.
EVICT-2  Of a payer's blocks on a member the one of least worth leaves (`RebuildValue`). Worth is compared only within a
         member.
EVICT-3  A writer within its quota takes room from the payer most over its own quota, else from itself.
EVICT-4  A writer over its quota takes room from itself, else from a payer further over its quota, else from none.
EVICT-5  A leaf on a fenced member leaves before a block of the same payer with more worth: it blocks the eviction of
         its ancestors on other members.
EVICT-6  For an original, a copy (`core.pool.copies`) leaves before a block of the member that is worth more.
Verification: tests/core/pool/test_pool_eviction.py.

So a payer within its quota loses blocks only by its own writes, and copies that are worth less than what would leave. A
payer is a tenant with a quota, all copies together, or all tenants without a quota together (`TenantQuotas.payer`).
Without any quota the block of least worth leaves, for any writer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from penstock.core.eviction import RebuildValue
from penstock.core.keys import BlockKey
from penstock.core.pool.block_rows import PAID_SHARED, PINNED, PRESENT, USES_COUNTED_MAX, BlockRows
from penstock.core.pool.columns import WORD
from penstock.core.pool.copies import COPIES
from penstock.core.pool.leaf_queues import Group, LeafQueues
from penstock.core.pool.quota import SHARED, TenantQuotas

FENCED_EVICTIONS_MAX = 64  # leaves on fenced members that one search for room may evict
STEPS = (0, 1)  # of a search for room: first the first choice of EVICT-3 or EVICT-4 on any member, then the other


class PoolEviction:
    """Present blocks by worth, as rows. The caller charges accounts, also for blocks not yet or no longer present.

    EVICT-7  The accounts of each member are counted right.
    """

    def __init__(self, members: int, quotas: TenantQuotas, unit_bytes: int, salt: int) -> None:
        """`unit_bytes` and `salt` as `BlockRows`."""
        self.quotas = quotas
        self.rows = BlockRows(unit_bytes, salt)
        self.leaves = LeafQueues(self.rows, self._family)
        self._worth = [RebuildValue() for _ in range(members)]
        self._uses = 0  # of all members
        self._seen = [0] * members  # uses that each member's worth has aged by
        self._accounts: list[dict[bytes, int]] = [{} for _ in range(members)]
        self._fenced: set[int] = set()
        quotas.on_payer_changed = self._payer_changed

    def __len__(self) -> int:
        return self.rows.blocks

    @property
    def groups(self) -> int:
        """How many groups have a heap: those of accounts with blocks, and of blocks evicted lately."""
        return self.leaves.groups

    def add_member(self) -> None:
        """Count one more member; its number is the next one."""
        self._worth.append(RebuildValue())
        self._seen.append(self._uses)
        self._accounts.append({})

    def set_fenced(self, member: int, fenced: bool) -> None:
        """Note that a member is fenced, or no longer."""
        (self._fenced.add if fenced else self._fenced.discard)(member)

    def add(
        self,
        key: BlockKey,
        parent: BlockKey,
        member: int,
        account: bytes,
        size_bytes: int,
        rebuild_s: float,
        uses: int = 1,
        value: float | None = None,
        tenant: bytes | None = None,
    ) -> int:
        """A block became present; returns its row. `value`: its worth from a durable table, None for a new one.
        `tenant`: its owner, None for that of its account. A child protects only blocks of its own tenant. Raises
        ValueError when the block is its own parent."""
        if key == parent:
            raise ValueError(f"key {key!r} is given as its own parent")
        rows, tenant = self.rows, account if tenant is None else tenant
        row = rows.node(key, tenant)
        rows.flags[row] = PRESENT if account == tenant else PRESENT | PAID_SHARED
        rows.blocks += 1
        rows.member[row], rows.size[row], rows.rebuild_s[row] = member, size_bytes, rebuild_s
        rows.uses[row] = min(uses, USES_COUNTED_MAX)
        extent, rebuild_s = rows.extent_bytes(row), rows.rebuild_s[row]
        if value is None:
            rows.worth[row] = self._used(member, uses, rebuild_s, extent)
        else:
            rows.worth[row] = max(0.0, self._worth[member].restored(value, uses, rebuild_s, extent))
        above = rows.node(parent, tenant)
        rows.parent[row] = above
        rows.children[above] += 1
        if rows.children[above] == 1:
            self.leaves.got_child(above)
        self._count(member, account, 1)
        self.leaves.offer(row)
        return row

    def touch(self, row: int) -> float:
        """Note a use; returns the new worth."""
        rows = self.rows
        uses = min(rows.uses[row] + 1, USES_COUNTED_MAX)
        rows.uses[row] = uses
        value = self._used(rows.member[row], uses, rows.rebuild_s[row], rows.extent_bytes(row))
        rows.worth[row] = value = max(value, rows.worth[row])
        return value

    def use_many(self, count: int) -> list[float]:
        """Count so many uses; returns the inflation of each member before them. The n-th of them is worth that of its
        member, n ticks, and the cost of its block (`RebuildValue`)."""
        before = [self._aged(member).inflation for member in range(len(self._worth))]
        self._uses += count
        return before

    def raise_inflation(self, member: int, inflation: float) -> None:
        """Later uses on a member are worth no less than this."""
        self._worth[member].evicted(inflation)

    def count_present(self, member: int, account: bytes, blocks: int) -> None:
        """So many blocks of an account became present on a member; the caller made their rows."""
        self._count(member, account, blocks)

    def pin(self, row: int) -> None:
        """Protect a block from eviction until `unpin`."""
        self.rows.flags[row] |= PINNED

    def unpin(self, row: int) -> None:
        """Undo `pin`."""
        self.rows.flags[row] &= ~PINNED
        self.leaves.offer(row)

    def leave(self, row: int) -> None:
        """A block is no longer present. The caller reads what it needs of the row, then calls `rows.release`."""
        rows = self.rows
        self._count(rows.member[row], rows.account(row), -1)
        self.leaves.forget(row)
        rows.flags[row] &= ~PRESENT
        rows.blocks -= 1
        above = rows.parent[row]
        rows.children[above] -= 1
        if not rows.children[above]:
            if rows.flags[above] & PRESENT:
                self.leaves.lost_children(above)
            else:
                rows.release(above)

    def move(self, row: int, member: int) -> None:
        """A block is on another member now, with the same worth over inflation."""
        rows = self.rows
        before, account = rows.member[row], rows.account(row)
        above = rows.worth[row] - self._aged(before).inflation
        self.leaves.forget(row)
        self._count(before, account, -1)
        self._count(member, account, 1)
        rows.member[row] = member
        rows.worth[row] = max(0.0, self._aged(member).inflation + above)
        self.leaves.offer(row)

    def charge_shared(self, row: int, shared: bool) -> None:
        """A block is charged to its tenant's own account from now on, or to the shared one; the caller charges them."""
        rows = self.rows
        member = rows.member[row]
        self.leaves.forget(row)
        self._count(member, rows.account(row), -1)
        rows.flags[row] = rows.flags[row] | PAID_SHARED if shared else rows.flags[row] & ~PAID_SHARED
        self._count(member, rows.account(row), 1)
        self.leaves.offer(row)

    def may_displace(self, row: int, writer: bytes, more_bytes: int) -> bool:
        """Whether a write of `more_bytes` to the account `writer` may evict this unpinned block (EVICT-3, EVICT-4)."""
        return self.may_displace_all((row,), writer, more_bytes)

    def may_displace_all(self, blocks: Iterable[int], writer: bytes, more_bytes: int) -> bool:
        """As `may_displace`, for several blocks in turn: no payer loses more than its excess over the quota, rounded up
        to a block."""
        own, floor = self.quotas.payer(writer), max(0.0, self.quotas.excess_bytes(writer, more_bytes))
        lost: dict[bytes, int] = {}
        for row in blocks:
            payer = self.quotas.payer(self.rows.account(row))
            if payer != own and self.quotas.excess_bytes(payer) - lost.get(payer, 0) <= floor:
                return False
            lost[payer] = lost.get(payer, 0) + self.rows.extent_bytes(row)
        return True

    def may_gain(self, writer: bytes, charged_bytes: int) -> bool:
        """Whether any payer's blocks may be evicted for a write that is charged to the account `writer`."""
        own, floor = self.quotas.payer(writer), max(0.0, self.quotas.excess_bytes(writer))
        return (
            self.quotas.paid_bytes(own) > charged_bytes
            or self.quotas.most_over(lambda one: one != own, floor) is not None
        )

    def evict(self, member: int, writer: bytes, more_bytes: int, steps: Sequence[int] = STEPS) -> list[int]:
        """Take out the block that leaves `member` for a write of `more_bytes` to the account `writer`, after any leaves
        of fenced members that had to go first (EVICT-5). Empty when none may leave in these `steps`; the caller tries
        the first step on all members before the second, and calls `rows.release` for each row."""
        own, excess = self.quotas.payer(writer), self.quotas.excess_bytes(writer, more_bytes)
        for step in steps:
            if (step == 0) == (excess > 0) and own == COPIES:
                group = (member, self.quotas.copies.loser(writer, 0) or b"")
                gone = [self._evict_from(group)] if self.leaves.least(group) >= 0 else []
            elif (step == 0) == (excess > 0):
                gone = self._evict_of(own, member, math.inf, self._copy_first(own, own, member))
            else:
                floor = max(0.0, excess)
                payer = self.quotas.most_over(lambda one: one != own and self._has_leaf(member, one), floor)
                over = 0.0 if payer is None else self.quotas.excess_bytes(payer) - floor
                gone = (
                    [] if payer is None else self._evict_of(payer, member, over, self._copy_first(own, payer, member))
                )
            if gone:
                return gone
        return []

    def evict_copy(self, account: bytes) -> int:
        """Take out the copy of least worth of an account of copies, on any member; -1 when none may leave. The caller
        calls `rows.release`."""
        held = [number for number, accounts in enumerate(self._accounts) if account in accounts]
        groups = [(number, account) for number in held if self.leaves.least((number, account)) >= 0]
        return self._evict_from(min(groups, key=self._above)) if groups else -1

    def evict_in_turn(self, members: Sequence[int]) -> list[int]:
        """As `evict` of one block from each of these members in turn, where nobody has a quota and no member is fenced;
        ends where none may leave. The end of a prefix leaves as a whole as far as its blocks are worth least: an
        ancestor that is the next one to leave is not queued."""
        gone: list[int] = []
        if self._fenced:
            return gone
        counts: dict[Group, int] = {}
        tops: dict[int, int] = {}  # by member: the bits of the least worth queued, or less
        rows, leaves, ancestor = self.rows, self.leaves, -1
        for member in members:
            if ancestor >= 0:
                next_one = rows.member[ancestor] == member and rows.worth_bits[ancestor] <= self._top(member, tops)
                if not next_one:
                    self._offer(ancestor, tops)
                    ancestor = -1
            if ancestor < 0:
                group = leaves.least_group(member)
                if group is None:
                    break
                ancestor = leaves.pop(group)
            gone.append(ancestor)
            ancestor = self._leave_alone(ancestor, counts, tops)
        if ancestor >= 0:
            self._offer(ancestor, tops)
        rows.blocks -= len(gone)
        for (member, account), count in counts.items():
            self._count(member, account, -count)
        return gone

    def _leave_alone(self, row: int, counts: dict[Group, int], tops: dict[int, int]) -> int:
        """Evict a leaf that is not queued, without counting it; returns the block before it if that is a leaf now which
        is to be queued, else -1."""
        rows = self.rows
        group = (rows.member[row], rows.account(row))
        counts[group] = counts.get(group, 0) + 1
        self._worth[group[0]].evicted(rows.worth[row])
        rows.flags[row] &= ~PRESENT
        above = rows.parent[row]
        left = rows.children[above] = rows.children[above] - 1
        if left:
            return -1
        if not rows.flags[above] & PRESENT:
            rows.release(above)
            return -1
        if rows.ticket[above] or rows.flags[above] & PINNED:
            tops.pop(rows.member[above], None)
            self.leaves.lost_children(above)
            return -1
        return int(above)

    def _top(self, member: int, tops: dict[int, int]) -> int:
        if member not in tops:
            group = self.leaves.least_group(member)
            tops[member] = WORD if group is None else self.rows.worth_bits[self.leaves.least(group)]
        return tops[member]

    def _offer(self, row: int, tops: dict[int, int]) -> None:
        """Queue a leaf."""
        member = self.rows.member[row]
        tops[member] = min(self._top(member, tops), self.rows.worth_bits[row])
        self.leaves.offer(row)

    def check_integrity(self) -> None:
        """Assert EVICT-7 and those of the parts; O(n)."""
        rows = self.rows
        rows.check_integrity()
        self.leaves.check_integrity()
        self.quotas.check_integrity()
        counted: list[dict[bytes, int]] = [{} for _ in self._accounts]
        for row in range(rows.high):
            if rows.flags[row] & PRESENT:
                accounts = counted[rows.member[row]]
                accounts[rows.account(row)] = accounts.get(rows.account(row), 0) + 1
        assert counted == self._accounts, "EVICT-7: accounts of members are miscounted"

    def _aged(self, member: int) -> RebuildValue:
        """Worth on a member, aged by the uses on other members."""
        worth = self._worth[member]
        worth.passed(self._uses - self._seen[member])
        self._seen[member] = self._uses
        return worth

    def _used(self, member: int, uses: int, rebuild_s: float, size_bytes: int) -> float:
        value = self._aged(member).used(uses, rebuild_s, size_bytes)
        self._uses += 1
        self._seen[member] = self._uses
        return value

    def _evict_of(self, payer: bytes, member: int, over_bytes: float, copies: Group | None) -> list[int]:
        """Evict a payer's block from a member, after leaves on fenced ones (EVICT-5), at most `over_bytes` of them; or
        instead a copy, of the group that goes first."""
        if copies is not None:
            return [self._evict_from(copies)]
        gone: list[int] = []
        while over_bytes > 0:
            group = self._least(member, payer)
            fenced = self._least_fenced(payer) if len(gone) < FENCED_EVICTIONS_MAX else None
            first = fenced is not None and (group is None or self._above(fenced) < self._above(group))
            leaves = fenced if first else group
            if leaves is None:
                break
            row = self._evict_from(leaves)
            gone.append(row)
            if not first:
                break
            over_bytes -= self.rows.extent_bytes(row)
        return gone

    def _has_leaf(self, member: int, payer: bytes) -> bool:
        return self._least(member, payer) is not None or self._least_fenced(payer) is not None

    def _family(self, group: Group) -> int | None:
        """Accounts that pay together are one family on each member, copies another one; others have none."""
        payer = self.quotas.payer(group[1])
        return group[0] if payer == SHARED else ~group[0] if payer == COPIES else None

    def _payer_changed(self, account: bytes) -> None:
        for member, accounts in enumerate(self._accounts):
            if account in accounts:
                self.leaves.refamily((member, account))

    def _least(self, member: int, payer: bytes) -> Group | None:
        """Of a payer's groups on a member the one whose candidate has the least worth."""
        if payer in (SHARED, COPIES):
            return self.leaves.least_group(member if payer == SHARED else ~member)
        own = (member, payer)
        return own if payer in self._accounts[member] and self.leaves.least(own) >= 0 else None

    def _copy_first(self, writer: bytes, payer: bytes, member: int) -> Group | None:
        """The copies on a member of which one leaves for a writer before the payer's next block (EVICT-6), if any."""
        if COPIES in (writer, payer) or not self.quotas.copies.held_bytes:
            return None
        copies, own = self._least(member, COPIES), self._least(member, payer)
        worth, least = self.rows.worth, self.leaves.least
        return copies if copies and own and worth[least(copies)] < worth[least(own)] else None

    def _least_fenced(self, payer: bytes) -> Group | None:
        groups = [group for member in self._fenced if (group := self._least(member, payer)) is not None]
        return min(groups, key=self._above, default=None)

    def _above(self, group: Group) -> float:
        """Worth of a group's next candidate over its member's inflation: comparable between members."""
        return float(self.rows.worth[self.leaves.least(group)] - self._aged(group[0]).inflation)

    def _evict_from(self, group: Group) -> int:
        """The row of the block that left."""
        row = self.leaves.pop(group)
        self._worth[group[0]].evicted(self.rows.worth[row])
        self.leave(row)
        return row

    def _count(self, member: int, account: bytes, change: int) -> None:
        counts = self._accounts[member]
        counts[account] = counts.get(account, 0) + change
        if not counts[account]:
            del counts[account]
