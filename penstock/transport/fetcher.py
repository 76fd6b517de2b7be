"""A thread of a pool node that finds staging memory for loads, in order: it waits for it, so that nobody else does."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable

FETCHES_MAX = 4096


class Fetcher:
    """Runs what is put, one after the other."""

    def __init__(self, name: str) -> None:
        self._closed = False
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue(FETCHES_MAX)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, fetch: Callable[[], None]) -> bool:
        """False when too many wait, or after `close`."""
        if self._closed:
            return False
        try:
            self._queue.put_nowait(fetch)
        except queue.Full:
            return False
        return True

    def close(self, timeout_s: float) -> None:
        """Run what waits, then end."""
        self._closed = True
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=timeout_s)
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while (fetch := self._queue.get()) is not None:
            fetch()
