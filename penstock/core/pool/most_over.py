"""Accounts that exceed their quota, the largest excess first."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator


class MostOver:
    """Accounts and their excess in bytes; O(log n) amortised to set one and to find the largest.

    OVER-1  Every account has a heap item whose excess is not below its own.
    OVER-2  The heap holds at most 2 n + 64 items.
    """

    def __init__(self) -> None:
        self._excess: dict[bytes, int] = {}
        self._heap: list[tuple[int, bytes]] = []  # negated, so that the largest is first
        self.looks = 0  # heap items that searches have looked at

    def __contains__(self, account: bytes) -> bool:
        return account in self._excess

    def __iter__(self) -> Iterator[bytes]:
        """The accounts, in no promised order."""
        return iter(self._excess)

    def set(self, account: bytes, excess_bytes: int) -> None:
        """Set by how much an account exceeds its quota; 0 or less: it does not."""
        if excess_bytes <= 0:
            self._excess.pop(account, None)
        else:
            before = self._excess.get(account, 0)
            self._excess[account] = excess_bytes
            if excess_bytes > before:
                heapq.heappush(self._heap, (-excess_bytes, account))
        if len(self._heap) > 2 * len(self._excess) + 64:
            self._heap = [(-excess, name) for name, excess in self._excess.items()]
            heapq.heapify(self._heap)

    def clear(self) -> None:
        """Forget all accounts."""
        self._excess.clear()
        self._heap.clear()

    def first(self, accepts: Callable[[bytes], bool], above_bytes: float = 0) -> bytes | None:
        """Of the accounts that `accepts` allows, the one most over its quota, by more than `above_bytes`; None when
        there is none. O(log n) per account considered."""
        passed: dict[bytes, int] = {}
        found: bytes | None = None
        while self._heap and found is None:
            self.looks += 1
            excess, account = -self._heap[0][0], self._heap[0][1]
            now = self._excess.get(account)
            if now is None or now > excess or account in passed:
                heapq.heappop(self._heap)
            elif now < excess:
                heapq.heapreplace(self._heap, (-now, account))
            elif now <= above_bytes:
                break
            elif accepts(account):
                found = account
            else:
                passed[account] = now
                heapq.heappop(self._heap)
        for account, excess in passed.items():
            heapq.heappush(self._heap, (-excess, account))
        return found

    def check_integrity(self) -> None:
        """Assert OVER-1 and OVER-2; O(n)."""
        best: dict[bytes, int] = {}
        for excess, account in self._heap:
            best[account] = max(best.get(account, 0), -excess)
        assert all(excess > 0 for excess in self._excess.values()), "an account without excess is remembered"
        assert all(best.get(name, 0) >= excess for name, excess in self._excess.items()), "OVER-1: an account is lost"
        assert len(self._heap) <= 2 * len(self._excess) + 64, "OVER-2: the heap outgrew the accounts"
