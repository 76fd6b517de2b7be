"""The virtual clock of a simulation: events in order of time, ties in the order of scheduling."""

from __future__ import annotations

import heapq
from collections.abc import Callable


class Event:
    """A scheduled event; `cancel` removes it."""

    __slots__ = ("cancelled", "happen", "time_s")

    def __init__(self, time_s: float, happen: Callable[[], None]) -> None:
        self.time_s = time_s
        self.happen = happen
        self.cancelled = False

    def cancel(self) -> None:
        """The event will not happen."""
        self.cancelled = True


class VirtualClock:
    """`now_s` advances from event to event. Deterministic: nothing here depends on real time or on hashes."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.events = 0  # number of events that happened
        self._heap: list[tuple[float, int, Event]] = []
        self._given = 0

    def at(self, time_s: float, happen: Callable[[], None]) -> Event:
        """Schedule a call of `happen` at a time; a past time means now, after everything already due."""
        event = Event(max(time_s, self.now_s), happen)
        self._given += 1
        heapq.heappush(self._heap, (event.time_s, self._given, event))
        return event

    def after(self, delay_s: float, happen: Callable[[], None]) -> Event:
        """Schedule an event `delay_s` virtual seconds from now."""
        return self.at(self.now_s + delay_s, happen)

    def next_s(self) -> float | None:
        """Time of the next event; None without events."""
        while self._heap and self._heap[0][2].cancelled:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def step(self) -> bool:
        """Process the next event; False without events."""
        if self.next_s() is None:
            return False
        time_s, _, event = heapq.heappop(self._heap)
        self.now_s = max(self.now_s, time_s)
        self.events += 1
        event.happen()
        return True

    def jump(self, seconds: float) -> None:
        """The machine was suspended: events due meanwhile happen late, at the time after the jump."""
        self.now_s += seconds
