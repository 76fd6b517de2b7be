"""Calls `done` callbacks: not on the caller's thread, and without letting an exception out."""

from __future__ import annotations

import logging
from functools import partial

from penstock.pool.api import Done, PoolError
from penstock.process.guarded_thread import GuardedWorker, count_failure

log = logging.getLogger(__name__)

THREAD = "penstock-pool-callbacks"
WAITING_MAX = 1 << 18  # calls that ended before a worker took them; every caller has a lower bound of its own


def call_done(done: Done, error: PoolError | None) -> None:
    """Call `done`; an exception in it is logged and counted, and does not propagate."""
    try:
        done(error)
    except Exception:
        count_failure("penstock-done-callback")
        log.exception("a done callback of the pool raised")


def callback_worker() -> GuardedWorker:
    """A thread that calls `done` for calls that were refused at once."""
    return GuardedWorker(THREAD, WAITING_MAX)


def call_soon(worker: GuardedWorker, done: Done, error: PoolError | None) -> None:
    """Queue `done(error)` on the worker; when the worker is closed or its queue is full, call it at once."""
    if not worker.put(partial(call_done, done, error), lambda _: call_done(done, error)):
        call_done(done, error)
