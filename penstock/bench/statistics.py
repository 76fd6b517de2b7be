"""Summaries of measured values: mean, percentiles, and bootstrap confidence intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    confidence: float = 0.95,
    seed: int = 0,
    resamples: int = BOOTSTRAP_RESAMPLES,
) -> Interval:
    """Mean(numerator) / mean(denominator) of paired values (the same request under two systems); pairs are resampled
    together. Raises ValueError when the lengths differ, are zero, or the denominator's mean is not above zero."""
    if len(numerator) != len(denominator) or not len(numerator):
        raise ValueError(f"pairs are needed; there are {len(numerator)} numerators and {len(denominator)} denominators")
    top, bottom = np.asarray(numerator, dtype=float), np.asarray(denominator, dtype=float)
    if not bottom.mean() > 0:
        raise ValueError("the denominator's mean is not above zero")
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, len(top), size=(resamples, len(top)))
    bottoms = np.maximum(bottom[picks].mean(axis=1), np.finfo(float).tiny)
    return _interval(float(top.mean() / bottom.mean()), top[picks].mean(axis=1) / bottoms, confidence)


def _interval(value: float, draws: np.ndarray, confidence: float) -> Interval:
    tail = 50.0 * (1.0 - confidence)
    low, high = np.percentile(draws, (tail, 100.0 - tail))
    return Interval(value, float(low), float(high))
