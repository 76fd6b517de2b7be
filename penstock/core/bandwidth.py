"""The speed of links and devices, measured by their transfers. No clock: callers pass the time.

There are two measures of busy time and two estimates:

- `BusyMeter` counts all bytes and the time in which *anything* was moved: for a bandwidth. `LinkUse` says how long
  *one* operation kept its link busy, without the time of operations that overtook it: for a cost by size.
- `SeenBandwidth` decays with busy time, has no value before enough was seen, and weighs all bytes the same: for reports
  and for shares. `LinkCost` decays with each operation, begins with a prior, so that it always has a value, and weighs
  operations by size, so that fixed costs of small ones count little: for the scheduler's predictions.

The speed that a host's storage NIC is assumed to have within a cluster is in `core.cluster.nic_speed`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

BUSY_MIN_S = 0.25  # an estimate needs this much busy time
HALF_LIFE_BUSY_S = 2.0  # of older observations, in busy time

DEGRADED = 0.8  # below this part of its share's bandwidth a member's share falls
RECOVERED = 1.1  # above this part it rises again, never above what it was given
CHANGE_EVERY_S = 10.0
WHOLE = 0.95  # at this part of what it was given a member has recovered in full
FLOOR = 0.02  # of the given bandwidth: without a share a member would never be measured again

AGAIN_S = 10.0  # between two measurements of a link, doubling
AGAIN_MAX = 6  # further measurements, within 11 minutes

LOAD_S = 2.0  # a link's load is a decaying mean over about so long
FORGET_S = 30.0  # a speed measured longer ago is not used any more


class LinkUse:
    """Operations in flight on one link, and when it last finished one."""

    __slots__ = ("in_flight", "last_done_s")

    def __init__(self) -> None:
        self.in_flight = 0
        self.last_done_s = 0.0

    def finished(self, issued_s: float, now: float, operations: int = 1) -> float:
        """So many operations ended together, the first of which began at `issued_s`; returns the seconds that they
        alone kept the link busy."""
        self.in_flight -= operations
        busy_s = now - max(issued_s, self.last_done_s)
        self.last_done_s = now
        return busy_s


class BusyMeter:
    """Bytes moved and busy seconds, both cumulative. Fed by one thread or under a lock; any thread may read."""

    __slots__ = ("_busy_from", "_failed_time", "_seen", "in_flight")

    def __init__(self, busy_from: int, failed_time: bool) -> None:
        """Busy while `busy_from` transfers are under way: 2 for what overlaps them, of which one alone shows the
        latency. `failed_time`: the time of failed transfers counts, so that the share of a device that misses
        deadlines falls. Not for a link to a peer, which may be gone."""
        self._busy_from = busy_from
        self._failed_time = failed_time
        self.in_flight = 0
        self._seen: tuple[int, float, float | None] = (0, 0.0, None)  # bytes, seconds; while busy: counted up to when

    def observed(self, now_s: float) -> tuple[int, float]:
        """Bytes and busy seconds so far."""
        moved_bytes, busy_s, since_s = self._seen
        return moved_bytes, busy_s if since_s is None or not self._failed_time else busy_s + max(0.0, now_s - since_s)

    def started(self, now_s: float) -> None:
        """One more transfer is under way."""
        self.in_flight += 1
        if self.in_flight == self._busy_from:
            self._seen = *self._seen[:2], now_s

    def ended(self, transfers: int, moved_bytes: int, now_s: float) -> None:
        """`transfers` ended together, with `moved_bytes`; 0 bytes: they failed."""
        self.in_flight -= transfers
        before_bytes, busy_s, since_s = self._seen
        if since_s is not None:
            if moved_bytes or self._failed_time:
                busy_s += now_s - since_s
            self._seen = before_bytes + moved_bytes, busy_s, now_s if self.in_flight >= self._busy_from else None


class SeenBandwidth:
    """Decayed bytes over decayed busy seconds, from cumulative `(bytes, busy seconds)`."""

    def __init__(self, moved_bytes: int = 0, busy_s: float = 0.0) -> None:
        """The counters as they are now: what they count from here on is looked at."""
        self._last = (moved_bytes, busy_s)
        self._bytes = 0.0
        self._busy_s = 0.0

    @property
    def observed_bytes_per_s(self) -> float | None:
        """The decayed estimate; None before enough was seen."""
        return self._bytes / self._busy_s if self._busy_s >= BUSY_MIN_S else None

    def observe(self, moved_bytes: int, busy_s: float) -> float:
        """Note the counters as they are; those that ran backwards start anew. Returns the busy seconds that are new."""
        more_bytes, more_s = moved_bytes - self._last[0], busy_s - self._last[1]
        self._last = (moved_bytes, busy_s)
        if more_bytes < 0 or more_s <= 0:
            return 0.0
        decay = 0.5 ** (more_s / HALF_LIFE_BUSY_S)
        self._bytes = self._bytes * decay + more_bytes
        self._busy_s = self._busy_s * decay + more_s
        return more_s


class MemberBandwidth(SeenBandwidth):
    """When a pool member's share of new blocks should follow the bandwidth that it really gives.

    BANDWIDTH-1  A change needs `BUSY_MIN_S` of busy time, and `CHANGE_EVERY_S`, since the last one.
    BANDWIDTH-2  A share falls when the estimate is below `DEGRADED` of it, and rises when above `RECOVERED` of it;
                 between them it stays, so that noise moves no blocks.
    BANDWIDTH-3  A share is never above what the member is given, and never below `FLOOR` of that.
    Verification: tests/core/test_member_bandwidth.py.
    """

    def __init__(self, given_bytes_per_s: float) -> None:
        """`given_bytes_per_s` is the weight that the member began with, measured or configured."""
        if given_bytes_per_s <= 0:
            raise ValueError(f"given_bytes_per_s is {given_bytes_per_s}; it must be above 0")
        super().__init__()
        self.given_bytes_per_s = given_bytes_per_s
        self.share_bytes_per_s = given_bytes_per_s  # what its share is computed from
        self._fresh_busy_s = 0.0
        self._changed_s: float | None = None

    def give(self, bytes_per_s: float) -> float:
        """It has turned out that it can be read so much faster; returns the bandwidth to compute its share from. A
        share that fell stays, until reads show that the member has recovered."""
        if self.share_bytes_per_s == self.given_bytes_per_s:
            self.share_bytes_per_s = bytes_per_s
        self.given_bytes_per_s = bytes_per_s
        return self.share_bytes_per_s

    def observe(self, moved_bytes: int, busy_s: float) -> float:
        """As `SeenBandwidth.observe`."""
        more_s = super().observe(moved_bytes, busy_s)
        self._fresh_busy_s += more_s
        return more_s

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


class MeasuredLink:
    """What a link moves, as far as measurements have shown.

    A measurement while a host is busy is too low, by orders of magnitude at times, and none is too high. So the fastest
    one counts, and while the link seems to be what limits a member, it is measured AGAIN_MAX times more, with growing
    pauses. What is not above RECOVERED of it is noise, and moves no blocks."""

    def __init__(self, members_bytes_per_s: float) -> None:
        """What the members behind the link can be read at; 0: not known."""
        self.bytes_per_s = 0.0
        self._members_bytes_per_s = members_bytes_per_s
        self._measured = 0
        self._again_s = 0.0

    @property
    def weight(self) -> float:
        """Bytes per second over the link and from the members."""
        return min(self.bytes_per_s, self._members_bytes_per_s or self.bytes_per_s)

    def due(self, now_s: float) -> bool:
        """Whether it is to be measured again, if it is idle."""
        limits = not self._members_bytes_per_s or self.bytes_per_s < self._members_bytes_per_s
        return limits and self._measured <= AGAIN_MAX and now_s >= self._again_s

    def measured(self, bytes_per_s: float, now_s: float) -> bool:
        """A measurement has ended, or failed (0); whether the weight is another one now."""
        self._again_s = now_s + AGAIN_S * 2**self._measured
        self._measured += 1
        return self.seen(bytes_per_s)

    def seen(self, bytes_per_s: float) -> bool:
        """It was seen to move so much; whether the weight is another one now."""
        if bytes_per_s <= RECOVERED * self.bytes_per_s:
            return False
        before = self.weight
        self.bytes_per_s = bytes_per_s
        return self.weight != before


class LinkSpeed:
    """One direction of a link between hosts: its load, and its speed while it is busy.

    `given_bytes_per_s` (0: not known) is its speed until it was busy for long enough, and when that is long ago."""

    def __init__(self, given_bytes_per_s: float, now_s: float) -> None:
        self._given_bytes_per_s = given_bytes_per_s
        self._meter = BusyMeter(busy_from=1, failed_time=False)
        self._seen = SeenBandwidth()
        self._recent_bytes = 0.0
        self._recent_s = self._moved_s = now_s

    def started(self, now_s: float) -> None:
        """A transfer begins."""
        self._meter.started(now_s)

    def ended(self, moved_bytes: int, now_s: float) -> None:
        """A transfer ended, with `moved_bytes`; 0 bytes: it failed."""
        if moved_bytes:
            if now_s - self._moved_s > FORGET_S:
                self._seen = SeenBandwidth(*self._meter.observed(now_s))
            self._moved_s = now_s
        self._meter.ended(1, moved_bytes, now_s)
        self._recent_bytes = self.load_bytes_per_s(now_s) * LOAD_S + moved_bytes
        self._recent_s = now_s

    def load_bytes_per_s(self, now_s: float) -> float:
        """Bytes per second moved lately, idle time included."""
        return self._recent_bytes * math.exp((self._recent_s - now_s) / LOAD_S) / LOAD_S

    def bytes_per_s(self, now_s: float) -> float:
        """Speed while busy: as measured lately, or as given."""
        self._seen.observe(*self._meter.observed(now_s))
        seen = self._seen.observed_bytes_per_s if now_s - self._moved_s <= FORGET_S else None
        return seen or self._given_bytes_per_s


@dataclass(slots=True)
class LinkCost:
    """Seconds per byte of one link: least squares through the origin over decayed sums of (bytes, busy seconds)."""

    bytes_per_s: float
    forget: float = 0.995
    _bytes_seconds: float = 0.0
    _bytes_bytes: float = 0.0

    def __post_init__(self) -> None:
        if self.bytes_per_s <= 0:
            raise ValueError(f"bytes_per_s is {self.bytes_per_s}; a link needs a bandwidth above 0")
        weight = 1e6  # the prior counts as one block of a megabyte
        self._bytes_bytes = weight * weight
        self._bytes_seconds = weight * weight / self.bytes_per_s

    def observe(self, size_bytes: int, busy_s: float) -> None:
        """The link was busy for `busy_s` seconds moving `size_bytes` (`LinkUse.finished`)."""
        self._bytes_seconds = self._bytes_seconds * self.forget + size_bytes * busy_s
        self._bytes_bytes = self._bytes_bytes * self.forget + float(size_bytes) * size_bytes
        if self._bytes_seconds > 0:
            self.bytes_per_s = self._bytes_bytes / self._bytes_seconds

    def seconds(self, size_bytes: float) -> float:
        """What so many bytes take."""
        return size_bytes / self.bytes_per_s
