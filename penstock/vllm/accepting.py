"""Finds a worker's scheduler among incoming connections; foreign or silent connections cannot stop the start-up."""

from __future__ import annotations

import logging
import selectors
import socket
import time
from collections.abc import Callable

from penstock.process.rate_limited_log import RateLimitedLog
from penstock.vllm.link import Greet, GreetingReader, Link, LinkError, check_same_user

log = logging.getLogger(__name__)
warnings = RateLimitedLog(log)

LOOK_S = 0.25  # interval at which the waiting loop checks whether to stop
_NAME_CHARS_SHOWN = 200
GREET_TIMEOUT_S = 5.0  # from the connection to the end of the first message
CANDIDATES_MAX = 64  # connections of this user without a greeting; a new one replaces the oldest
ACCEPT_AT_ONCE = 16  # accepted at most, before the accepted ones are read


class _Candidate:
    """A connection without a complete greeting."""

    def __init__(self, connected: socket.socket) -> None:
        self.until_s = time.monotonic() + GREET_TIMEOUT_S
        self.greeting = GreetingReader(connected)


class _Candidates:
    """The connections without a complete greeting, oldest first, and a selector that watches them."""

    def __init__(self, selector: selectors.BaseSelector, engine_id: str) -> None:
        self._selector = selector
        self._engine_id = engine_id
        self._waiting: dict[socket.socket, _Candidate] = {}

    def add(self, connected: socket.socket) -> None:
        self._waiting[connected] = _Candidate(connected)
        self._selector.register(connected, selectors.EVENT_READ)

    def take(self, one: socket.socket) -> Link | None:
        """Read what the connection has sent; returns a link once its greeting is complete and correct."""
        if one not in self._waiting:
            return None
        try:
            if not _greeted(self._waiting[one].greeting, self._engine_id):
                return None
        except (LinkError, OSError) as error:
            self._drop(one, str(error))
            return None
        del self._waiting[one]
        one.setblocking(True)
        return Link(one)

    def drop_silent(self) -> None:
        """Close connections that were silent too long, and the oldest beyond CANDIDATES_MAX."""
        for one in [one for one, its in self._waiting.items() if its.until_s <= time.monotonic()]:
            self._drop(one, f"it sent no greeting within {GREET_TIMEOUT_S:g} s")
        while len(self._waiting) > CANDIDATES_MAX:
            self._drop(next(iter(self._waiting)), f"more than {CANDIDATES_MAX} connections have not greeted")

    def close(self) -> None:
        for one in self._waiting:
            one.close()

    def _drop(self, one: socket.socket, why: str) -> None:
        del self._waiting[one]
        self._selector.unregister(one)
        one.close()
        warnings.warning("stranger", "a connection to Penstock's worker was closed: %s", why)


def accept_scheduler(listener: socket.socket, engine_id: str, stopped: Callable[[], bool]) -> Link | None:
    """The first connection that greets as the scheduler of `engine_id`; None once `stopped`. Has no deadline of its
    own: vLLM starts its scheduler whenever it is ready."""
    listener.setblocking(False)
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        candidates = _Candidates(selector, engine_id)
        try:
            while not stopped():
                for key, _ in selector.select(LOOK_S):
                    found = key.fileobj
                    assert isinstance(found, socket.socket)
                    if found is listener:
                        for connected in _accept(listener):
                            candidates.add(connected)
                    else:
                        link = candidates.take(found)
                        if link is not None:
                            return link
                candidates.drop_silent()
        finally:
            candidates.close()
    return None


def _accept(listener: socket.socket) -> list[socket.socket]:
    """The new connections of this user; others are closed. Empty when the listener was shut down, which `stopped`
    reports."""
    accepted = []
    for _ in range(ACCEPT_AT_ONCE):
        try:
            connected, _ = listener.accept()
        except BlockingIOError:
            break
        except OSError:
            time.sleep(0.01)
            break
        try:
            check_same_user(connected)
        except (LinkError, OSError) as error:
            connected.close()
            warnings.warning("user", "a connection to Penstock's worker was closed: %s", error)
            continue
        connected.setblocking(False)
        accepted.append(connected)
    return accepted


def _greeted(greeting: GreetingReader, engine_id: str) -> bool:
    """Whether the scheduler's greeting is complete. Raises LinkError if the first message is anything else."""
    message = greeting.more()
    if message is None:
        return False
    if not isinstance(message, Greet):
        raise LinkError(f"its first message is a {type(message).__name__}, not a Greet")
    if message.engine_id != engine_id:
        raise LinkError(f"it greets engine {message.engine_id[:_NAME_CHARS_SHOWN]!r}, this is {engine_id!r}")
    return True
