"""The router's event loop on a thread of its own: calls from other threads, calls every TICK_S, and its end.

A fault in one call is logged and counted, and the loop goes on. A fault that ends the thread, or the ticking task, ends
all requests (`end`), and `failed` is called.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Literal, TypeVar

from penstock.process.guarded_thread import GuardedThread
from penstock.process.rate_limited_log import RateLimitedLog

log = logging.getLogger(__name__)
rare = RateLimitedLog(log)

TICK_S = 0.25
ANSWER_TIMEOUT_S = 5.0

T = TypeVar("T")


class RouterLoop:
    """Any thread may call `call`, `ask` and `close`; everything else is for the loop's own thread."""

    def __init__(
        self,
        counters: Counter[str],
        due: Sequence[Callable[[], None]],
        end: Callable[[Literal["cancelled", "error"], str], None],
        failed: Callable[[], None],
    ) -> None:
        """`due` are called every TICK_S; `end(reason, error)` ends every request; faults are counted as
        `internal_errors` of `counters`."""
        self.refusal: str | None = None  # why the router does not serve any more
        self.failure: str | None = None  # the internal error of the loop
        self._counters = counters
        self._due = due
        self._end = end
        self._failed = failed
        self._begin: Callable[[], Awaitable[None]]
        self._ticking: asyncio.Task[None] | None = None
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._thread = GuardedThread("penstock-router", self._run, failed=lambda _: failed())

    def start(self, begin: Callable[[], Awaitable[None]]) -> None:
        """Run `begin` on the thread first, and wait for it, at most ANSWER_TIMEOUT_S."""
        self._begin = begin
        self._thread.start()
        self._started.wait(ANSWER_TIMEOUT_S)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.alive

    def call(self, function: Callable[[], None]) -> None:
        """Call it soon on the loop; no effect once the loop is closed, as all requests have ended then."""
        try:
            self._loop.call_soon_threadsafe(self.guarded, function)
        except RuntimeError:
            log.debug("the router is closed")

    def ask(self, question: Callable[[], T]) -> T:
        """Call it on the loop's thread and return its result. Raises TimeoutError."""

        async def answer() -> T:
            return question()

        if not self._thread.alive:
            raise TimeoutError("the router has stopped")
        return asyncio.run_coroutine_threadsafe(answer(), self._loop).result(ANSWER_TIMEOUT_S)

    def close(self, end: Callable[[], Awaitable[None]], timeout_s: float) -> None:
        """End all requests, run `end`, stop the thread."""
        end_s = time.monotonic() + timeout_s
        if self._thread.alive and self.failure is None:
            stopped = asyncio.run_coroutine_threadsafe(self._stop(end), self._loop)
            try:
                stopped.result(timeout_s)
            except TimeoutError:
                log.error("the router did not stop within %.1f s", timeout_s)
            self.call(self._loop.stop)
        if self._thread.alive:
            self._thread.join(max(0.1, end_s - time.monotonic()))

    def soon(self, function: Callable[[], None]) -> bool:
        """Call it after the calls that are queued now; False when the loop is closed. It must not raise."""
        if self._loop.is_closed():
            return False
        self._loop.call_soon(function)
        return True

    def fail(self, why: str) -> None:
        """End all requests and the thread, as after an internal error; on the loop's thread."""
        if self.refusal is None:
            self.failure = self.refusal = why
            if self._ticking is not None:
                self._ticking.cancel()
            self._loop.call_later(0.0, self._loop.stop)  # after that has been cancelled
            self._failed()

    def guarded(self, function: Callable[[], None], failed: Callable[[Exception], None] | None = None) -> None:
        """Call it; a fault in it is logged and counted, and `failed` is called with it."""
        try:
            function()
        except Exception as error:  # noqa: BLE001 (of one event; the loop goes on)
            self._counters["internal_errors"] += 1
            rare.exception("router", "the router failed at %s: %r", getattr(function, "__name__", function), error)
            if failed is not None:
                failed(error)

    def ticking_ended(self, ticking: asyncio.Task[None]) -> None:
        """Without its ticking task the router would miss every deadline: it ends, unless it is being closed."""
        if not ticking.cancelled():
            self.fail(f"internal error: {ticking.exception()!r}")

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._begin())
            self._ticking = self._loop.create_task(self._tick())
            self._ticking.add_done_callback(self.ticking_ended)
            self._started.set()
            self._loop.run_forever()
        except BaseException as error:
            self.failure = self.refusal = self.refusal or f"internal error: {error!r}"
            raise
        finally:
            self._started.set()
            self.refusal = self.refusal or "the router is closed"
            self._end("error", self.refusal)
            self._loop.close()

    async def _stop(self, end: Callable[[], Awaitable[None]]) -> None:
        self.refusal = "the router is closed"
        if self._ticking is not None:
            self._ticking.cancel()
        self._end("cancelled", "the router is shutting down")
        await end()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            for due in self._due:
                self.guarded(due)
