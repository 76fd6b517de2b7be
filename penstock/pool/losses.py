"""Losses of the pool and of the cluster in front of it: counted by kind, and logged at a bounded rate.

A loss is a hit, save, load, hand-off or request that failed. Misses, and operations that ended because their pool was
closed, are not losses."""

from __future__ import annotations

import logging

from penstock.pool.api import PoolError
from penstock.process.kind_counts import KindCounts
from penstock.process.rate_limited_log import RateLimitedLog

_NO_LOSS = ("missing", "closed")

rare = RateLimitedLog(logging.getLogger(__name__))
_counts = KindCounts()


def losses() -> dict[str, int]:
    """How often each kind of loss was noted since the process started (a metric)."""
    return _counts.so_far()


def count_loss(kind: str, by: int = 1) -> None:
    """Count losses that the caller logs itself. `kind` is a name from the code, never text from a peer: kinds are
    bounded."""
    _counts.add(kind, by)


def note_loss(kind: str, where: str, message: str, *args: object) -> None:
    """Count a loss, and log `message % args` unless the same kind was logged for `where` a moment ago."""
    count_loss(kind)
    rare.warning(f"{kind} {where}", message, *args)


def note_error(what: str, where: str, error: PoolError | None) -> None:
    """Note how an operation `what` ("load", "store", ...) ended at `where`; the kind is made of `what` and the error's
    reason."""
    if error is not None and error.reason not in _NO_LOSS:
        note_loss(f"{what}_{error.reason}", where, "a %s at %s ended: %s", what, where, error)
