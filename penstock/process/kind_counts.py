"""Counts by kind for the whole process: any thread may add, and the number of kinds is bounded."""

from __future__ import annotations

import threading
from collections import Counter

KINDS_MAX = 64  # further ones are counted as "other"


class KindCounts:
    """How often each kind was counted. A kind is one of few names in the code, never what a peer sent."""

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
