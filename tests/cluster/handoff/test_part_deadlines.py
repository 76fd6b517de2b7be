"""Deadlines: called in order, whatever the number; cancelled ones hold nothing."""

from __future__ import annotations

import math
import threading
import weakref
from functools import partial

from penstock.cluster.handoff.deadlines import SWEEP, Deadlines
from tests.asking import WAIT_S


class Held:
    """Something that a deadline is about."""

    def late(self) -> None:
        raise AssertionError("a cancelled deadline was called")


def _fails() -> None:
    raise ZeroDivisionError


def test_numbers_that_no_clock_takes_and_actions_that_raise_stop_nothing() -> None:
    called: list[str] = []
    last = threading.Event()
    deadlines = Deadlines("test-deadlines")
    for delay_s in (1e300, math.inf, 1e18):
        deadlines.after(delay_s, partial(called.append, "never"))
    for delay_s in (math.nan, -1.0, 0.0):
        deadlines.after(delay_s, partial(called.append, "now"))
    deadlines.after(0.0, _fails)
    deadlines.after(0.01, last.set)
    assert last.wait(WAIT_S)
    assert called == ["now"] * 3
    deadlines.close(WAIT_S)


def test_cancelled_ones_hold_nothing_and_are_swept() -> None:
    deadlines = Deadlines("test-deadlines")
    gone = []
    for _ in range(1000):
        held = Held()
        gone.append(weakref.ref(held))
        deadlines.after(600.0, held.late).cancel()
        del held
    assert not any(one() for one in gone)
    assert len(deadlines) <= 2 * SWEEP + 2
    deadlines.close(WAIT_S)
    assert not len(deadlines)
