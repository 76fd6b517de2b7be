"""The virtual clock of a simulation: events in order of time, ties in the order they were given."""

from __future__ import annotations

import heapq
from collections.abc import Callable


class Event:
    """Something that will happen; `cancel` takes it back."""

    __slots__ = ("cancelled", "happen", "time_s")

    def __init__(self, time_s: float, happen: Callable[[], None]) -> None:
        self.time_s = time_s
        self.happen = happen
        self.cancelled = False

    def cancel(self) -> None:
        """It will not happen."""
        self.cancelled = True


class VirtualClock:
    """`now_s` moves from event to event. One history per input: nothing here depends on real time or on hashes."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.events = 0  # that happened
        self._heap: list[tuple[float, int, Event]] = []
        self._given = 0

    def at(self, time_s: float, happen: Callable[[], None]) -> Event:
        """Have `happen` called at a time; at once (after what is due) when that is past."""
        event = Event(max(time_s, self.now_s), happen)
        self._given += 1
        heapq.heappush(self._heap, (event.time_s, self._given, event))
        return event

    def after(self, delay_s: float, happen: Callable[[], None]) -> Event:
        """Have something happen `delay_s` virtual seconds from now."""
        return self.at(self.now_s + delay_s, happen)

    def next_s(self) -> float | None:
        """When the next event is due; None when none is left."""
        while self._heap and self._heap[0][2].cancelled:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def step(self) -> bool:
        """Let the next event happen; False when none is left."""
        if self.next_s() is None:
            return False
        time_s, _, event = heapq.heappop(self._heap)
        self.now_s = max(self.now_s, time_s)
        self.events += 1
        event.happen()
        return True

    def jump(self, seconds: float) -> None:
        """The machine stood still for a while: what was due meanwhile happens late, at the time it is then."""
        self.now_s += seconds
