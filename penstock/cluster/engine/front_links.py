"""An engine's connections to the front processes of its router: one for each, opened again for as long as it is asked.

The router says how many there are when the engine registers. Placements are numbered by the router, and come over any
of the connections; the engine's heartbeats to the router say the highest number that came.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol

LINKED_S = 2.0  # after so long without a connection to a front, the engine serves the others


class Link(Protocol):
    """A connection to one front: `EngineRegistration`."""

    registered: threading.Event
    ended: threading.Event

    def close(self, timeout_s: float, why: str = ...) -> None:
        """End it, and what it serves."""


class FrontLinks:
    """Any thread may call."""

    def __init__(self, link: Callable[[int], Link]) -> None:
        """`link` opens the connection to a front."""
        self.highest = 0  # number of a placement
        self._link = link
        self._links: dict[int, Link] = {}
        self._opened_s = 0.0
        self._closed = False
        self._lock = threading.Lock()

    def open(self, fronts: int) -> None:
        """Have connections to the fronts 0 to `fronts` - 1: the engine registered with their router, which numbers
        placements from 1 on."""
        with self._lock:
            if self._closed:
                return
            self.highest = 0
            self._opened_s = time.monotonic()
            gone = [n for n, link in self._links.items() if n >= fronts or link.ended.is_set()]
            left = [self._links.pop(number) for number in gone]
            for number in range(fronts):
                if number not in self._links:
                    self._links[number] = self._link(number)
        for link in left:
            link.close(LINKED_S)

    def placed(self, number: int) -> None:
        """A placement came over one of the connections."""
        with self._lock:
            self.highest = max(self.highest, number)

    def all_registered(self, now: float) -> bool:
        """Whether requests can come over every connection, or one was waited for long enough."""
        with self._lock:
            whole = all(link.registered.is_set() for link in self._links.values())
            return whole or now - self._opened_s > LINKED_S

    def close(self, timeout_s: float, why: str) -> None:
        """End all connections, and what they serve."""
        with self._lock:
            self._closed = True
            links, self._links = list(self._links.values()), {}
        for link in links:
            link.close(timeout_s, why)
