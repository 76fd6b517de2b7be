"""Turns at work that holds the interpreter, by source address: who asks in a loop waits for its own address only."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict, deque
from collections.abc import Iterator


class Turns:
    """At most `at_once` callers work; of those that wait each source address in turn has the next one. Any thread may
    call; the work must not wait for anybody."""

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

    @contextlib.contextmanager
    def turn(self, source: str) -> Iterator[None]:
        """Wait for a turn, have it, and pass it on at the end."""
        mine: threading.Event | None = None
        with self._lock:
            if self._working < self._at_once:
                self._working += 1
            else:
                mine = threading.Event()
                self._waiting.setdefault(source, deque()).append(mine)
        if mine is not None:
            mine.wait()
        try:
            yield
        finally:
            self._pass_on()

    def _pass_on(self) -> None:
        with self._lock:
            if not self._waiting:
                self._working -= 1
                return
            source, waiting = self._waiting.popitem(last=False)
            following = waiting.popleft()
            if waiting:
                self._waiting[source] = waiting
        following.set()
