"""How often a hit, a hand-off or a request was lost on the way through the cluster, by what happened.

Each place that counts here also says so once in the log (`rate_limited_log`). One count per process, as its threads'
failures are (`guarded_thread`); a metric of engines and router.
"""

from __future__ import annotations

import threading
from collections import Counter

KINDS_MAX = 64

_counts: Counter[str] = Counter()
_lock = threading.Lock()


def count(kind: str, by: int = 1) -> None:
    """`kind` is one of few names in the code, never something that came over the wire."""
    with _lock:
        _counts[kind if kind in _counts or len(_counts) < KINDS_MAX else "other"] += by


def losses() -> dict[str, int]:
    """All counts since the process started."""
    with _lock:
        return dict(_counts)
