"""The pacer on a clock that jumps, and for real."""

from __future__ import annotations

import threading
import time

import pytest

from penstock.pacing import CREDIT_S, PIECE_BYTES, Pacer

RATE = 100e6


class Clock:
    """Sleeps at once; oversleeps by `late_s`, as a busy machine does."""

    def __init__(self, late_s: float = 0.0) -> None:
        self.now_s, self.late_s = 100.0, late_s

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds + self.late_s


@pytest.mark.parametrize("late_s", [0.0, 0.0001, 0.001])
def test_a_busy_link_is_used_fully_and_never_exceeded(late_s: float) -> None:
    clock = Clock(late_s)
    pacer = Pacer(RATE, clock, clock.sleep)
    begin_s, ready_s, sent = clock(), clock(), 0
    for _ in range(2000):
        pacer.wait(PIECE_BYTES, ready_s)
        sent += PIECE_BYTES
        assert sent <= RATE * (clock() - begin_s + 1e-9)
    assert sent / RATE / (clock() - begin_s) >= 0.98


def test_idle_time_is_not_saved_up() -> None:
    clock = Clock()
    pacer = Pacer(RATE, clock, clock.sleep)
    pacer.wait(PIECE_BYTES, clock())
    clock.now_s += 10.0
    begin_s = clock()
    for _ in range(10):
        pacer.wait(PIECE_BYTES, begin_s)
    assert clock() - begin_s >= 10 * PIECE_BYTES / RATE - 1e-9


def test_a_late_sender_catches_up_by_the_credit_at_most() -> None:
    clock = Clock()
    pacer = Pacer(RATE, clock, clock.sleep)
    ready_s = clock()
    clock.now_s += 1.0
    begin_s = clock()
    for _ in range(100):
        pacer.wait(PIECE_BYTES, ready_s)
    assert clock() - begin_s >= 100 * PIECE_BYTES / RATE - CREDIT_S - 1e-9


def test_several_senders_share_the_rate() -> None:
    pacer = Pacer(400e6)
    begin_s = time.monotonic()

    def send() -> None:
        for _ in range(150):
            pacer.wait(PIECE_BYTES, begin_s)

    threads = [threading.Thread(target=send) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20.0)
    assert time.monotonic() - begin_s >= 600 * PIECE_BYTES / 400e6 - CREDIT_S


def test_a_pace_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="above 0"):
        Pacer(0.0)
