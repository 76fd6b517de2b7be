"""Real transfers that take the time of a link, or a device, of a given speed: they take turns, each for its bytes.

The links of the simulator (`sim.fluid_links`, `sim.fifo_link`) move nothing and wait for nobody: they are models of
their own.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

PIECE_BYTES = 128 << 10
CREDIT_S = 0.005  # how far a sender that was late may catch up; no window moves more than rate x (window + credit)


class PaceClock:
    """The time of one link or device, for any thread: who shares a clock takes turns.

    Turns follow each other without a gap while transfers wait, so waking up late costs nothing as long as the queue
    is not empty.
    """

    def __init__(self, credit_s: float = math.inf, clock: Callable[[], float] | None = None) -> None:
        """A turn begins at most `credit_s` before it is asked for, however long the transfer was ready by then."""
        self._credit_s = credit_s
        self._clock = clock or time.monotonic
        self._lock = threading.Lock()
        self._free_s = 0.0
        self._busy_s = 0.0

    def turn(self, seconds: float, ready_s: float) -> float:
        """When a transfer that was ready at `ready_s` and takes `seconds` ends."""
        with self._lock:
            self._free_s = max(self._free_s, ready_s, self._clock() - self._credit_s) + seconds
            self._busy_s += seconds
            return self._free_s

    def busy(self, now_s: float) -> bool:
        """Whether a transfer is under way at `now_s`."""
        with self._lock:
            return now_s < self._free_s

    @property
    def busy_s(self) -> float:
        """The time of all transfers so far."""
        with self._lock:
            return self._busy_s

    @property
    def free_s(self) -> float:
        """When the last transfer so far ends, or ended."""
        with self._lock:
            return self._free_s


class Pacer(PaceClock):
    """A link of `bytes_per_s`: whoever sends waits until his last byte would have left it.

    A node's NIC has CREDIT_S: what was ready long ago must not leave in one burst. A modelled device has no such bound:
    it copied while its thread was not awake.
    """

    def __init__(
        self,
        bytes_per_s: float,
        clock: Callable[[], float] | None = None,
        sleep: Callable[[float], None] | None = None,
        credit_s: float = CREDIT_S,
    ) -> None:
        if not bytes_per_s > 0:
            raise ValueError(f"pace is {bytes_per_s} bytes/s; it must be above 0")
        super().__init__(credit_s, clock)
        self.bytes_per_s = bytes_per_s
        self._sleep = sleep or time.sleep

    def wait(self, size_bytes: int, ready_s: float) -> float:
        """Sleep until `size_bytes` that were ready at `ready_s` have left the link; returns that virtual time.

        A caller that sends several pieces of one block passes the time at which the block was ready each time.
        """
        end_s = self.turn(size_bytes / self.bytes_per_s, ready_s)
        delay_s = end_s - self._clock()
        if delay_s > 0:
            self._sleep(delay_s)
        return end_s
