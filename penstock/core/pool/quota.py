"""Bytes of the pool by tenant: what each holds, what its quota guarantees, and which tenants exceed it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

from penstock.core.pool.copies import COPIES, CopyAccounts, is_copy
from penstock.core.pool.most_over import MostOver
from penstock.core.pool.quota_places import QuotaPlaces

ACCOUNTS_MAX = 256  # tenants counted one by one without a quota by name; the rest share one account
SHARED = b"others"  # no tenant's tag has this length


class TenantQuotas:
    """Bytes by account, and which payer loses blocks when space is short (`core.pool.pool_eviction`).

    QUOTA-1  A quota by name does not depend on other tenants. Where these quotas exceed the pool, all of them shrink in
             proportion.
    QUOTA-2  The default quota goes to as many other tenants as fit into the rest of the pool, less one
             (`core.pool.quota_places`): all further tenants share that one default quota and the remainder.
    QUOTA-3  Blocks without a tenant (empty tag) count as those of one more tenant.
    QUOTA-4  The quotas add up to the pool: when it is full, some payer exceeds its quota, or each holds exactly that.
    QUOTA-5  An account without bytes is forgotten, and has no place.
    QUOTA-6  `over` names exactly the payers that hold more than their quota.
    QUOTA-7  There are at most `2 * ACCOUNTS_MAX` accounts besides `SHARED`, those of copies, and those that have, or
             once had, a quota by name.
    QUOTA-8  A payer holds the sum of its accounts.
    QUOTA-9  Copies (`core.pool.copies`) pay together as `COPIES`, whose quota is their share of the pool; without such
             a share they pay as blocks of tenants without a quota.
    Verification: tests/pool/local/test_quota_histories.py, tests/core/pool/test_quota_*.py.

    Each account with its own quota pays for itself; the others pay together, as `SHARED`. Quotas are soft: free space
    may be used beyond them.
    """

    def __init__(
        self,
        quota_bytes: Mapping[bytes, int] | None = None,
        default_bytes: int | None = None,
        capacity_bytes: int | None = None,
        copies_share: float = 0.0,
    ) -> None:
        """Quotas by tenant tag, and that of every other tenant (None: no limit, and no guarantee). `capacity_bytes` is
        the pool's size (None: not known; nothing shrinks). `copies_share`: what copies may take of it, from 0 to 1.
        Raises ValueError for a quota below 0."""
        self.on_payer_changed: Callable[[bytes], None] = lambda account: None
        self._given: dict[bytes, int] = {}  # as configured
        self._quotas: dict[bytes, int] = {}  # shrunk to the size of the pool
        self._default: int | None = None
        self._shared_quota: float = math.inf
        self._capacity = capacity_bytes
        self._named: set[bytes] = set()  # that have, or once had, a quota by name
        self._held: dict[bytes, int] = {}
        self._shared_held = 0  # of all accounts that pay as `SHARED`
        self._unnamed = 0
        self._places = QuotaPlaces()
        self._over = MostOver()
        self.copies = CopyAccounts()
        self.copies_share = copies_share
        self.set_quotas(quota_bytes or {}, default_bytes)

    # --- what is guaranteed ---

    def set_quotas(
        self, quota_bytes: Mapping[bytes, int], default_bytes: int | None, copies_share: float | None = None
    ) -> None:
        """Other quotas from now on, and another share for copies where one is given; what is held stays charged where
        it is. Raises ValueError for a quota below 0."""
        for quota in (*quota_bytes.values(), default_bytes or 0):
            if quota < 0:
                raise ValueError(f"a quota of {quota} bytes; it must be at least 0")
        self._given, self._default = dict(quota_bytes), default_bytes
        self._named = (self._named & self._held.keys()) | quota_bytes.keys()
        self._share_out(self.copies_share if copies_share is None else copies_share)

    def set_capacity(self, capacity_bytes: int) -> None:
        """The pool has another size from now on."""
        if capacity_bytes != self._capacity:
            self._capacity = capacity_bytes
            self._share_out(self.copies_share)

    def has_name(self, tenant: bytes) -> bool:
        """Whether the tenant has a quota by name."""
        return tenant in self._given

    @property
    def all_pay_together(self) -> bool:
        """Whether nobody has a quota: then the block of least worth leaves, whoever writes."""
        return not self._quotas and self._default is None

    @property
    def over(self) -> set[bytes]:
        """The payers that hold more than their quota."""
        return set(self._over)

    def quota_bytes(self, account: bytes) -> float:
        """The quota of the account's payer: its own, or the shared one."""
        payer = self.payer(account)
        if payer == SHARED:
            return self._shared_quota
        quota = self._quotas.get(payer, self._default)
        assert quota is not None, "a tenant without a quota has a place"
        return quota

    # --- accounts ---

    def account(self, tenant: bytes) -> bytes:
        """The account that a new block of this tenant is charged to."""
        if tenant in self._quotas or tenant in self._held or is_copy(tenant):
            return tenant
        open_one = self._places.free if self._default is not None else self._unnamed < ACCOUNTS_MAX
        return tenant if open_one and self._unnamed < 2 * ACCOUNTS_MAX else SHARED

    def payer(self, account: bytes) -> bytes:
        """The payer of the account: itself, `COPIES` or `SHARED`."""
        if account in self._quotas or account in self._places:
            return account
        return COPIES if self.copies_share and is_copy(account) else SHARED

    def held_bytes(self, account: bytes) -> int:
        """Bytes that are charged to this account."""
        return self._held.get(account, 0)

    def excess_bytes(self, account: bytes, more_bytes: int = 0) -> float:
        """By how many bytes the account's payer exceeds its quota with `more_bytes` more; below 0 when it does not."""
        return self.paid_bytes(account) + more_bytes - self.quota_bytes(account)

    def paid_bytes(self, account: bytes) -> int:
        """Bytes that the account's payer holds."""
        payer = self.payer(account)
        if payer == COPIES:
            return self.copies.held_bytes
        return self._shared_held if payer == SHARED else self._held.get(account, 0)

    def most_over(self, accepts: Callable[[bytes], bool], above_bytes: float = 0) -> bytes | None:
        """Of the payers that `accepts` allows, the one most over its quota, by more than `above_bytes`."""
        return self._over.first(accepts, above_bytes)

    @property
    def looks(self) -> int:
        """How many payers all searches have looked at."""
        return self._over.looks

    def charge(self, account: bytes, size_bytes: int) -> None:
        """Count a block; the account of a tenant without a quota gets a default one when there is one left."""
        if self._places.free and self._may_have_place(account):
            self._change_payer(account, lambda: self._places.take(account))
        self._add(account, size_bytes)

    def note_written(self, account: bytes, size_bytes: int) -> None:
        """A block that was charged is new, and will be written: what the time until a default quota is lost counts."""
        if account not in self._quotas:
            self._places.written(size_bytes)

    def recharge(self, account: bytes, other: bytes, size_bytes: int) -> None:
        """A block that is there counts against another account from now on."""
        self._add(other, size_bytes)
        self.credit(account, size_bytes)

    def credit(self, account: bytes, size_bytes: int) -> None:
        """A block is gone."""
        left = self._held[account] - size_bytes
        assert left >= 0, f"account {account.hex()} is credited {-left} bytes more than it holds"
        self._set(account, left)
        if left == 0:
            self._unnamed -= self._counted(account)
            self._places.give_up(account)

    def used(self, tenant: bytes, account: bytes) -> bytes:
        """Note that a block of a tenant, charged to `account`, was used again. Returns the account that the caller must
        charge it to now (`recharge`): its tenant may have got one of its own."""
        if self._places.used(tenant) or tenant in self._quotas or is_copy(tenant):
            return tenant
        if self._default is None or (tenant not in self._held and self._unnamed >= 2 * ACCOUNTS_MAX):
            return account
        if not self._places.free:
            idle = self._places.idle()
            if idle is None:
                return account
            self._change_payer(idle, lambda: self._places.give_up(idle))
        self._change_payer(tenant, lambda: self._places.take(tenant))
        self._places.used(tenant)
        return tenant

    def __iter__(self) -> Iterator[tuple[bytes, int]]:
        """Accounts and the bytes they hold."""
        return iter(self._held.items())

    def over_quota(self) -> list[tuple[bytes, int]]:
        """Payers that hold more than their quota, and by how many bytes, the most first; O(n log n)."""
        return sorted(((name, int(self.excess_bytes(name))) for name in self._over), key=lambda one: (-one[1], one[0]))

    def check_integrity(self) -> None:
        """Assert QUOTA-5..QUOTA-8 and those of the parts; O(accounts)."""
        self._over.check_integrity()
        self._places.check_integrity()
        assert all(held > 0 for held in self._held.values()), "QUOTA-5: an empty account is remembered"
        assert all(account in self._held for account in self._places), "QUOTA-5: an empty account has a place"
        payers = {self.payer(account) for account in self._held}
        assert self.over == {payer for payer in payers if self.excess_bytes(payer) > 0}, "QUOTA-6: over is wrong"
        assert self._unnamed == sum(map(self._counted, self._held)) <= 2 * ACCOUNTS_MAX, "QUOTA-7: accounts"
        shared = sum(held for account, held in self._held.items() if self.payer(account) == SHARED)
        assert shared == self._shared_held, "QUOTA-8: what is shared is miscounted"
        copies = sum(held for account, held in self._held.items() if is_copy(account))
        assert copies == self.copies.held_bytes, "QUOTA-9: copies are miscounted"

    # --- inside ---

    def _share_out(self, copies_share: float) -> None:
        """Work out quotas and places anew, and who pays for what; O(accounts)."""
        before = {account: self.payer(account) for account in self._held}
        self.copies_share = copies_share
        capacity, given = self._capacity, dict(self._given)
        self.copies.limit_bytes = int(self.copies_share * (capacity or 0))
        if self.copies_share:
            given[COPIES] = self.copies.limit_bytes
        named_bytes = sum(given.values())
        self._quotas = given
        if capacity is not None and named_bytes > capacity:
            self._quotas = {name: quota * capacity // named_bytes for name, quota in given.items()}
        left = None if capacity is None else max(0, capacity - named_bytes)
        if self._default is None or self._default == 0:
            places = 0
            self._shared_quota = 0 if self._default == 0 else math.inf if left is None else left
        else:
            fit = ACCOUNTS_MAX if left is None else left // self._default - 1
            places = max(0, min(ACCOUNTS_MAX, fit))
            self._shared_quota = self._default if left is None else left - places * self._default
        self._places.places_max, self._places.pool_bytes = places, capacity
        for name in [name for name in self._places if name in self._quotas]:
            self._places.give_up(name)
        for name in self._places.surplus():
            self._places.give_up(name)
        for account in self._held:
            if self._places.free and self._may_have_place(account):
                self._places.take(account)
        self._count_anew()
        for account, payer in before.items():
            if self.payer(account) != payer:
                self.on_payer_changed(account)

    def _count_anew(self) -> None:
        self._unnamed = sum(map(self._counted, self._held))
        self._shared_held = sum(held for account, held in self._held.items() if self.payer(account) == SHARED)
        self._over.clear()
        for account in self._held:
            self._note_excess(account)

    def _change_payer(self, account: bytes, change: Callable[[], None]) -> None:
        """Give or take a place; what the account holds is paid for by another one from now on."""
        held = self._held.get(account, 0)
        before = self.payer(account)
        change()
        after = self.payer(account)
        if before == after:
            return
        self._shared_held += held if after == SHARED else -held
        self._over.set(account, 0)
        self._note_excess(SHARED)
        if held:
            self._note_excess(account)
            self.on_payer_changed(account)

    def _note_excess(self, account: bytes) -> None:
        excess = self.excess_bytes(account)
        self._over.set(self.payer(account), int(excess) if excess > 0 else 0)

    def _may_have_place(self, account: bytes) -> bool:
        return (
            account not in self._quotas and account != SHARED and account not in self._places and not is_copy(account)
        )

    def _counted(self, account: bytes) -> bool:
        return account != SHARED and account not in self._named and not is_copy(account)

    def _add(self, account: bytes, size_bytes: int) -> None:
        if account not in self._held and self._counted(account):
            self._unnamed += 1
        self._set(account, self._held.get(account, 0) + size_bytes)

    def _set(self, account: bytes, held: int) -> None:
        if self.payer(account) == SHARED:
            self._shared_held += held - self._held.get(account, 0)
        if held:
            self._held[account] = held
        else:
            self._held.pop(account, None)
        if account and is_copy(account):
            self.copies.set(account, held)
        self._note_excess(account)
