"""Summaries against known distributions."""

from __future__ import annotations

import numpy as np
import pytest

from penstock.workloads.statistics import bootstrap, percentile, ratio_of_means, ratio_of_percentiles, summarize


def test_summary_of_known_values() -> None:
    found = summarize(list(range(101)))
    assert (found.count, found.mean, found.p50, found.p90, found.p99) == (101, 50.0, 50.0, 90.0, 99.0)
    assert percentile([1.0, 2.0], 50) == 1.5


def test_bootstrap_covers_the_true_mean_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for i in range(100):
        found = bootstrap(rng.exponential(2.0, size=80).tolist(), seed=i, resamples=300)
        covered += found.low <= 2.0 <= found.high
    assert covered >= 85


def test_paired_ratio_is_tighter_than_the_spread_of_its_parts() -> None:
    rng = np.random.default_rng(2)
    bottom = rng.exponential(1.0, size=60) + 0.01
    found = ratio_of_means(list(0.5 * bottom), list(bottom))
    assert found.value == pytest.approx(0.5)
    assert found.high - found.low < 1e-9


def test_pairs_that_queued_for_each_other_are_one_sample() -> None:
    """A slow second meets all requests of a group: resampled one by one, 20 groups would look like 400 samples."""
    rng = np.random.default_rng(3)
    groups = [f"slice {i // 20}" for i in range(400)]
    bottom = rng.uniform(0.9, 1.1, size=400)
    top = bottom * np.repeat(rng.lognormal(0.0, 0.1, size=20), 20)
    alone = ratio_of_means(list(top), list(bottom))
    grouped = ratio_of_means(list(top), list(bottom), groups=groups)
    assert grouped.value == pytest.approx(alone.value) == pytest.approx(top.mean() / bottom.mean())
    assert grouped.high - grouped.low > 3 * (alone.high - alone.low)
    each = ratio_of_means(list(top), list(bottom), groups=list(range(400)))
    assert (each.low, each.high) == pytest.approx((alone.low, alone.high))


def test_ratio_of_percentiles_says_how_little_the_slowest_few_tell() -> None:
    rng = np.random.default_rng(4)
    bottom = rng.exponential(1.0, size=100) + 0.01
    same = ratio_of_percentiles(list(2 * bottom), list(bottom), 99, resamples=300)
    assert (same.value, same.low, same.high) == pytest.approx((2.0, 2.0, 2.0))
    top = bottom.copy()
    top[np.argmax(top)] *= 3  # one request was unlucky
    found = ratio_of_percentiles(list(top), list(bottom), 99, groups=[i // 2 for i in range(100)], resamples=300)
    assert found.low == pytest.approx(1.0) and found.low < found.value <= found.high


@pytest.mark.parametrize(
    "call",
    [
        lambda: summarize([]),
        lambda: percentile([], 50),
        lambda: bootstrap([]),
        lambda: ratio_of_means([1.0], []),
        lambda: ratio_of_means([1.0], [0.0]),
        lambda: ratio_of_means([1.0], [1.0], groups=[]),
        lambda: ratio_of_percentiles([], [], 99),
        lambda: ratio_of_percentiles([1.0], [0.0], 99),
    ],
)
def test_no_values_are_refused(call) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError):
        call()
