"""Which blocks of the pool are evicted: by worth, quotas, leaf before root, one order per member.

EVICT-1  A block that is pinned, or has a child of its own tenant in the pool, is never evicted.
EVICT-2  Of a payer's blocks on a member the one of least worth leaves (`RebuildValue`). Worth is compared only within a
         member.
EVICT-3  A writer within its quota takes room from the payer most over its own quota, else from itself.
EVICT-4  A writer over its quota takes room from itself, else from a payer further over its quota, else from none.
EVICT-5  A leaf on a fenced member leaves before a block of the same payer with more worth: it blocks the eviction of
         its ancestors on other members.
Verification: tests/core/pool/test_pool_eviction.py.

So a payer within its quota loses blocks only by its own writes. A payer is a tenant with a quota, or all tenants
without one together (`TenantQuotas.payer`). Without any quota the block of least worth leaves, for any writer.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

from penstock.core.eviction import PrefixIndex, RebuildValue
from penstock.core.keys import BlockKey
from penstock.core.pool.quota import SHARED, TenantQuotas

FENCED_EVICTIONS_MAX = 64  # leaves on fenced members that one search for room may evict
STEPS = (0, 1)  # of a search for room: first the first choice of EVICT-3 or EVICT-4 on any member, then the other


@dataclass(slots=True)
class _Present:
    """A block that is present in the pool."""

    member: int
    account: bytes
    size_bytes: int
    rebuild_s: float
    uses: int
    name: BlockKey


def _name(key: BlockKey, tenant: bytes) -> BlockKey:
    """The name of a block in the index. It has the tenant, so that a child protects only blocks of its own tenant."""
    return key + tenant + bytes((len(tenant),))


def _key(name: BlockKey) -> BlockKey:
    return name[: -1 - name[-1]]


class PoolEviction:
    """Present blocks by worth. The caller charges accounts, also for blocks not yet or no longer present.

    EVICT-6  A key is in the group of its member and account; the accounts of each member are counted right.
    """

    def __init__(self, members: int, quotas: TenantQuotas) -> None:
        self.quotas = quotas
        self._index: PrefixIndex[BlockKey] = PrefixIndex(family_of=self._family)
        self._present: dict[BlockKey, _Present] = {}
        self._worth = [RebuildValue() for _ in range(members)]
        self._uses = 0  # of all members
        self._seen = [0] * members  # uses that each member's worth has aged by
        self._accounts: list[dict[bytes, int]] = [{} for _ in range(members)]
        self._fenced: set[int] = set()
        quotas.on_payer_changed = self._payer_changed

    def __len__(self) -> int:
        return len(self._present)

    def __contains__(self, key: BlockKey) -> bool:
        return key in self._present

    @property
    def groups(self) -> int:
        """How many groups have a heap: those of accounts with blocks, and of blocks evicted lately."""
        return self._index.groups

    def value(self, key: BlockKey) -> float:
        """What the block is worth, in its member's terms; for a durable table."""
        return self._index.last_use(self._present[key].name)

    def uses(self, key: BlockKey) -> int:
        """How often the block was used."""
        return self._present[key].uses

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
    ) -> None:
        """A block became present. `value`: its worth from a durable table, None for a new one. `tenant`: its owner,
        None for that of its account."""
        if value is None:
            value = self._used(member, uses, rebuild_s, size_bytes)
        else:
            value = self._worth[member].restored(value, uses, rebuild_s, size_bytes)
        tenant = account if tenant is None else tenant
        name = _name(key, tenant)
        self._index.add(name, _name(parent, tenant), value, (member, account))
        self._present[key] = _Present(member, account, size_bytes, rebuild_s, uses, name)
        self._count(member, account, 1)

    def touch(self, key: BlockKey) -> float:
        """Note a use; returns the new worth."""
        block = self._present[key]
        block.uses += 1
        value = self._used(block.member, block.uses, block.rebuild_s, block.size_bytes)
        self._index.touch(block.name, value)
        return value

    def pin(self, key: BlockKey) -> None:
        """Protect a block from eviction until every `pin` was undone."""
        self._index.pin(self._present[key].name)

    def unpin(self, key: BlockKey) -> None:
        """Undo one `pin`."""
        self._index.unpin(self._present[key].name)

    def remove(self, key: BlockKey) -> None:
        """A block is no longer present. Raises ValueError when it is pinned."""
        self._index.remove(self._present[key].name)
        self._forget(key)

    def move(self, key: BlockKey, member: int) -> None:
        """A block is on another member now, with the same worth over inflation."""
        block = self._present[key]
        above = self.value(key) - self._aged(block.member).inflation
        self._count(block.member, block.account, -1)
        self._count(member, block.account, 1)
        block.member = member
        self._index.regroup(block.name, (member, block.account), self._aged(member).inflation + above)

    def set_account(self, key: BlockKey, account: bytes) -> None:
        """A block belongs to another account, which the caller charges."""
        block = self._present[key]
        self._count(block.member, block.account, -1)
        block.account = account
        self._count(block.member, account, 1)
        self._index.regroup(block.name, (block.member, account), self.value(key))

    def may_displace(self, key: BlockKey, writer: bytes, more_bytes: int) -> bool:
        """Whether a write of `more_bytes` to the account `writer` may evict this unpinned block (EVICT-3, EVICT-4)."""
        return self.may_displace_all((key,), writer, more_bytes)

    def may_displace_all(self, keys: Iterable[BlockKey], writer: bytes, more_bytes: int) -> bool:
        """As `may_displace`, for several blocks in turn: no payer loses more than its excess over the quota, rounded up
        to a block."""
        own, floor = self.quotas.payer(writer), max(0.0, self.quotas.excess_bytes(writer, more_bytes))
        lost: dict[bytes, int] = {}
        for block in (self._present[key] for key in keys):
            payer = self.quotas.payer(block.account)
            if payer != own and self.quotas.excess_bytes(payer) - lost.get(payer, 0) <= floor:
                return False
            lost[payer] = lost.get(payer, 0) + block.size_bytes
        return True

    def may_gain(self, writer: bytes, charged_bytes: int) -> bool:
        """Whether any payer's blocks may be evicted for a write that is charged to the account `writer`."""
        own, floor = self.quotas.payer(writer), max(0.0, self.quotas.excess_bytes(writer))
        return (
            self.quotas.paid_bytes(own) > charged_bytes
            or self.quotas.most_over(lambda one: one != own, floor) is not None
        )

    def evict(self, member: int, writer: bytes, more_bytes: int, steps: Sequence[int] = STEPS) -> list[BlockKey]:
        """Take out the block that leaves `member` for a write of `more_bytes` to the account `writer`, after any leaves
        of fenced members that had to go first (EVICT-5). Empty when none may leave in these `steps`; the caller tries
        the first step on all members before the second."""
        own, excess = self.quotas.payer(writer), self.quotas.excess_bytes(writer, more_bytes)
        for step in steps:
            if (step == 0) == (excess > 0):
                gone = self._evict_of(own, member, math.inf)
            else:
                floor = max(0.0, excess)
                payer = self.quotas.most_over(lambda one: one != own and self._has_leaf(member, one), floor)
                gone = [] if payer is None else self._evict_of(payer, member, self.quotas.excess_bytes(payer) - floor)
            if gone:
                return gone
        return []

    def check_integrity(self) -> None:
        """Assert EVICT-6 and those of the parts; O(n)."""
        self._index.check_integrity()
        self.quotas.check_integrity()
        assert {_key(name) for name in self._index} == set(self._present) and len(self._index) == len(self._present)
        counted: list[dict[bytes, int]] = [{} for _ in self._accounts]
        for key, block in self._present.items():
            assert self._index.group(block.name) == (block.member, block.account), f"EVICT-6: group of {key.hex()}"
            counted[block.member][block.account] = counted[block.member].get(block.account, 0) + 1
        assert counted == self._accounts, "EVICT-6: accounts of members are miscounted"

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

    def _evict_of(self, payer: bytes, member: int, over_bytes: float) -> list[BlockKey]:
        """Evict a payer's block from a member, after leaves on fenced ones (EVICT-5), at most `over_bytes` of them."""
        gone: list[BlockKey] = []
        while over_bytes > 0:
            group = self._least(member, payer)
            fenced = self._least_fenced(payer) if len(gone) < FENCED_EVICTIONS_MAX else None
            first = fenced is not None and (group is None or self._above(fenced) < self._above(group))
            leaves = fenced if first else group
            if leaves is None:
                break
            key, size_bytes = self._evict_from(leaves)
            gone.append(key)
            if not first:
                break
            over_bytes -= size_bytes
        return gone

    def _has_leaf(self, member: int, payer: bytes) -> bool:
        return self._least(member, payer) is not None or self._least_fenced(payer) is not None

    def _family(self, group: Hashable) -> Hashable:
        """Accounts that pay together are one family on each member; others have none."""
        assert isinstance(group, tuple)
        return group[0] if self.quotas.payer(group[1]) == SHARED else None

    def _payer_changed(self, account: bytes) -> None:
        for member, accounts in enumerate(self._accounts):
            if account in accounts:
                self._index.refamily((member, account))

    def _least(self, member: int, payer: bytes) -> tuple[int, bytes] | None:
        """Of a payer's groups on a member the one whose candidate has the least worth."""
        if payer != SHARED:
            own = (member, payer)
            return own if payer in self._accounts[member] and self._index.next_use(own) is not None else None
        group = self._index.least_group(member)
        assert group is None or isinstance(group, tuple)
        return group

    def _least_fenced(self, payer: bytes) -> tuple[int, bytes] | None:
        groups = [group for member in self._fenced if (group := self._least(member, payer)) is not None]
        return min(groups, key=self._above, default=None)

    def _above(self, group: tuple[int, bytes]) -> float:
        """Worth of a group's next candidate over its member's inflation: comparable between members."""
        use = self._index.next_use(group)
        assert use is not None
        return use - self._aged(group[0]).inflation

    def _evict_from(self, group: tuple[int, bytes]) -> tuple[BlockKey, int]:
        """The block that left, and its bytes."""
        value = self._index.next_use(group)
        name = self._index.evict_one(group)
        assert name is not None and value is not None
        self._worth[group[0]].evicted(value)
        key = _key(name)
        size_bytes = self._present[key].size_bytes
        self._forget(key)
        return key, size_bytes

    def _forget(self, key: BlockKey) -> None:
        block = self._present.pop(key)
        self._count(block.member, block.account, -1)

    def _count(self, member: int, account: bytes, change: int) -> None:
        counts = self._accounts[member]
        counts[account] = counts.get(account, 0) + change
        if not counts[account]:
            del counts[account]
