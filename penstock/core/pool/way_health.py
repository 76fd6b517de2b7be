"""Whether a faster way of reading blocks is used: after several failures in a row, not for a while."""

from __future__ import annotations

FAILURES_MAX = 3
OFF_S = 30.0


class WayHealth:
    """Failures of one way. Not thread-safe; the caller passes the time.

    WAY-1  Statement: After FAILURES_MAX failures without a success in between, the way is off for OFF_S; the next
           failure after that turns it off again at once, the next success makes it healthy.
    Verification: tests/core/pool/test_way_health.py.
    """

    def __init__(self) -> None:
        self._failures = 0
        self._off_until_s = float("-inf")

    def failed(self, now_s: float) -> bool:
        """Count a failure; returns whether it turned the way off."""
        was_off = self.off(now_s)
        self._failures = min(self._failures + 1, FAILURES_MAX)
        if was_off or self._failures < FAILURES_MAX:
            return False
        self._off_until_s = now_s + OFF_S
        return True

    def succeeded(self) -> None:
        """The way works."""
        self._failures = 0

    def off(self, now_s: float) -> bool:
        """Whether the way must not be used now."""
        return now_s < self._off_until_s
