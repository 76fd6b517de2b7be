"""Which steps of vLLM have begun and were computed in a worker: on a device when their events have passed.

Each step has an event of its own, so that who waits for a step waits for no later one.
"""

from __future__ import annotations

import threading
from collections import deque

from penstock.device.accelerator import Accelerator, Event

EVENTS_MAX = 64  # that have not passed; a step older than those waits for the oldest of them
FAILED_MAX = 1024


class StepError(RuntimeError):
    """A step that was not computed: it raised, or vLLM left it out."""


class _Events:
    """Events on vLLM's stream, by step, the oldest first; threads call with the lock of their owner."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._events: deque[tuple[int, Event]] = deque()
        self._passed = -1  # the last step whose event has passed, as far as somebody looked

    def record(self, step: int) -> None:
        if not self._accelerator.copies_beside_compute:
            return
        event = self._accelerator.new_event()
        event.record()
        while self._events and self._events[0][1].query():
            self._passed = self._events.popleft()[0]
        if len(self._events) >= EVENTS_MAX:
            self._events.popleft()
        self._events.append((step, event))

    def of(self, step: int) -> Event | None:
        """The event behind everything of `step`; None when it has passed."""
        if step <= self._passed:
            return None
        return next((event for number, event in self._events if number >= step), None)

    def passed(self, event: Event) -> None:
        """`event`, and so all before it, has passed."""
        while any(one is event for _, one in self._events):
            self._passed = self._events.popleft()[0]


class Steps:
    """`begin`, `record` and `fail` are vLLM's thread's and never wait; the waits are for threads that copy."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._changed = threading.Condition()
        self._begun = self._last = -1
        self._failed: deque[int] = deque(maxlen=FAILED_MAX)
        self._accelerator = accelerator
        self._begins, self._ends = _Events(accelerator), _Events(accelerator)
        self._stopped = False

    def begin(self, step: int, zeroes: bool) -> None:
        """`step` goes on to its forward pass. `zeroes`: it put zeros into new blocks, which are on the stream."""
        with self._changed:
            if zeroes:
                self._begins.record(step)
            self._begun = max(self._begun, step)
            self._changed.notify_all()

    def record(self, step: int) -> None:
        """Everything of `step` was put on the stream (CUDA) or is done (CPU)."""
        with self._changed:
            self._ends.record(step)
            self._end(step)

    def fail(self, step: int) -> None:
        """`step` raised: what it was to compute is not there."""
        with self._changed:
            self._failed.append(step)
            self._end(step)

    def _end(self, step: int) -> None:
        if self._last >= 0:
            self._failed.extend(range(max(self._last + 1, step - FAILED_MAX), step))  # left out by vLLM
        self._begun, self._last = max(self._begun, step), max(self._last, step)
        self._changed.notify_all()

    def stop(self) -> None:
        """Nobody waits any more."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def wait(self, step: int, timeout_s: float) -> None:
        """Until `step` was computed. Raises TimeoutError at the deadline, StepError when it was not or when nobody
        waits any more."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._stopped or self._last >= step, timeout_s):
                raise TimeoutError(f"step {step} was not computed within {timeout_s:g} s")
            if self._last < step:
                raise StepError("the worker ends")
            if step in self._failed:
                raise StepError(f"step {step} failed: its blocks were not computed")
            event = self._ends.of(step)
        self._synchronize(self._ends, event)

    def wait_begun(self, step: int, timeout_s: float) -> None:
        """Until whatever `step` does to new blocks before its forward pass is done. Raises as `wait` does."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._stopped or self._begun >= step, timeout_s):
                raise TimeoutError(f"step {step} did not begin within {timeout_s:g} s")
            if self._begun < step:
                raise StepError("the worker ends")
            event = self._begins.of(step)
        self._synchronize(self._begins, event)

    def _synchronize(self, events: _Events, event: Event | None) -> None:
        if event is not None:
            self._accelerator.use()
            event.synchronize()
            with self._changed:
                events.passed(event)
