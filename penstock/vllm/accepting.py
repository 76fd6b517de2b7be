"""How a worker finds its scheduler among those who connect: a stranger, or one who is silent, ends nobody's start."""

from __future__ import annotations

import logging
import selectors
import socket
import time
from collections.abc import Callable

from penstock.rate_limited_log import RateLimitedLog
from penstock.vllm.link import Greet, Link, LinkError, check_same_user

log = logging.getLogger(__name__)
warnings = RateLimitedLog(log)

LOOK_S = 0.25  # how often the end of the wait is looked at
GREET_TIMEOUT_S = 5.0  # for the first message; one that has begun to arrive has to be there `READ_TIMEOUT_S` later
READ_TIMEOUT_S = 1.0
_NAME_CHARS_SHOWN = 200
CANDIDATES_MAX = 16  # connections that have not greeted; the oldest gives way to a new one


def accept_scheduler(listener: socket.socket, engine_id: str, stopped: Callable[[], bool]) -> Link | None:
    """The first connection that greets as the scheduler of `engine_id`; None once `stopped`. Waits for it without a
    deadline: vLLM begins its scheduler when it likes."""
    candidates: dict[socket.socket, float] = {}  # until when each has to greet, the oldest first
    listener.setblocking(False)
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)

        def drop(one: socket.socket, why: str) -> None:
            del candidates[one]
            selector.unregister(one)
            one.close()
            warnings.warning("stranger", "a connection to Penstock's worker was closed: %s", why)

        try:
            while not stopped():
                for key, _ in selector.select(LOOK_S):
                    found = key.fileobj
                    assert isinstance(found, socket.socket)
                    if found is listener:
                        connected = _accept(listener)
                        if connected is not None:
                            candidates[connected] = time.monotonic() + GREET_TIMEOUT_S
                            selector.register(connected, selectors.EVENT_READ)
                    elif found in candidates:
                        try:
                            link = _greeted(found, engine_id)
                        except (LinkError, OSError) as error:
                            drop(found, str(error))
                            continue
                        del candidates[found]
                        return link
                for one in [one for one, until_s in candidates.items() if until_s <= time.monotonic()]:
                    drop(one, f"it said nothing for {GREET_TIMEOUT_S:g} s")
                while len(candidates) > CANDIDATES_MAX:
                    drop(next(iter(candidates)), f"more than {CANDIDATES_MAX} connections have not greeted")
        finally:
            for one in candidates:
                one.close()
    return None


def _accept(listener: socket.socket) -> socket.socket | None:
    """None when whoever connected is gone or belongs to another user, who takes nobody's place among the candidates;
    also when the listener was shut down, which `stopped` says."""
    try:
        connected, _ = listener.accept()
    except OSError:
        time.sleep(0.01)
        return None
    try:
        check_same_user(connected)
    except LinkError as error:
        connected.close()
        warnings.warning("stranger", "a connection to Penstock's worker was closed: %s", error)
        return None
    connected.setblocking(True)
    return connected


def _greeted(connected: socket.socket, engine_id: str) -> Link:
    link = Link(connected)
    message = link.receive(READ_TIMEOUT_S)
    if not isinstance(message, Greet):
        raise LinkError(f"its first message is a {type(message).__name__}, not a Greet")
    if message.engine_id != engine_id:
        raise LinkError(f"it greets engine {message.engine_id[:_NAME_CHARS_SHOWN]!r}, this is {engine_id!r}")
    return link
