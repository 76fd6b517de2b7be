"""What a link or a device moved while it was busy, and what that says of its speed, on a clock of the test's own."""

from __future__ import annotations

import math

import pytest

from penstock.core.bandwidth import FORGET_S, LOAD_S, BusyMeter, LinkSpeed


def test_one_transfer_alone_shows_nothing_of_what_overlaps_them() -> None:
    meter = BusyMeter(busy_from=2, failed_time=True)
    meter.started(0.0)
    meter.ended(1, 100, 5.0)
    assert meter.observed(9.0) == (0, 0.0)
    meter.started(10.0)
    meter.started(11.0)
    assert meter.observed(13.0) == (0, 2.0), "a device that answers nothing is seen to be slow"
    meter.started(13.0)
    meter.ended(1, 100, 14.0)
    meter.ended(2, 150, 15.0)
    assert meter.observed(20.0) == (250, 4.0) and meter.in_flight == 0


@pytest.mark.parametrize("failed_time", [True, False])
def test_the_time_before_a_failure_counts_where_it_shall(failed_time: bool) -> None:
    meter = BusyMeter(busy_from=1, failed_time=failed_time)
    meter.started(0.0)
    meter.started(0.5)
    meter.ended(1, 100, 1.0)
    meter.ended(1, 0, 31.0)
    meter.started(40.0)
    meter.ended(1, 100, 41.0)
    assert meter.observed(50.0) == (200, 32.0 if failed_time else 2.0)


def test_a_link_is_as_fast_as_it_was_seen_until_that_is_long_ago() -> None:
    link = LinkSpeed(7.0, 0.0)
    assert link.bytes_per_s(1.0) == 7.0 and link.load_bytes_per_s(1.0) == 0.0
    link.started(10.0)
    link.ended(200, 10.1)
    assert link.bytes_per_s(10.1) == 7.0, "not busy for long enough"
    link.started(20.0)
    link.ended(2000, 21.0)
    assert link.bytes_per_s(21.0) == pytest.approx(2000.0)
    assert link.bytes_per_s(21.0 + FORGET_S) != 7.0 == link.bytes_per_s(21.1 + FORGET_S)
    link.started(100.0)
    link.ended(500, 101.0)
    assert link.bytes_per_s(101.0) == pytest.approx(500.0), "nothing of what was seen before is left"


def test_the_load_of_a_link_decays() -> None:
    link = LinkSpeed(0.0, 0.0)
    link.started(0.0)
    link.ended(1000, 1.0)
    first = link.load_bytes_per_s(1.0)
    assert first == 1000 / LOAD_S
    assert link.load_bytes_per_s(1.0 + LOAD_S) == pytest.approx(first / math.e)
    link.started(1.0)
    link.ended(0, 1.0 + LOAD_S)
    assert link.load_bytes_per_s(1.0 + LOAD_S) == pytest.approx(first / math.e), "a failed one carries nothing"
