"""When a waiting request has aged, so that it goes before all others: one rule for all schedulers of requests.

In first come, first served, a request waits for the work of all requests before it. A policy by costs or deadlines may
let others pass, but a request should not wait much longer than that: so the mean improves and the tail does not suffer.
The delay allowed is `delays` times the larger of that wait and half of the longest such wait seen lately: with an even
load requests age early; in a burst even its first requests age late. Requests that aged before go first, so a request
ages earlier by the time of their work. No parameter of the rule is in seconds, so it adapts to the load.

Invariants, checked by `check_integrity`:
  AGE-1 A request without a first token ages once: after its allowed delay, at the latest `bound_s` after arrival.
  AGE-2 The sums of work are those of the waiting requests; requests with a first token, or ended, are forgotten.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

from penstock.core.engine.request import Request

SHARE_OF_WORST = 0.5
FORGET = 1 / 32  # of the worst delay, with each first token
SWEEP_TIMERS = 64  # timers beyond twice the waiting requests that trigger a sweep


@dataclass(slots=True)
class _Waiter:
    """A request without a first token. `own_s` is its own load and compute, `ahead_s` that of those before it; both are
    None until its hits are known. `aged`: it was named by `due`."""

    request: Request
    own_s: float | None = None
    ahead_s: float | None = None
    aged: bool = False


class Ageing:
    """Ages each request `bound_s` after arrival, or once it was delayed, beyond its own load and compute, `delays`
    times as long as first come, first served would delay it (0: only the bound counts)."""

    def __init__(self, bound_s: float, delays: float) -> None:
        self._bound_s = bound_s
        self._delays = delays
        self._waiters: dict[int, _Waiter] = {}  # by sequence
        self._work_s = 0.0  # of all waiters
        self._aged_s = 0.0  # of those among them that aged
        self._worst_s = 0.0  # the longest delay of first come, first served, lately
        self._timers: list[tuple[float, int]] = []  # time, sequence

    def arrived(self, request: Request) -> None:
        """The request waits for its first token."""
        self._waiters[request.sequence] = _Waiter(request)
        self._set_timer(request.arrival_s + self._bound_s, request.sequence)

    def estimated(self, request: Request) -> None:
        """Its load and compute are known, as its account has them. Only the first time counts."""
        waiter = self._waiters.get(request.sequence)
        if waiter is None or waiter.own_s is not None or not self._delays:
            return
        waiter.own_s = request.account.predicted_load_s + request.account.predicted_compute_s
        waiter.ahead_s = self._work_s
        self._work_s += waiter.own_s
        self._aged_s += waiter.own_s * waiter.aged  # at its bound, before its hits were known
        self._worst_s = max(self._worst_s, waiter.ahead_s)
        self._set_timer(self._late_s(waiter), request.sequence)

    def first_token(self, request: Request) -> None:
        """The request has its first token, and ages no more."""
        self.ended(request)
        self._worst_s = max(self._work_s, self._worst_s + FORGET * (self._work_s - self._worst_s))

    def ended(self, request: Request) -> None:
        """The request ended, with or without a first token."""
        waiter = self._waiters.pop(request.sequence, None)
        if waiter is not None and waiter.own_s is not None:
            self._work_s = self._work_s - waiter.own_s if self._waiters else 0.0
            self._aged_s = max(0.0, self._aged_s - waiter.own_s * waiter.aged) if self._waiters else 0.0
        self._sweep_timers()

    def due(self, now: float) -> list[Request]:
        """Those that aged by now, each named once, in order of time; their `aged_s` says since when."""
        found = []
        while self._timers and self._timers[0][0] - self._aged_s <= now:
            _, sequence = heapq.heappop(self._timers)
            waiter = self._waiters.get(sequence)
            if waiter is None:
                continue
            late_s = self._late_s(waiter)
            if late_s - self._aged_s > now:  # the worst delay has grown since
                self._set_timer(late_s, sequence)
            elif not waiter.aged:
                waiter.aged = True
                waiter.request.aged_s = late_s - self._aged_s  # `due` may be called late
                self._aged_s += waiter.own_s or 0.0
                found.append(waiter.request)
        return found

    @property
    def next_s(self) -> float | None:
        """When to look for those `due` again; None: not before another request comes."""
        while self._timers and self._timers[0][1] not in self._waiters:
            heapq.heappop(self._timers)
        return self._timers[0][0] - self._aged_s if self._timers else None

    def _late_s(self, waiter: _Waiter) -> float:
        allowed_s = self._bound_s
        if waiter.own_s is not None and waiter.ahead_s is not None:
            delay_s = self._delays * max(waiter.ahead_s, SHARE_OF_WORST * self._worst_s)
            allowed_s = min(allowed_s, waiter.own_s + delay_s)
        return waiter.request.arrival_s + allowed_s

    def _set_timer(self, time_s: float, sequence: int) -> None:
        heapq.heappush(self._timers, (time_s, sequence))
        self._sweep_timers()

    def _sweep_timers(self) -> None:
        """Drop the timers of requests that no longer wait, once they are the majority."""
        if len(self._timers) > 2 * len(self._waiters) + SWEEP_TIMERS:
            self._timers = [(time_s, sequence) for time_s, sequence in self._timers if sequence in self._waiters]
            heapq.heapify(self._timers)

    def check_integrity(self) -> None:
        """Assert AGE-1 and AGE-2. O(everything); for tests."""
        times: dict[int, float] = {}
        for time_s, sequence in self._timers:
            times[sequence] = min(time_s, times.get(sequence, math.inf))
        for sequence, waiter in self._waiters.items():
            assert waiter.aged or times[sequence] <= waiter.request.arrival_s + self._bound_s, "AGE-1"
            assert waiter.request.account.first_token_s is None, "AGE-2"
        work_s = sum(waiter.own_s or 0.0 for waiter in self._waiters.values())
        aged_s = sum(waiter.own_s or 0.0 for waiter in self._waiters.values() if waiter.aged)
        assert math.isclose(self._work_s, work_s, rel_tol=1e-6, abs_tol=1e-6), "AGE-2"
        assert math.isclose(self._aged_s, aged_s, rel_tol=1e-6, abs_tol=1e-6), "AGE-2"
        assert len(self._timers) <= 2 * len(self._waiters) + SWEEP_TIMERS + 2, "AGE-2"
