"""Calls `done` callbacks: never on the caller's thread, never letting an exception out."""

from __future__ import annotations

import logging
from functools import partial

from penstock.pool.api import Done, PoolError
from penstock.process.guarded_thread import GuardedWorker, count_failure

log = logging.getLogger(__name__)

THREAD = "penstock-pool-callbacks"
WAITING_MAX = 1 << 18  # calls that ended before any worker saw them; whoever makes them bounds his own below this


def call_done(done: Done, error: PoolError | None) -> None:
    """Call `done`; an exception in it is logged, counted, and stops nothing."""
    try:
        done(error)
    except Exception:
        count_failure("penstock-done-callback")
        log.exception("a done callback of the pool raised")


def callback_worker() -> GuardedWorker:
    """A thread that calls `done` for calls that ended before any other thread saw them."""
    return GuardedWorker(THREAD, WAITING_MAX)


def call_soon(worker: GuardedWorker, done: Done, error: PoolError | None) -> None:
    """Have the worker call `done(error)`; once it is closed, or when more wait than it takes, call it at once."""
    if not worker.put(partial(call_done, done, error), lambda _: call_done(done, error)):
        call_done(done, error)
