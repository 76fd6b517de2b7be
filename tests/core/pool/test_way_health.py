"""A way of reading that fails several times in a row is off for a while."""

from __future__ import annotations

from penstock.core.pool.way_health import FAILURES_MAX, OFF_S, WayHealth


def test_failures_in_a_row_turn_it_off_for_a_while() -> None:
    way = WayHealth()
    assert [way.failed(1.0) for _ in range(FAILURES_MAX)] == [False] * (FAILURES_MAX - 1) + [True]
    assert way.off(1.0) and way.off(1.0 + OFF_S - 0.1) and not way.off(1.0 + OFF_S)
    assert not way.failed(2.0), "it is off already"


def test_after_the_pause_one_failure_is_enough_and_one_success_heals() -> None:
    way = WayHealth()
    for _ in range(FAILURES_MAX):
        way.failed(0.0)
    assert way.failed(OFF_S + 1.0) and way.off(OFF_S + 2.0)
    way.succeeded()
    assert not any(way.failed(3 * OFF_S) for _ in range(FAILURES_MAX - 1))


def test_successes_in_between_keep_it_on() -> None:
    way = WayHealth()
    for _ in range(50):
        assert not way.failed(0.0) and not way.off(0.0)
        way.succeeded()
