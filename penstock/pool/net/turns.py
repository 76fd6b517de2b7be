"""Turns for work that holds the interpreter lock, by source address, and for one busy thread among others.

A client that asks in a loop delays only clients of its own address.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque


class Turns:
    """At most `at_once` callers work at the same time; waiting callers are served round-robin by source address. Any
    thread may call; the work must not block."""

    def __init__(self, at_once: int) -> None:
        self._at_once = at_once
        self._lock = threading.Lock()
        self._working = 0
        self._waiting: OrderedDict[str, deque[threading.Event]] = OrderedDict()

    @property
    def working(self) -> int:
        """Callers that work now."""
        return self._working

    @property
    def waiting(self) -> int:
        """Callers that wait for their turn."""
        with self._lock:
            return sum(map(len, self._waiting.values()))

    def turn(self, source: str) -> Turn:
        """A turn, which is waited for at the beginning of its context, and ends with it."""
        return Turn(self, source)

    def begin(self, source: str) -> None:
        """Wait for a turn; `end` must follow."""
        mine: threading.Event | None = None
        with self._lock:
            if self._working < self._at_once:
                self._working += 1
            else:
                mine = threading.Event()
                self._waiting.setdefault(source, deque()).append(mine)
        if mine is not None:
            mine.wait()

    def end(self) -> None:
        """The turn of a caller has ended."""
        with self._lock:
            if not self._waiting:
                self._working -= 1
                return
            source, waiting = self._waiting.popitem(last=False)
            following = waiting.popleft()
            if waiting:
                self._waiting[source] = waiting
        following.set()


class Turn:
    """One turn, as a context."""

    __slots__ = ("_source", "_turns")

    def __init__(self, turns: Turns, source: str) -> None:
        self._turns, self._source = turns, source

    def __enter__(self) -> None:
        self._turns.begin(self._source)

    def __exit__(self, *_: object) -> None:
        self._turns.end()


class Windows:
    """Limits a thread that is always busy to a part of each time window; it sleeps for the rest. Otherwise it would get
    the interpreter lock back before a thread that waits for it has woken up."""

    def __init__(self, window_s: float, turn_s: float) -> None:
        self._window_s, self._turn_s = window_s, turn_s
        self._end_s = 0.0
        self._used_s = 0.0  # the thread's CPU time when the window began

    def pause(self, now_s: float, used_s: float) -> float:
        """Seconds to sleep before the next step. `used_s`: the thread's CPU time so far (`time.thread_time`)."""
        if now_s >= self._end_s:
            self._end_s, self._used_s = now_s + self._window_s, used_s
        return self._end_s - now_s if used_s - self._used_s >= self._turn_s else 0.0
