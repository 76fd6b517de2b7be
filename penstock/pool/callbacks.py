"""Calls `done` callbacks: never on the caller's thread, never letting an exception out."""

from __future__ import annotations

import logging
import queue
import threading

from penstock.pool.api import Done, PoolError

log = logging.getLogger(__name__)


def call_done(done: Done, error: PoolError | None) -> None:
    """Call `done`; an exception in it is logged and stops nothing."""
    try:
        done(error)
    except Exception:
        log.exception("a done callback of the pool raised")


class Callbacks:
    """A thread that calls `done` for calls that ended before any worker saw them."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[Done, PoolError | None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="penstock-pool-callbacks", daemon=True)
        self._thread.start()

    def call(self, done: Done, error: PoolError | None) -> None:
        """Call `done(error)` soon; after `close`, at once."""
        if self._thread.is_alive():
            self._queue.put((done, error))
        else:
            call_done(done, error)

    def close(self, timeout_s: float) -> None:
        """Call what waits, then end."""
        self._queue.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            call_done(*item)
        while not self._queue.empty():
            if (item := self._queue.get()) is not None:
                call_done(*item)
