"""Counted work: how many functions a piece of code calls on this thread, which holds on any machine."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType


def python_calls(work: Callable[[], object]) -> int:
    """Calls of Python functions during `work`."""
    return _events(work, ("call",))


def all_calls(work: Callable[[], object]) -> int:
    """Calls of Python functions and of built-in ones during `work`."""
    return _events(work, ("call", "c_call"))


def _events(work: Callable[[], object], kinds: tuple[str, ...]) -> int:
    count = 0

    def seen(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        count += event in kinds

    before = sys.getprofile()
    sys.setprofile(seen)
    try:
        work()
    finally:
        sys.setprofile(before)
    return count
