"""Calls `done` callbacks: not on the caller's thread, and without letting an exception out."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import partial

from penstock.pool.api import Done, PoolError
from penstock.process.guarded_thread import GuardedWorker, count_failure
from penstock.process.shared import Shared

log = logging.getLogger(__name__)

THREAD = "penstock-pool-callbacks"
CLOSE_S = 1.0
OF_ALL_MAX = 1 << 20  # calls of all users that wait
WAITING_MAX = 1 << 18  # of one: calls that ended before a worker took them; every caller has a lower bound of its own


def call_done(done: Done, error: PoolError | None) -> None:
    """Call `done`; an exception in it is logged and counted, and does not propagate."""
    try:
        done(error)
    except Exception:
        count_failure("penstock-done-callback")
        log.exception("a done callback of the pool raised")


class Callbacks:
    """One user of the thread of this process that calls `done` for calls that ended at once."""

    def __init__(self) -> None:
        """Raises RuntimeError or MemoryError where the operating system starts no thread."""
        self._worker = _shared.acquire()
        self._lock = threading.Lock()
        self._waiting = 0
        self._closed = False

    def put(self, run: Callable[[], object], failed: Callable[[Exception], None]) -> bool:
        """As `GuardedWorker.put`; WAITING_MAX calls of this user may wait."""

        def begin() -> None:
            with self._lock:
                self._waiting -= 1
            run()

        with self._lock:
            if self._closed or self._waiting >= WAITING_MAX or not self._worker.put(begin, failed):
                return False
            self._waiting += 1
            return True

    def close(self, timeout_s: float) -> None:
        """Accept no more calls, and wait at most `timeout_s` for those before, except on their own thread."""
        with self._lock:
            again, self._closed = self._closed, True
        if again:
            return
        called = threading.Event()
        if not self._worker.is_current and self._worker.put(called.set, lambda _: called.set()):
            called.wait(timeout_s)
        _shared.release(self._worker)


_shared: Shared[GuardedWorker] = Shared(lambda: GuardedWorker(THREAD, OF_ALL_MAX), lambda worker: worker.close(CLOSE_S))


def callback_worker() -> Callbacks:
    """What calls `done` for calls that were refused at once. Raises RuntimeError or MemoryError where the operating
    system starts no thread."""
    return Callbacks()


def call_soon(worker: Callbacks, done: Done, error: PoolError | None) -> None:
    """Queue `done(error)` on the worker; when the worker is closed or its queue is full, call it at once."""
    if not worker.put(partial(call_done, done, error), lambda _: call_done(done, error)):
        call_done(done, error)
