"""How many bytes of the pool each tenant holds, and who is over its quota."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

ACCOUNTS_MAX = 256  # tenants without a quota of their own that are told apart; the rest share one account
SHARED = b"others"  # no tenant's tag has this length


class TenantQuotas:
    """Bytes by account. A tenant has an account of its own while it holds bytes, as far as there are any left.

    Quotas are soft: free space may be used beyond them. They decide who gives way when space is short (`core.keeping`).

    I1  an account without bytes is not kept
    I2  `over` names exactly the accounts that hold more than their quota
    I3  at most `ACCOUNTS_MAX` accounts besides those that once had a quota of their own, that of nobody and the shared
    """

    def __init__(self, quota_bytes: Mapping[bytes, int] | None = None, default_bytes: int | None = None) -> None:
        """Quotas by tenant tag, and that of every other tenant (None: without limit). Blocks of nobody (empty tag) have
        a quota only by name. Raises ValueError for a quota below 0."""
        self._quotas: dict[bytes, int] = {}
        self._default: int | None = None
        self._named: set[bytes] = set()  # that have, or once had, a quota of their own
        self._held: dict[bytes, int] = {}
        self._unnamed = 0
        self.over: set[bytes] = set()
        self.set_quotas(quota_bytes or {}, default_bytes)

    def set_quotas(self, quota_bytes: Mapping[bytes, int], default_bytes: int | None) -> None:
        """Other quotas from now on; what is held stays charged where it is. Raises ValueError for a quota below 0."""
        for quota in (*quota_bytes.values(), default_bytes or 0):
            if quota < 0:
                raise ValueError(f"a quota of {quota} bytes; it must be at least 0")
        self._quotas, self._default = dict(quota_bytes), default_bytes
        self._named |= quota_bytes.keys()
        self._unnamed = sum(map(self._counted, self._held))
        self.over = {account for account in self._held if self.excess_bytes(account) > 0}

    def account(self, tenant: bytes) -> bytes:
        """The account that a new block of this tenant is charged to."""
        if not tenant or tenant in self._held or tenant in self._quotas or self._unnamed < ACCOUNTS_MAX:
            return tenant
        return SHARED

    def quota_bytes(self, account: bytes) -> float:
        quota = self._quotas.get(account, self._default if account else None)
        return math.inf if quota is None else quota

    def held_bytes(self, account: bytes) -> int:
        return self._held.get(account, 0)

    def excess_bytes(self, account: bytes, more_bytes: int = 0) -> float:
        """How far the account is over its quota with `more_bytes` on top; below 0 when it is not."""
        return self._held.get(account, 0) + more_bytes - self.quota_bytes(account)

    def charge(self, account: bytes, size_bytes: int) -> None:
        if account not in self._held and self._counted(account):
            self._unnamed += 1
        self._set(account, self._held.get(account, 0) + size_bytes)

    def credit(self, account: bytes, size_bytes: int) -> None:
        left = self._held[account] - size_bytes
        assert left >= 0, f"account {account.hex()} is credited {-left} bytes more than it holds"
        self._set(account, left)
        if left == 0 and self._counted(account):
            self._unnamed -= 1

    def __iter__(self) -> Iterator[tuple[bytes, int]]:
        """Accounts and the bytes they hold."""
        return iter(self._held.items())

    def check_integrity(self) -> None:
        """Assert I1..I3; O(accounts)."""
        assert all(held > 0 for held in self._held.values()), "I1: an empty account is kept"
        assert self.over == {account for account in self._held if self.excess_bytes(account) > 0}, "I2: over is wrong"
        assert self._unnamed == sum(map(self._counted, self._held)) <= ACCOUNTS_MAX, "I3: accounts are miscounted"

    def _counted(self, account: bytes) -> bool:
        return bool(account) and account != SHARED and account not in self._named

    def _set(self, account: bytes, held: int) -> None:
        if held:
            self._held[account] = held
        else:
            self._held.pop(account, None)
        if held > 0 and held > self.quota_bytes(account):
            self.over.add(account)
        else:
            self.over.discard(account)
