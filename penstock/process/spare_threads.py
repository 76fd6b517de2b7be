"""Threads that rest for some seconds after their work, for the next piece of it: to wake one costs a fifth of starting
one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

from penstock.process.guarded_thread import GuardedThread

SPARE_MAX = 4
REST_S = 5.0

Work = Callable[[], None]


class _Rest:
    """A thread that rests: `woken` is free once it has work, or is to end."""

    __slots__ = ("name", "woken", "work")

    def __init__(self) -> None:
        self.work: Work | None = None
        self.name = ""
        self.woken = threading.Lock()
        self.woken.acquire()


class SpareThreads:
    """Each piece of work has a thread of its own while it runs. Any thread may call."""

    def __init__(self, kind: str) -> None:
        """`kind` names the threads while they rest, and failures of work in the metrics (`GuardedThread`)."""
        self._kind = kind
        self._lock = threading.Lock()
        self._resting: list[_Rest] = []
        self._closed = False

    @property
    def resting(self) -> int:
        """Threads without work; at most SPARE_MAX."""
        return len(self._resting)

    def run(self, name: str, work: Work) -> None:
        """Run `work` on a thread that has this name meanwhile; an exception in it is logged and counted, and ends its
        thread. Raises RuntimeError or MemoryError where there is no thread to spare, and the operating system starts
        none."""
        with self._lock:
            rest = self._resting.pop() if self._resting else None  # the one whose memory is in the caches most likely
        if rest is None:
            GuardedThread(name, partial(self._work, work), kind=self._kind).start()
        else:
            rest.name, rest.work = name, work
            rest.woken.release()

    def close(self) -> None:
        """End the threads that rest, and each other one after its work."""
        with self._lock:
            self._closed = True
            resting, self._resting = self._resting, []
        for rest in resting:
            rest.woken.release()

    def _work(self, first: Work) -> None:
        work: Work | None = first
        while work is not None:
            work()
            work = self._next()

    def _next(self) -> Work | None:
        """Rest until there is work; None where none has come for REST_S, or enough threads rest already."""
        rest, thread = _Rest(), threading.current_thread()
        with self._lock:
            if self._closed or len(self._resting) >= SPARE_MAX:
                return None
            self._resting.append(rest)
        thread.name = self._kind
        if not rest.woken.acquire(timeout=REST_S):
            with self._lock:
                if rest in self._resting:
                    self._resting.remove(rest)
                    return None
            rest.woken.acquire()  # it was taken just now, so that work comes
        if rest.work is not None:
            thread.name = rest.name
        return rest.work
