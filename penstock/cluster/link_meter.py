"""How one direction of a link does: what it carries, and how fast it is while it is busy."""

from __future__ import annotations

import math
import threading
import time

from penstock.core.pool.member_bandwidth import MemberBandwidth
from penstock.pool.api import Done, PoolError

LOAD_S = 2.0  # the load is a decaying mean over about so long
FORGET_S = 30.0  # a speed that was not seen for so long may be another one now


class LinkMeter:
    """Fed with the beginning and the end of each transfer; any thread. It is busy while transfers are under way;
    `given_bytes_per_s` (0: not known) is its speed until it was busy for long enough, and when that is long ago. The
    time before a transfer that failed says nothing of the speed."""

    def __init__(self, given_bytes_per_s: float = 0.0) -> None:
        self._given_bytes_per_s = given_bytes_per_s
        self._lock = threading.Lock()
        self._transfers = 0
        self._since_s = 0.0  # while busy: from when on the time is not counted yet
        self._moved_bytes = 0
        self._busy_s = 0.0
        self._speed = MemberBandwidth(given_bytes_per_s or 1.0)
        self._recent_bytes = 0.0
        self._recent_s = self._moved_s = time.monotonic()

    def metered(self, size_bytes: int, done: Done) -> Done:
        """`done` of a transfer that begins now."""

        def ended(error: PoolError | None) -> None:
            self.end(size_bytes if error is None else 0)
            done(error)

        self.begin()
        return ended

    def begin(self) -> None:
        """A transfer begins."""
        with self._lock:
            if not self._transfers:
                self._since_s = time.monotonic()
            self._transfers += 1

    def end(self, moved_bytes: int) -> None:
        """One ends; 0 bytes when it failed."""
        with self._lock:
            now = time.monotonic()
            if moved_bytes:
                if now - self._moved_s > FORGET_S:
                    self._speed = MemberBandwidth(self._given_bytes_per_s or 1.0)
                    self._moved_bytes, self._busy_s = 0, 0.0
                self._moved_bytes += moved_bytes
                self._busy_s += now - self._since_s
                self._moved_s = now
            self._since_s = now
            self._transfers -= 1
            self._decay(now)
            self._recent_bytes += moved_bytes

    def _decay(self, now: float) -> None:
        self._recent_bytes *= math.exp((self._recent_s - now) / LOAD_S)
        self._recent_s = now

    @property
    def load_bytes_per_s(self) -> float:
        """What it carried lately, idle times included."""
        with self._lock:
            self._decay(time.monotonic())
            return self._recent_bytes / LOAD_S

    @property
    def bytes_per_s(self) -> float:
        """How fast it is while it is busy: as it was seen lately, or as it was given."""
        with self._lock:
            self._speed.observe(self._moved_bytes, self._busy_s)
            if time.monotonic() - self._moved_s > FORGET_S:
                return self._given_bytes_per_s
            return self._speed.observed_bytes_per_s or self._given_bytes_per_s
