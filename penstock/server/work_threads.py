"""A few threads for the event loop's longer work, with a bounded queue. They do not delay the process's exit."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import TypeVar

from penstock.process.guarded_thread import GuardedWorker
from penstock.process.rate_limited_log import RateLimitedLog

T = TypeVar("T")
rare = RateLimitedLog(logging.getLogger(__name__))


class TooMuchWork(Exception):
    """The queue is full; nothing was queued."""


class WorkThreads:
    """`threads` threads that share one queue. `run` is called on one event loop."""

    def __init__(self, name: str, threads: int, waiting_max: int) -> None:
        """`waiting_max`: limit of queued and running work items."""
        self._worker = GuardedWorker(f"penstock-{name}", waiting_max, threads=threads)
        self._name = name
        self.open = 0  # queued and running work items
        self._waiting_max = waiting_max

    async def run(self, work: Callable[[], T]) -> T:
        """Run it on a thread. Raises its exception, or TooMuchWork."""
        if self.open >= self._waiting_max:
            rare.warning(
                self._name, "%d work items are queued for the threads %s: refusing more", self.open, self._name
            )
            raise TooMuchWork
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def ended(result: T | None, error: Exception | None) -> None:
            self.open -= 1
            if future.done():  # cancelled by the awaiting coroutine
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)  # type: ignore[arg-type]

        def on_thread() -> None:
            result: T | None = None
            error: Exception | None = None
            if not future.cancelled():
                try:
                    result = work()
                except Exception as raised:  # noqa: BLE001 (it is raised again, where it is awaited)
                    error = raised
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(ended, result, error)

        if not self._worker.put(on_thread):
            raise TooMuchWork
        self.open += 1
        return await future

    def stop(self) -> None:
        """End the threads after their queued work, without waiting for them."""
        self._worker.stop()
