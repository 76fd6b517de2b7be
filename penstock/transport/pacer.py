"""Paces what a node sends to a rate over all its connections: a NIC of that speed, on a virtual clock."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

PIECE_BYTES = 128 << 10
CREDIT_S = 0.005  # how far a sender that was late may catch up; no window moves more than rate x (window + credit)


class Pacer:
    """A link that is busy until `_free_s`. A piece goes out when its last byte would have left such a link."""

    def __init__(
        self,
        bytes_per_s: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if not bytes_per_s > 0:
            raise ValueError(f"pace is {bytes_per_s} bytes/s; it must be above 0")
        self.bytes_per_s = bytes_per_s
        self._clock, self._sleep = clock, sleep
        self._lock = threading.Lock()
        self._free_s = 0.0

    def wait(self, size_bytes: int, ready_s: float) -> float:
        """Sleep until `size_bytes` that were ready at `ready_s` have left the link; returns that virtual time.

        A caller that sends several pieces of one block passes the time at which the block was ready each time.
        """
        with self._lock:
            now_s = self._clock()
            start_s = max(self._free_s, ready_s, now_s - CREDIT_S)
            self._free_s = end_s = start_s + size_bytes / self.bytes_per_s
        delay_s = end_s - now_s
        if delay_s > 0:
            self._sleep(delay_s)
        return end_s
