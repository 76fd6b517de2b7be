"""Shares the event loop's time among connections that send, so that answers go on however much comes in.

TURN-1  In one iteration of the loop, parsing takes about TURN_S, request by request and slice by slice; what has come
        beyond that waits, and its connection is not read meanwhile.
TURN-2  Addresses take turns, and the connections of an address among themselves: many connections of one address do
        not delay another address's.
Verification: tests/server/test_connection_turns.py.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Protocol

TURN_S = 0.001
REQUEST_S = 0.0005  # what starting a request costs the loop later, counted with its parsing


class Sender(Protocol):
    """A connection that sends."""

    address: str

    def take(self) -> bool:
        """Parse a slice of what has come; whether there is more. Never raises."""


class Turns:
    """Lives on one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, now_s: Callable[[], float] = time.perf_counter) -> None:
        self._loop = loop
        self._now_s = now_s
        self._queues: OrderedDict[str, deque[Sender]] = OrderedDict()  # by address; none is empty
        self._used_s = 0.0
        self._scheduled = False
        self.waiting = 0  # connections whose data waits

    def received(self, sender: Sender) -> bool:
        """Something has come, and nothing of this connection waits yet. Parse it now, if this iteration has time for
        it; returns whether some of it waits."""
        if not self._queues:
            while self._used_s < TURN_S:
                if not self._take(sender):
                    return False
        self._queues.setdefault(sender.address, deque()).append(sender)
        self.waiting += 1
        self._schedule()
        return True

    def request(self) -> None:
        """A request is being started."""
        self._used_s += REQUEST_S

    def _take(self, sender: Sender) -> bool:
        self._schedule()
        begin_s = self._now_s()
        more = sender.take()
        self._used_s += self._now_s() - begin_s
        return more

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._next_iteration)

    def _next_iteration(self) -> None:
        self._scheduled = False
        self._used_s = 0.0
        while self._queues and self._used_s < TURN_S:
            address, queue = next(iter(self._queues.items()))
            sender = queue.popleft()
            if self._take(sender):
                queue.append(sender)
            else:
                self.waiting -= 1
            if queue:
                self._queues.move_to_end(address)
            else:
                del self._queues[address]
        if self._queues:
            self._schedule()
