"""A node's connections that wait for a message have no thread of their own: one thread watches all of them.

A connection gets a thread when a message arrives, and gives it back when none has come for PARK_S. At most
`threads_max` connections have one at the same time, and those of one address at most half of that; further ones wait
for their turn, by address. So thousands of clients cost a node files and little else, and what a client can make it do
at the same time is bounded as before.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections import Counter, OrderedDict, deque
from typing import Protocol

from penstock.pool.net import wire
from penstock.process.guarded_thread import GuardedThread

PARK_S = 0.25
THREADS_MAX = 1024
LOOK_S = 1.0
EVENTS_MAX = 256
_READABLE = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLONESHOT


class Idle(Protocol):
    """A connection as this module sees it."""

    @property
    def source(self) -> str:
        """The address that its share is counted under."""

    def fileno(self) -> int:
        """Of its socket."""

    def serve(self, expired: bool) -> None:
        """Have a thread that serves it, and calls `park` or `ended` at its end; `expired`: no message came for
        IDLE_S. Raises RuntimeError or MemoryError where the operating system starts no thread."""

    def end(self) -> None:
        """End it on the caller's thread, which calls `ended`."""


class IdleConnections:
    """Gives connections of one node threads and takes them back. Any thread may call."""

    def __init__(self, threads_max: int = THREADS_MAX) -> None:
        self._threads_max = threads_max
        self._lock = threading.Lock()
        self._epoll = select.epoll()
        self._wake = os.eventfd(0)  # `close` writes to it
        self._epoll.register(self._wake, select.EPOLLIN)
        self._parked: OrderedDict[int, tuple[Idle, float]] = OrderedDict()  # by file: when it is ended; in that order
        self._registered: set[int] = set()
        self._working: Counter[str] = Counter()  # connections with a thread, by address
        self._threads = 0
        self._waiting: OrderedDict[str, deque[tuple[Idle, bool]]] = OrderedDict()  # for a thread
        self._closed = False
        self._thread = GuardedThread("penstock-node-idle", self._watch, restarts=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the watching thread runs."""
        return self._thread.alive

    @property
    def threads(self) -> int:
        """Connections that have a thread."""
        return self._threads

    def begin(self, connection: Idle) -> None:
        """Serve a new connection now, or as soon as a thread may be used for it. Raises as `Idle.serve`."""
        with self._lock:
            mine = self._take(connection.source)
            if not mine:
                self._waiting.setdefault(connection.source, deque()).append((connection, False))
        if not mine:
            return
        try:
            connection.serve(False)
        except BaseException:
            self._freed(connection.source)
            raise

    def park(self, connection: Idle) -> None:
        """The thread of this connection ends: watch the connection until a message comes."""
        file = connection.fileno()
        with self._lock:
            known = file in self._registered
            self._registered.add(file)
            self._parked[file] = connection, time.monotonic() + wire.IDLE_S
        (self._epoll.modify if known else self._epoll.register)(file, _READABLE)
        self._freed(connection.source)

    def ended(self, connection: Idle, file: int) -> None:
        """A connection with a thread has ended; its socket, which had this file, is closed after this call."""
        with self._lock:
            if file in self._registered:
                self._registered.discard(file)
                self._epoll.unregister(file)
        self._freed(connection.source)

    def close(self, timeout_s: float) -> None:
        """Stop watching; every connection has ended."""
        if self._closed:
            return
        self._closed = True
        os.eventfd_write(self._wake, 1)
        self._thread.join(timeout_s)
        if not self._thread.alive:
            self._epoll.close()
            os.close(self._wake)

    def _take(self, source: str) -> bool:
        """Count one more thread for an address, if it may have one; the lock is held."""
        if self._threads >= self._threads_max or self._working[source] >= max(1, self._threads_max // 2):
            return False
        self._threads += 1
        self._working[source] += 1
        return True

    def _freed(self, source: str) -> None:
        """A thread of this address is free: a connection that waits gets it."""
        begun: list[tuple[Idle, bool]] = []
        with self._lock:
            self._give(source)
            for other in list(self._waiting):
                if not self._take(other):
                    continue
                waiting = self._waiting[other]
                begun.append(waiting.popleft())
                if waiting:
                    self._waiting.move_to_end(other)
                else:
                    del self._waiting[other]
        for connection, expired in begun:
            self._serve_or_end(connection, expired)

    def _give(self, source: str) -> None:
        self._threads -= 1
        self._working[source] -= 1
        if not self._working[source]:
            del self._working[source]

    def _serve_or_end(self, connection: Idle, expired: bool) -> None:
        try:
            connection.serve(expired)
        except (RuntimeError, MemoryError):  # no thread could be started: this one ends, others go on
            connection.end()

    def _watch(self) -> None:
        while not self._closed:
            for file, _ in self._epoll.poll(self._wait_s(), EVENTS_MAX):
                self._woken(file, expired=False)
            now_s = time.monotonic()
            for file in self._late(now_s):
                self._woken(file, expired=True)

    def _wait_s(self) -> float:
        with self._lock:
            first = next(iter(self._parked.values()), None)
        return LOOK_S if first is None else max(0.0, min(LOOK_S, first[1] - time.monotonic()))

    def _late(self, now_s: float) -> list[int]:
        late = []
        with self._lock:
            for file, (_, until_s) in self._parked.items():
                if until_s > now_s:
                    break
                late.append(file)
        return late

    def _woken(self, file: int, expired: bool) -> None:
        with self._lock:
            parked = self._parked.pop(file, None)
            if parked is None:
                return
            connection = parked[0]
            mine = self._take(connection.source)
            if not mine:
                self._waiting.setdefault(connection.source, deque()).append((connection, expired))
        if mine:
            self._serve_or_end(connection, expired)
