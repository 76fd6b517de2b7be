"""One object for all its users in a process: made for the first of them, closed after the last."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Shared(Generic[T]):
    """Any thread may call. A forked child has one of its own: threads do not survive a fork."""

    def __init__(self, make: Callable[[], T], close: Callable[[T], None]) -> None:
        self._make, self._close = make, close
        self._lock = threading.Lock()
        self._there: tuple[int, T] | None = None  # of the process with this id
        self._users = 0

    def acquire(self) -> T:
        """The object, made if nobody has it; `release` must follow. Raises what making it raises."""
        with self._lock:
            if self._there is None or self._there[0] != os.getpid():
                self._there, self._users = (os.getpid(), self._make()), 0
            self._users += 1
            return self._there[1]

    def release(self, one: T) -> None:
        """One of the users of this object needs it no more."""
        with self._lock:
            if self._there is None or self._there[1] is not one:
                return
            self._users -= 1
            if self._users:
                return
            self._there = None
        self._close(one)
