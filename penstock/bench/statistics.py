"""Summaries of measured values: mean, percentiles, and bootstrap confidence intervals."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

BOOTSTRAP_RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Interval:
    """A value and the ends of its confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Summary:
    count: int
    mean: float
    p50: float
    p90: float
    p99: float


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear interpolation between order statistics. Raises ValueError when there are no values."""
    if not len(values):
        raise ValueError("a percentile of no values does not exist")
    return float(np.percentile(np.asarray(values, dtype=float), percent))


def summarize(values: Sequence[float]) -> Summary:
    """Raises ValueError when there are no values."""
    if not len(values):
        raise ValueError("there are no values to summarize")
    array = np.asarray(values, dtype=float)
    p50, p90, p99 = (float(v) for v in np.percentile(array, (50, 90, 99)))
    return Summary(len(array), float(array.mean()), p50, p90, p99)


def bootstrap(
    values: Sequence[float],
    statistic: Callable[[np.ndarray], float] = lambda v: float(np.mean(v)),
    *,
    confidence: float = 0.95,
    seed: int = 0,
    resamples: int = BOOTSTRAP_RESAMPLES,
) -> Interval:
    """Percentile bootstrap of a statistic of independent values."""
    if not len(values):
        raise ValueError("there are no values to resample")
    array = np.asarray(values, dtype=float)
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, len(array), size=(resamples, len(array)))
    draws = np.array([statistic(array[pick]) for pick in picks])
    return _interval(statistic(array), draws, confidence)


def ratio_of_means(
    numerator: Sequence[float],
    denominator: Sequence[float],
    *,
    groups: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    seed: int = 0,
    resamples: int = BOOTSTRAP_RESAMPLES,
) -> Interval:
    """Mean(numerator) / mean(denominator) of paired values (the same request under two systems); pairs are resampled
    together. `groups` names the group of each pair, where those of a group are not independent (they queued for each
    other): then whole groups are resampled. Raises ValueError when the lengths differ, are zero, or the denominator's
    mean is not above zero."""
    if len(numerator) != len(denominator) or not len(numerator):
        raise ValueError(f"pairs are needed; there are {len(numerator)} numerators and {len(denominator)} denominators")
    if groups is not None and len(groups) != len(numerator):
        raise ValueError(f"each pair needs a group; there are {len(numerator)} pairs and {len(groups)} groups")
    top, bottom = np.asarray(numerator, dtype=float), np.asarray(denominator, dtype=float)
    if not bottom.mean() > 0:
        raise ValueError("the denominator's mean is not above zero")
    numbers = {name: number for number, name in enumerate(dict.fromkeys(groups or range(len(top))))}
    group = [numbers[name] for name in groups or range(len(top))]
    tops, bottoms = np.bincount(group, top), np.bincount(group, bottom)  # sums of each group
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, len(tops), size=(resamples, len(tops)))
    drawn = np.maximum(bottoms[picks].sum(axis=1), np.finfo(float).tiny)
    return _interval(float(top.mean() / bottom.mean()), tops[picks].sum(axis=1) / drawn, confidence)


def _interval(value: float, draws: np.ndarray, confidence: float) -> Interval:
    tail = 50.0 * (1.0 - confidence)
    low, high = np.percentile(draws, (tail, 100.0 - tail))
    return Interval(value, float(low), float(high))
