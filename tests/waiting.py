"""A wait for a condition, with a deadline: tests wait for events, not for the clock."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable

WAIT_S = 30.0


def wait_until(
    condition: Callable[[], bool], what: str, timeout_s: float = WAIT_S, look_every_s: float = 0.001
) -> None:
    """Returns when the condition holds; fails after `timeout_s`, with `what` should have happened."""
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, f"not within {timeout_s:g} s: {what}"
        time.sleep(look_every_s)


def read_until_ended(sock: socket.socket) -> None:
    """Read until the other side has ended the connection: in order, or by a reset, as when it left bytes unread."""
    with contextlib.suppress(ConnectionError):
        while sock.recv(4096):
            pass
