"""A share follows a member that degrades or recovers, and nothing else moves it."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from penstock.core.bandwidth import CHANGE_EVERY_S, DEGRADED, FLOOR, MemberBandwidth


class Load:
    """A member that is read without pause at a rate that the test sets, looked at once a second."""

    def __init__(self, given: float) -> None:
        self.bandwidth = MemberBandwidth(given)
        self.now_s = 0.0
        self.bytes = 0.0
        self.busy_s = 0.0

    def run(self, rate: float, seconds: int, busy: float = 1.0) -> list[float]:
        """Changes of the share within these seconds."""
        changes = []
        for _ in range(seconds):
            self.now_s += 1.0
            self.bytes += rate * busy
            self.busy_s += busy
            self.bandwidth.observe(int(self.bytes), self.busy_s)
            change = self.bandwidth.change(self.now_s)
            if change is not None:
                changes.append(change)
        return changes


def test_a_member_at_its_bandwidth_or_above_keeps_its_share() -> None:
    load = Load(1e9)
    assert load.run(1e9, 60) == load.run(3e9, 60) == []
    assert load.bandwidth.observed_bytes_per_s == pytest.approx(3e9, rel=0.01)


def test_a_degraded_member_gives_up_share_and_gets_it_back() -> None:
    load = Load(1e9)
    load.run(1e9, 20)
    falling = load.run(0.4e9, 60)
    assert falling[-1] == pytest.approx(0.4e9, rel=0.1) and len(falling) <= 3
    rising = load.run(1e9, 60)
    assert rising[-1] == load.bandwidth.share_bytes_per_s == 1e9 and len(rising) <= 4


def test_what_it_is_given_later_is_its_share_unless_that_fell() -> None:
    load = Load(1e8)
    assert load.bandwidth.give(1e9) == load.bandwidth.share_bytes_per_s == 1e9
    assert load.run(1e9, 60) == []
    load.run(0.4e9, 60)
    fallen = load.bandwidth.share_bytes_per_s
    assert fallen < 0.5e9 and load.bandwidth.give(2e9) == fallen
    assert load.run(2e9, 60)[-1] == 2e9


def test_changes_come_no_faster_than_the_limit() -> None:
    load = Load(1e9)
    at: list[float] = []
    generator = random.Random(3)
    for _ in range(300):
        if load.run(generator.choice((0.1e9, 1e9)), 1):
            at.append(load.now_s)
    assert all(later - earlier >= CHANGE_EVERY_S for earlier, later in pairwise(at))


def test_noise_within_the_band_moves_nothing() -> None:
    load = Load(1e9)
    generator = random.Random(4)
    for _ in range(300):
        assert load.run(generator.uniform(DEGRADED + 0.02, 1.1) * 1e9, 1) == []


def test_an_idle_member_is_not_judged() -> None:
    load = Load(1e9)
    assert load.run(1e6, 100, busy=0.001) == []
    assert load.bandwidth.observed_bytes_per_s is None


def test_a_member_that_stalls_keeps_a_floor_and_comes_back() -> None:
    load = Load(1e9)
    assert load.run(0.0, 30)[-1] == FLOOR * 1e9
    assert load.run(1e9, 60)[-1] == 1e9


def test_counters_that_start_again_are_understood() -> None:
    bandwidth = MemberBandwidth(1e9)
    bandwidth.observe(10**9, 1.0)
    bandwidth.observe(0, 0.0)
    bandwidth.observe(10**9, 1.0)
    assert bandwidth.observed_bytes_per_s == pytest.approx(1e9)
    with pytest.raises(ValueError, match="above 0"):
        MemberBandwidth(0.0)
