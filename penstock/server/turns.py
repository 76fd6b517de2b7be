"""Shares the event loop's time among sending connections, so that answers continue under any incoming load.

TURN-1  In each WINDOW_S, parsing takes about TURN_S, request by request and slice by slice. Data beyond that waits for
        the next window, and its connection is not read meanwhile. The rest of a window belongs to answers and to other
        threads: an event loop that is never idle reacquires Python's interpreter lock before a waiting thread has woken
        up, and the engine makes no progress (measured: 200 ms at a time beside four pipelining connections).
TURN-2  Addresses take turns, and so do the connections of an address: many connections of one address do not delay
        another address's.

Verification: tests/server/test_connection_turns.py; `python -m tests.server.attacks` measures it.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import Protocol

WINDOW_S = 0.002
TURN_S = 0.001
REQUEST_S = 0.0005  # what starting a request costs the loop later; counted with its parsing


class Sender(Protocol):
    """A connection that receives data from its client."""

    address: str

    def take(self) -> bool:
        """Parse one slice of the received data; returns whether there is more. Never raises."""


class Turns:
    """Lives on one event loop, and uses its clock."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._queues: OrderedDict[str, OrderedDict[Sender, None]] = OrderedDict()  # by address; no value is empty
        self._window_end_s = loop.time()
        self._used_s = 0.0  # time used in this window
        self._scheduled = False
        self.waiting = 0  # connections with waiting data

    def received(self, sender: Sender) -> bool:
        """The connection received data while none of it was waiting. Parse it now if this window has time left; returns
        whether some of it still waits."""
        if not self._queues:
            while self._has_time():
                if not self._take(sender):
                    return False
        self._wait(sender)
        self._schedule()
        return True

    def forget(self, sender: Sender) -> None:
        """The connection has no waiting data any more."""
        queue = self._queues.get(sender.address)
        if queue is not None and sender in queue:
            del queue[sender]
            self.waiting -= 1
            if not queue:
                del self._queues[sender.address]

    def request(self) -> None:
        """A request is being started; count its cost."""
        self._used_s += REQUEST_S

    def _has_time(self) -> bool:
        now_s = self._loop.time()
        if now_s >= self._window_end_s:
            self._window_end_s, self._used_s = now_s + WINDOW_S, 0.0
        return self._used_s < TURN_S

    def _take(self, sender: Sender) -> bool:
        begin_s = self._loop.time()
        more = sender.take()
        self._used_s += self._loop.time() - begin_s
        return more

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_at(self._window_end_s, self._next_window)

    def _next_window(self) -> None:
        self._scheduled = False
        while self._queues and self._has_time():
            address, queue = next(iter(self._queues.items()))
            sender, _ = queue.popitem(last=False)
            self.waiting -= 1
            if queue:
                self._queues.move_to_end(address)
            else:
                del self._queues[address]
            if self._take(sender):
                self._wait(sender)
        if self._queues:
            self._schedule()

    def _wait(self, sender: Sender) -> None:
        queue = self._queues.setdefault(sender.address, OrderedDict())
        if sender not in queue:
            queue[sender] = None
            self.waiting += 1
