"""When a member's share of new blocks should follow the bandwidth that it really gives.

A member is measured only while it is busy: bytes that it read, and the time it had reads in flight, both cumulative.
"""

from __future__ import annotations

DEGRADED = 0.8  # below this part of its share's bandwidth a member's share falls
RECOVERED = 1.1  # above this part it rises again, never above what it was given
BUSY_MIN_S = 0.25  # an estimate needs this much busy time
HALF_LIFE_BUSY_S = 2.0  # of older observations, in busy time
CHANGE_EVERY_S = 10.0
WHOLE = 0.95  # at this part of what it was given a member has recovered in full
FLOOR = 0.02  # of the bandwidth it was given: a member keeps a share, or it would never be measured again


class MemberBandwidth:
    """One member's bandwidth as it is now, from cumulative `(bytes, busy seconds)`.

    B1  A change needs `BUSY_MIN_S` of busy time since the last one, and `CHANGE_EVERY_S` since then.
    B2  A share falls when the estimate is below `DEGRADED` of it, and rises when above `RECOVERED` of it; between them
        it stays, so that noise moves no blocks.
    B3  A share is never above what was given at start, and never below `FLOOR` of that.
    """

    def __init__(self, given_bytes_per_s: float) -> None:
        """`given_bytes_per_s` is the weight that the member began with, measured or configured."""
        if given_bytes_per_s <= 0:
            raise ValueError(f"given_bytes_per_s is {given_bytes_per_s}; it must be above 0")
        self.given_bytes_per_s = given_bytes_per_s
        self.share_bytes_per_s = given_bytes_per_s  # what its share is computed from
        self._last = (0, 0.0)
        self._bytes = 0.0
        self._busy_s = 0.0
        self._fresh_busy_s = 0.0
        self._changed_s: float | None = None

    @property
    def observed_bytes_per_s(self) -> float | None:
        """The decayed estimate; None before enough was seen."""
        return self._bytes / self._busy_s if self._busy_s >= BUSY_MIN_S else None

    def observe(self, read_bytes: int, busy_s: float) -> None:
        """Note the member's counters as they stand; counters that ran backwards start anew."""
        more_bytes, more_s = read_bytes - self._last[0], busy_s - self._last[1]
        self._last = (read_bytes, busy_s)
        if more_bytes < 0 or more_s <= 0:
            return
        kept = 0.5 ** (more_s / HALF_LIFE_BUSY_S)
        self._bytes = self._bytes * kept + more_bytes
        self._busy_s = self._busy_s * kept + more_s
        self._fresh_busy_s += more_s

    def change(self, now_s: float) -> float | None:
        """A new bandwidth to compute the member's share from, or None to leave it."""
        observed = self.observed_bytes_per_s
        if observed is None or self._fresh_busy_s < BUSY_MIN_S:
            return None
        if self._changed_s is not None and now_s - self._changed_s < CHANGE_EVERY_S:
            return None
        given = self.given_bytes_per_s
        wanted = given if observed >= WHOLE * given else max(observed, FLOOR * given)
        ratio = wanted / self.share_bytes_per_s
        returned = wanted == given > self.share_bytes_per_s
        if DEGRADED <= ratio <= RECOVERED and not returned:
            return None
        self.share_bytes_per_s = wanted
        self._changed_s = now_s
        self._fresh_busy_s = 0.0
        return wanted
