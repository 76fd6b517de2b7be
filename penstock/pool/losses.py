"""What the pool, and the cluster in front of it, lost: counted by kind, each kind said now and then.

That is hits, saves, loads, hand-offs and requests that came to nothing.

A miss is no loss, nor is what ended because its pool was closed.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter

from penstock.pool.api import PoolError
from penstock.rate_limited_log import RateLimitedLog

KINDS_MAX = 64  # further ones are counted as "other"
_NO_LOSS = ("missing", "closed")

_told = RateLimitedLog(logging.getLogger(__name__))
_lock = threading.Lock()
_counts: Counter[str] = Counter()


def losses() -> dict[str, int]:
    """How often each kind of loss was noted since the process started (a metric)."""
    with _lock:
        return dict(_counts)


def count_loss(kind: str, by: int = 1) -> None:
    """Count losses that the caller says itself. `kind` is one of few names in the code, never what a peer sent."""
    with _lock:
        _counts[kind if kind in _counts or len(_counts) < KINDS_MAX else "other"] += by


def note_loss(kind: str, where: str, message: str, *args: object) -> None:
    """Count a loss, and log `message % args` unless the same kind was said of `where` a moment ago."""
    count_loss(kind)
    _told.warning(f"{kind} {where}", message, *args)


def note_error(what: str, where: str, error: PoolError | None) -> None:
    """Note how a `what` ("load", "store", ...) ended at `where`; its kind is `what` and the error's reason."""
    if error is not None and error.reason not in _NO_LOSS:
        note_loss(f"{what}_{error.reason}", where, "a %s at %s ended: %s", what, where, error)
