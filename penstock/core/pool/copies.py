"""Copies of hot blocks on second nodes: how a copy is marked, what all copies may take of a node, and which holder of a
block it is read from.

A copy is the block itself, stored under its tenant's mark: key, bytes, checksum and MAC are those of the original.

COPIES-1  All copies of a node hold at most their share of its space, also where space is free.
COPIES-2  Where the share is full, a new copy takes the room of the tenant whose copies hold most; or of its own tenant,
          if that has copies and no other one holds more than it would then. So no tenant pushes out all others' copies.
COPIES-3  A copy takes no room that originals have within the rest of the space (`core.pool.quota`: all copies together
          are one payer, whose quota is the share). A copy of less worth leaves before any original (EVICT-6).
COPIES-4  Copies protect no original from eviction, and originals no copy: parents count within one tenant, and the mark
          makes another one.
Verification: tests/core/pool/test_copies.py, tests/pool/local/test_copy_share.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from penstock.core.new_block import TENANT_BYTES

COPY_MARK = b"copy"  # before the tag of the tenant
COPIES = b"copies"  # the payer of all copies; no tenant's tag has this length
TENANT_LENGTHS = (0, TENANT_BYTES, len(COPY_MARK), len(COPY_MARK) + TENANT_BYTES)  # of a block's `tenant`
COPY_ACCOUNTS_MAX = 256  # tenants that have copies on one node


def is_copy(tenant: bytes) -> bool:
    """Whether a block with this tenant is a copy."""
    return len(tenant) in TENANT_LENGTHS[2:] and tenant.startswith(COPY_MARK)


def copy_of(tenant: bytes) -> bytes:
    """The tenant of the copy of a block, which may be a copy itself."""
    return tenant if is_copy(tenant) else COPY_MARK + tenant


def original_of(tenant: bytes) -> bytes:
    """The tenant of the original of a block."""
    return tenant[len(COPY_MARK) :] if is_copy(tenant) else tenant


class CopyAccounts:
    """Bytes of copies by account, within a limit."""

    def __init__(self) -> None:
        self.limit_bytes = 0
        self.held_bytes = 0
        self._held: dict[bytes, int] = {}

    def __len__(self) -> int:
        return len(self._held)

    def set(self, account: bytes, held_bytes: int) -> None:
        """The account holds so many bytes from now on."""
        self.held_bytes += held_bytes - self._held.pop(account, 0)
        if held_bytes:
            self._held[account] = held_bytes

    def admits(self, account: bytes, more_bytes: int) -> bool:
        """Whether a copy of this account may be stored at all, once there is room."""
        return more_bytes <= self.limit_bytes and (account in self._held or len(self._held) < COPY_ACCOUNTS_MAX)

    def fit(self, more_bytes: int) -> bool:
        """Whether one more copy keeps COPIES-1."""
        return self.held_bytes + more_bytes <= self.limit_bytes

    def loser(self, account: bytes, more_bytes: int) -> bytes | None:
        """The account that loses a copy for one more of this account (COPIES-2); None when there is none."""
        largest = max(self._held, key=lambda one: (self._held[one], one), default=None)
        own = self._held.get(account)
        return account if largest and own and self._held[largest] <= own + more_bytes else largest


def split_reads(
    holders: Sequence[Sequence[int]], size_bytes: int, queued_bytes: Mapping[int, float], rates: Mapping[int, float]
) -> list[int]:
    """For each of some blocks of one size, which of its holders to read it from: the one whose queue, with that block,
    ends first; the first of them where they end alike. `queued_bytes`: what is being read from each now; `rates`: bytes
    per second of each, above 0."""
    ends = {one: queued_bytes.get(one, 0.0) / rates[one] for one in {one for some in holders for one in some}}
    chosen = []
    for some in holders:
        best = min(some, key=lambda one: ends[one] + size_bytes / rates[one])
        ends[best] += size_bytes / rates[best]
        chosen.append(best)
    return chosen
