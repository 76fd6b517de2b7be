"""A link that is measured while a host is busy: the fastest measurement counts, and there are further ones."""

from __future__ import annotations

import random
from itertools import pairwise

from penstock.core.bandwidth import AGAIN_MAX, AGAIN_S, RECOVERED, MeasuredLink


def test_the_fastest_measurement_counts_within_what_the_members_give() -> None:
    link = MeasuredLink(2e9)
    assert link.measured(1e6, 0.0) and link.weight == 1e6
    assert link.measured(1e9, 10.0) and link.weight == 1e9
    assert not link.measured(0.2e9, 20.0) and link.weight == 1e9
    assert link.seen(9e9) and link.weight == 2e9
    assert not link.seen(12e9) and link.weight == 2e9


def test_members_that_are_not_known_bound_nothing() -> None:
    link = MeasuredLink(0.0)
    assert link.measured(5e9, 0.0) and link.weight == 5e9 and link.due(AGAIN_S)


def test_noise_moves_nothing() -> None:
    link, generator = MeasuredLink(0.0), random.Random(1)
    link.measured(1e9, 0.0)
    assert not any(link.seen(generator.uniform(0.5, RECOVERED) * 1e9) for _ in range(1000))


def test_it_is_measured_again_with_growing_pauses_a_few_times() -> None:
    link, at = MeasuredLink(1e9), []
    for now_s in range(10_000):
        if link.due(now_s):
            at.append(now_s)
            link.measured(1e6 if len(at) % 2 else 0.0, now_s)
    assert [later - earlier for earlier, later in pairwise(at)] == [AGAIN_S * 2**number for number in range(AGAIN_MAX)]


def test_it_is_not_measured_again_while_the_members_limit() -> None:
    link = MeasuredLink(1e9)
    link.measured(0.5e9, 0.0)
    assert link.due(AGAIN_S)
    link.seen(1e9)
    assert not link.due(AGAIN_S)
