"""Which blocks of the pool stay and which leave: worth, quotas, leaf before root, one order per member.

K1  A block that is pinned, or has a child of its own tenant in the pool, never leaves by itself.
K2  Of what a payer has on a member the least worth leaves (`RebuildValue`); worth is compared within a member.
K3  Whoever writes within its quota takes room from the payer that is most over its own, else from itself.
K4  Whoever writes over its quota takes room from itself, else from a payer further over than it, else not at all.
K5  A fenced member's leaf leaves before a block of the same payer that is worth more: it stands in the way of its
    ancestors elsewhere.

So a payer that is not over its quota loses blocks by its own writes only. A payer is a tenant with a quota, or all
without one together (`TenantQuotas.payer`); where nobody has a quota, the least worth leaves, whoever writes.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

from penstock.core.eviction import PrefixIndex, RebuildValue
from penstock.core.keys import BlockKey
from penstock.core.pool.quota import SHARED, TenantQuotas

FENCED_EVICTIONS_MAX = 64  # leaves of fenced members that one search for room lets go
STEPS = (0, 1)  # of a search for room: first those whom K3 and K4 name first, on any member, then the other ones


@dataclass(slots=True)
class _Kept:
    """A present block as the policy sees it."""

    member: int
    account: bytes
    size_bytes: int
    rebuild_s: float
    uses: int
    name: BlockKey


def _name(key: BlockKey, tenant: bytes) -> BlockKey:
    """What the order of leaves knows a block by: nobody makes a leaf of another tenant's into none, by a child."""
    return key + tenant + bytes((len(tenant),))


def _key(name: BlockKey) -> BlockKey:
    return name[: -1 - name[-1]]


class PoolEviction:
    """Present blocks by worth. Accounts are charged by the caller, which knows of blocks not yet or no longer present.

    I1  a key is kept in the group of its member and account, and each member's accounts are counted right
    """

    def __init__(self, members: int, quotas: TenantQuotas) -> None:
        self.quotas = quotas
        self._index: PrefixIndex[BlockKey] = PrefixIndex(family_of=self._family)
        self._kept: dict[BlockKey, _Kept] = {}
        self._worth = [RebuildValue() for _ in range(members)]
        self._uses = 0  # of all members
        self._seen = [0] * members  # uses that each member's worth has aged by
        self._accounts: list[dict[bytes, int]] = [{} for _ in range(members)]
        self._fenced: set[int] = set()
        quotas.on_payer_changed = self._payer_changed

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, key: BlockKey) -> bool:
        return key in self._kept

    @property
    def groups(self) -> int:
        """How many orders of leaves are kept: at most those of accounts with blocks, and of blocks that left lately."""
        return self._index.groups

    def value(self, key: BlockKey) -> float:
        """What the block is worth, in its member's terms; for a durable table."""
        return self._index.last_use(self._kept[key].name)

    def uses(self, key: BlockKey) -> int:
        """How often the block was used."""
        return self._kept[key].uses

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
        """Keep a block that became present; `value` is its worth from a durable table, None for a new one; `tenant`
        whose it is (None: that of its account)."""
        if value is None:
            value = self._used(member, uses, rebuild_s, size_bytes)
        else:
            value = self._worth[member].restored(value, uses, rebuild_s, size_bytes)
        tenant = account if tenant is None else tenant
        name = _name(key, tenant)
        self._index.add(name, _name(parent, tenant), value, (member, account))
        self._kept[key] = _Kept(member, account, size_bytes, rebuild_s, uses, name)
        self._count(member, account, 1)

    def touch(self, key: BlockKey) -> float:
        """Note a use; returns the new worth."""
        kept = self._kept[key]
        kept.uses += 1
        value = self._used(kept.member, kept.uses, kept.rebuild_s, kept.size_bytes)
        self._index.touch(kept.name, value)
        return value

    def pin(self, key: BlockKey) -> None:
        """Hold a block: it does not leave until every `pin` was undone."""
        self._index.pin(self._kept[key].name)

    def unpin(self, key: BlockKey) -> None:
        """Undo one `pin`."""
        self._index.unpin(self._kept[key].name)

    def remove(self, key: BlockKey) -> None:
        """A block is no longer present. Raises ValueError when it is pinned."""
        self._index.remove(self._kept[key].name)
        self._forget(key)

    def move(self, key: BlockKey, member: int) -> None:
        """A block lies on another member now; it is worth there what it was here."""
        kept = self._kept[key]
        above = self.value(key) - self._aged(kept.member).inflation
        self._count(kept.member, kept.account, -1)
        self._count(member, kept.account, 1)
        kept.member = member
        self._index.regroup(kept.name, (member, kept.account), self._aged(member).inflation + above)

    def set_account(self, key: BlockKey, account: bytes) -> None:
        """A block counts against another account; the caller charges it."""
        kept = self._kept[key]
        self._count(kept.member, kept.account, -1)
        kept.account = account
        self._count(kept.member, account, 1)
        self._index.regroup(kept.name, (kept.member, account), self.value(key))

    def may_displace(self, key: BlockKey, writer: bytes, more_bytes: int) -> bool:
        """Whether a write of `more_bytes` to the account `writer` may push out this unpinned block (K3, K4)."""
        return self.may_displace_all((key,), writer, more_bytes)

    def may_displace_all(self, keys: Iterable[BlockKey], writer: bytes, more_bytes: int) -> bool:
        """As `may_displace`, for several blocks one after the other: no payer loses more than what it is over its quota
        by, but for the rest of the last block."""
        own, floor = self.quotas.payer(writer), max(0.0, self.quotas.excess_bytes(writer, more_bytes))
        lost: dict[bytes, int] = {}
        for kept in (self._kept[key] for key in keys):
            payer = self.quotas.payer(kept.account)
            if payer != own and self.quotas.excess_bytes(payer) - lost.get(payer, 0) <= floor:
                return False
            lost[payer] = lost.get(payer, 0) + kept.size_bytes
        return True

    def may_gain(self, writer: bytes, charged_bytes: int) -> bool:
        """Whether there is any payer whose blocks may leave for a write that the account `writer` is charged with."""
        own, floor = self.quotas.payer(writer), max(0.0, self.quotas.excess_bytes(writer))
        return (
            self.quotas.paid_bytes(own) > charged_bytes
            or self.quotas.most_over(lambda one: one != own, floor) is not None
        )

    def evict(self, member: int, writer: bytes, more_bytes: int, steps: Sequence[int] = STEPS) -> list[BlockKey]:
        """Take out the block that leaves `member` for a write of `more_bytes` to the account `writer`, after any leaves
        of fenced members that had to go first (K5). Empty when none may leave in these `steps`; the caller tries the
        first step on all members before the second."""
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
        """Assert I1 and those of the parts; O(n)."""
        self._index.check_integrity()
        self.quotas.check_integrity()
        assert {_key(name) for name in self._index} == set(self._kept) and len(self._index) == len(self._kept)
        counted: list[dict[bytes, int]] = [{} for _ in self._accounts]
        for key, kept in self._kept.items():
            assert self._index.group(kept.name) == (kept.member, kept.account), f"I1: {key.hex()} is in another group"
            counted[kept.member][kept.account] = counted[kept.member].get(kept.account, 0) + 1
        assert counted == self._accounts, "I1: accounts of members are miscounted"

    def _aged(self, member: int) -> RebuildValue:
        """Worth on a member, aged by the uses that happened on others."""
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
        """What a payer gives up on a member, after leaves on fenced ones (K5), while it is over by `over_bytes`."""
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
        """Accounts that pay together are a family on each member; the others are not."""
        assert isinstance(group, tuple)
        return group[0] if self.quotas.payer(group[1]) == SHARED else None

    def _payer_changed(self, account: bytes) -> None:
        for member, accounts in enumerate(self._accounts):
            if account in accounts:
                self._index.refamily((member, account))

    def _least(self, member: int, payer: bytes) -> tuple[int, bytes] | None:
        """The group of a payer on a member whose candidate is worth least; its own one where it pays for itself."""
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
        size_bytes = self._kept[key].size_bytes
        self._forget(key)
        return key, size_bytes

    def _forget(self, key: BlockKey) -> None:
        kept = self._kept.pop(key)
        self._count(kept.member, kept.account, -1)

    def _count(self, member: int, account: bytes, change: int) -> None:
        counts = self._accounts[member]
        counts[account] = counts.get(account, 0) + change
        if not counts[account]:
            del counts[account]
