"""Asks the scheduler core for decisions soon after whatever happened, and passes them on. On the router's thread."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Hashable

from penstock.core.cluster.decisions import Decision, DecisionFailed
from penstock.core.cluster.inter_engine import InterEngineScheduler
from penstock.process.rate_limited_log import RateLimitedLog

rare = RateLimitedLog(logging.getLogger(__name__))

FAILING_S = 5.0  # a router whose decisions have failed for so long is not healthy


class DecisionLoop:
    """A fault of one request's decision is passed to `failed`; after another fault the next event tries again."""

    def __init__(
        self,
        scheduler: InterEngineScheduler,
        counters: Counter[str],
        soon: Callable[[Callable[[], None]], bool],
        execute: Callable[[Decision], None],
        failed: Callable[[Hashable, str], None],
    ) -> None:
        """`soon` calls a function after the events that wait now; `execute` and `failed(request id, error)` must not
        raise. Faults are counted as `internal_errors` of `counters`."""
        self._scheduler, self._counters = scheduler, counters
        self._soon, self._execute, self._failed = soon, execute, failed
        self._failing_since_s: float | None = None
        self._asked = False

    @property
    def failing(self) -> str | None:
        """One line, while nothing could be decided for FAILING_S; any thread may ask."""
        since_s = self._failing_since_s
        if since_s is None or time.monotonic() - since_s <= FAILING_S:
            return None
        return f"internal errors: nothing was decided for {time.monotonic() - since_s:.0f} s"

    def decide_soon(self) -> None:
        """Ask the core once the events that wait now have been processed."""
        if not self._asked:
            self._asked = self._soon(self._decide)

    def reported(self) -> None:
        """An engine's report came: ask only where the core has something to do."""
        if self._failing_since_s is not None or not self._scheduler.idle:
            self.decide_soon()

    def _decide(self) -> None:
        self._asked = False
        try:
            decisions = self._scheduler.decide(time.monotonic())
        except DecisionFailed as error:  # the others are decided again
            self._counters["internal_errors"] += 1
            rare.exception("decision", "request %s could not be decided on: %r", error.request_id, error.__cause__)
            self._failed(error.request_id, str(error))
            self.decide_soon()
            return
        except Exception as error:  # noqa: BLE001 (counted; the next decision may succeed)
            self._counters["internal_errors"] += 1
            self._failing_since_s = self._failing_since_s or time.monotonic()
            rare.exception("decide", "the router could not decide: %r; it tries again", error)
            return
        self._failing_since_s = None
        for decision in decisions:
            self._execute(decision)
