"""The clock of a modelled link: transfers take turns and each takes its bytes over the bandwidth."""

from __future__ import annotations

import threading
import time


class LinkClock:
    """Turns real transfers into ones that take as long as on a link of `bytes_per_s`. Waiting times do not add up their
    errors: a turn that woke late makes the next one shorter."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._free_at = 0.0
        self._lock = threading.Lock()

    def wait(self, size_bytes: int, started_s: float) -> None:
        """Return when the link has moved `size_bytes` of a transfer that began at `started_s` (time.monotonic)."""
        with self._lock:
            self._free_at = max(self._free_at, started_s) + size_bytes / self._bytes_per_s
            until = self._free_at
        delay = until - time.monotonic()
        if delay > 0:
            time.sleep(delay)
