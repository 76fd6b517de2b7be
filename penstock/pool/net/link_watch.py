"""One thread for all links of a process: their deadlines and messages on time, and connections on which nothing is
under way, which have no thread of their own."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import os
import select
import threading
import time
from collections.abc import Callable
from typing import Protocol

from penstock.process.guarded_thread import GuardedThread, count_failure
from penstock.process.rate_limited_log import RateLimitedLog
from penstock.process.shared import Shared

rare = RateLimitedLog(logging.getLogger(__name__))

LOOK_S = 1.0
EVENTS_MAX = 256
JOIN_S = 5.0
_READABLE = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLONESHOT
_ENDED = select.EPOLLRDHUP | select.EPOLLONESHOT

Due = Callable[[], float | None]


class Parked(Protocol):
    """A connection without a thread, as this module sees it."""

    def woken(self) -> None:
        """What was watched for has come: it gets a thread again, unless it has one. Must not wait."""


class LinkWatch:
    """Calls `due` of each link on time, and `woken` of parked connections. Any thread may call."""

    def __init__(self) -> None:
        """Raises OSError, and RuntimeError or MemoryError where the operating system starts no thread."""
        self._lock = threading.Lock()
        self._times: dict[Due, float] = {}  # when each is called next, at the latest
        self._order: list[tuple[float, int, Due]] = []  # a heap of the same; some are stale
        self._serial = itertools.count()
        self._parked: dict[int, Parked] = {}  # by file
        self._closed = False
        self._epoll = select.epoll()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._wake, select.EPOLLIN)
        self._thread = GuardedThread("penstock-links", self._watch, restarts=True)
        try:
            self._thread.start()
        except BaseException:
            self._free()
            raise

    def call_by(self, due: Due, when_s: float) -> None:
        """Call `due` at this time of the monotonic clock, or before; it returns when it is to be called again (None:
        not until it is asked for). It must not wait."""
        with self._lock:
            if self._closed or when_s >= self._times.get(due, float("inf")):
                return
            first = not self._order or when_s < self._order[0][0]
            self._note(due, when_s)
            if first:
                os.eventfd_write(self._wake, 1)

    def forget(self, due: Due) -> None:
        """Call `due` no more. A call that has begun may still be under way."""
        with self._lock:
            self._times.pop(due, None)

    def park(self, file: int, connection: Parked) -> None:
        """Wake a connection with this file once, when bytes have come, or its end, until `unpark`. Raises OSError."""
        self._add(file, connection, _READABLE)

    def watch_end(self, file: int, connection: Parked) -> None:
        """As `park`, but only its end wakes it, once. It may be watched already."""
        self.unpark(file)
        self._add(file, connection, _ENDED)

    def _add(self, file: int, connection: Parked, events: int) -> None:
        with self._lock:
            self._parked[file] = connection
            try:
                self._epoll.register(file, events)
            except BaseException:
                del self._parked[file]
                raise

    def unpark(self, file: int) -> None:
        """Watch it no more."""
        with self._lock:
            if self._parked.pop(file, None) is not None:
                with contextlib.suppress(OSError):
                    self._epoll.unregister(file)

    def close(self) -> None:
        """End the thread; no link uses this any more."""
        with self._lock:
            self._closed = True
            os.eventfd_write(self._wake, 1)
        self._thread.join(JOIN_S)

    def _free(self) -> None:
        self._epoll.close()
        os.close(self._wake)

    def _note(self, due: Due, when_s: float) -> None:
        self._times[due] = when_s
        heapq.heappush(self._order, (when_s, next(self._serial), due))

    def _watch(self) -> None:
        while not self._closed:
            for file, _ in self._epoll.poll(self._wait_s(), EVENTS_MAX):
                if file == self._wake:
                    os.eventfd_read(self._wake)
                    continue
                with self._lock:
                    connection = self._parked.get(file)
                if connection is not None:
                    connection.woken()
            for due in self._take_due():
                self._call(due)
        with self._lock:
            self._free()

    def _wait_s(self) -> float:
        with self._lock:
            return max(0.0, min(LOOK_S, self._order[0][0] - time.monotonic())) if self._order else LOOK_S

    def _take_due(self) -> list[Due]:
        found, now_s = [], time.monotonic()
        with self._lock:
            while self._order and self._order[0][0] <= now_s:
                when_s, _, due = heapq.heappop(self._order)
                if self._times.get(due) == when_s:
                    del self._times[due]
                    found.append(due)
        return found

    def _call(self, due: Due) -> None:
        """A link that fails delays no other one."""
        try:
            again_s = due()
        except Exception as error:  # noqa: BLE001 (of one link; it is called again)
            count_failure("penstock-links")
            rare.warning("due", "watching a link failed: %r", error)
            again_s = time.monotonic() + LOOK_S
        if again_s is not None:
            self.call_by(due, again_s)


link_watch: Shared[LinkWatch] = Shared(LinkWatch, LinkWatch.close)
