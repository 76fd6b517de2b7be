"""Which blocks of the pool stay and which leave: worth, quotas, leaf before root, one order per member.

K1  A block that is pinned, or has a child in the pool, never leaves by itself.
K2  Of a member's blocks the least worth leaves (`RebuildValue`); worth is compared within a member.
K3  Whoever writes within its quota takes room from the tenant that is most over its own, else by K2.
K4  Whoever writes over its quota takes room from itself, else from a tenant further over than it, else not at all.
K5  A fenced member's leaf leaves before a block that is worth more: it stands in the way of its ancestors elsewhere.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from penstock.core.eviction import PrefixIndex, RebuildValue
from penstock.core.keys import BlockKey
from penstock.core.pool.quota import TenantQuotas

FENCED_EVICTIONS_MAX = 64  # leaves of fenced members that one search for room lets go


@dataclass(slots=True)
class _Kept:
    """A present block as the policy sees it."""

    member: int
    account: bytes
    size_bytes: int
    rebuild_s: float
    uses: int


def _member_of(group: Hashable) -> int:
    assert isinstance(group, tuple)
    return int(group[0])


class Keeping:
    """Present blocks by worth. Accounts are charged by the caller, which knows of blocks not yet or no longer present.

    I1  a key is kept in the group of its member and account, and each member's accounts are counted right
    """

    def __init__(self, members: int, quotas: TenantQuotas) -> None:
        self.quotas = quotas
        self._index: PrefixIndex[BlockKey] = PrefixIndex(family_of=_member_of)
        self._kept: dict[BlockKey, _Kept] = {}
        self._worth = [RebuildValue() for _ in range(members)]
        self._uses = 0  # of all members
        self._seen = [0] * members  # uses that each member's worth has aged by
        self._accounts: list[dict[bytes, int]] = [{} for _ in range(members)]
        self._fenced: set[int] = set()

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, key: BlockKey) -> bool:
        return key in self._kept

    def value(self, key: BlockKey) -> float:
        """What the block is worth, in its member's terms; for a durable table."""
        return self._index.last_use(key)

    def uses(self, key: BlockKey) -> int:
        return self._kept[key].uses

    def add_member(self) -> None:
        self._worth.append(RebuildValue())
        self._seen.append(self._uses)
        self._accounts.append({})

    def set_fenced(self, member: int, fenced: bool) -> None:
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
    ) -> None:
        """Keep a block that became present; `value` is its worth from a durable table, None for a new one."""
        if value is None:
            value = self._used(member, uses, rebuild_s, size_bytes)
        else:
            value = self._worth[member].restored(value, uses, rebuild_s, size_bytes)
        self._index.add(key, parent, value, (member, account))
        self._kept[key] = _Kept(member, account, size_bytes, rebuild_s, uses)
        self._count(member, account, 1)

    def touch(self, key: BlockKey) -> float:
        """Note a use; returns the new worth."""
        kept = self._kept[key]
        kept.uses += 1
        value = self._used(kept.member, kept.uses, kept.rebuild_s, kept.size_bytes)
        self._index.touch(key, value)
        return value

    def pin(self, key: BlockKey) -> None:
        self._index.pin(key)

    def unpin(self, key: BlockKey) -> None:
        self._index.unpin(key)

    def pinned(self, key: BlockKey) -> bool:
        return self._index.pins(key) > 0

    def remove(self, key: BlockKey) -> None:
        """A block is no longer present. Raises ValueError when it is pinned."""
        self._index.remove(key)
        self._forget(key)

    def move(self, key: BlockKey, member: int) -> None:
        """A block lies on another member now; it is worth there what it was here."""
        kept = self._kept[key]
        above = self._index.last_use(key) - self._aged(kept.member).inflation
        self._count(kept.member, kept.account, -1)
        self._count(member, kept.account, 1)
        kept.member = member
        self._index.regroup(key, (member, kept.account), self._aged(member).inflation + above)

    def may_displace(self, key: BlockKey, writer: bytes, more_bytes: int) -> bool:
        """Whether a write of `more_bytes` to the account `writer` may push out this unpinned block (K3, K4)."""
        account = self._kept[key].account
        excess = self.quotas.excess_bytes(writer, more_bytes)
        return excess <= 0 or account == writer or self.quotas.excess_bytes(account) > excess

    def evict(self, member: int, writer: bytes, more_bytes: int) -> list[BlockKey]:
        """Take out the block that leaves `member` for a write of `more_bytes` to the account `writer`, after any leaves
        of fenced members that had to go first (K5). Empty when none may leave."""
        account = self._payer(member, writer, more_bytes)
        if account is not None:
            return [self._evict_from((member, account))]
        if self.quotas.excess_bytes(writer, more_bytes) > 0:
            return []
        gone: list[BlockKey] = []
        while True:
            group = self._least(member)
            fenced = self._least_fenced() if len(gone) < FENCED_EVICTIONS_MAX else None
            if fenced is not None and (group is None or self._above(fenced) < self._above(group)):
                gone.append(self._evict_from(fenced))
                continue
            return [*gone, self._evict_from(group)] if group is not None else gone

    def check_integrity(self) -> None:
        """Assert I1 and those of the parts; O(n)."""
        self._index.check_integrity()
        self.quotas.check_integrity()
        assert set(self._index) == set(self._kept)
        counted: list[dict[bytes, int]] = [{} for _ in self._accounts]
        for key, kept in self._kept.items():
            assert self._index.group(key) == (kept.member, kept.account), f"I1: {key.hex()} is in another group"
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

    def _payer(self, member: int, writer: bytes, more_bytes: int) -> bytes | None:
        """The account that gives way by its quota and has a candidate on the member; None when quotas say nothing."""
        excess = self.quotas.excess_bytes(writer, more_bytes)
        if excess > 0 and self._index.next_use((member, writer)) is not None:
            return writer
        here = self._accounts[member]
        over = [account for account in self.quotas.over if account in here]
        for account in sorted(over, key=lambda account: (-self.quotas.excess_bytes(account), account)):
            if excess > 0 and self.quotas.excess_bytes(account) <= excess:
                return None
            if self._index.next_use((member, account)) is not None:
                return account
        return None

    def _least(self, member: int) -> tuple[int, bytes] | None:
        """The group of a member whose candidate is worth least."""
        group = self._index.least_group(member)
        assert group is None or isinstance(group, tuple)
        return group

    def _least_fenced(self) -> tuple[int, bytes] | None:
        groups = [group for member in self._fenced if (group := self._least(member)) is not None]
        return min(groups, key=self._above, default=None)

    def _above(self, group: tuple[int, bytes]) -> float:
        """Worth of a group's next candidate over its member's inflation: comparable between members."""
        use = self._index.next_use(group)
        assert use is not None
        return use - self._aged(group[0]).inflation

    def _evict_from(self, group: tuple[int, bytes]) -> BlockKey:
        value = self._index.next_use(group)
        key = self._index.evict_one(group)
        assert key is not None and value is not None
        self._worth[group[0]].evicted(value)
        self._forget(key)
        return key

    def _forget(self, key: BlockKey) -> None:
        kept = self._kept.pop(key)
        self._count(kept.member, kept.account, -1)

    def _count(self, member: int, account: bytes, change: int) -> None:
        counts = self._accounts[member]
        counts[account] = counts.get(account, 0) + change
        if not counts[account]:
            del counts[account]
