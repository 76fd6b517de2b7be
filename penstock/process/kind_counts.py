"""Counters by kind for the whole process: any thread may add, and the number of kinds is bounded."""

from __future__ import annotations

import threading
from collections import Counter

KINDS_MAX = 64  # further kinds are counted as "other"


class KindCounts:
    """One counter per kind. A kind is a name in the code, never text from a peer: kinds are bounded."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def add(self, kind: str, by: int = 1) -> None:
        """Count one, or `by`."""
        with self._lock:
            self._counts[kind if kind in self._counts or len(self._counts) < KINDS_MAX else "other"] += by

    def so_far(self) -> dict[str, int]:
        """Counts since the process started."""
        with self._lock:
            return dict(self._counts)
