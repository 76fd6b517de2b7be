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
    """Count, mean and percentiles of measured values, in their unit."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear interpolation between order statistics. Raises ValueError without values."""
    if not len(values):
        raise ValueError("a percentile of no values does not exist")
    return float(np.percentile(np.asarray(values, dtype=float), percent))


def summarize(values: Sequence[float]) -> Summary:
    """Raises ValueError without values."""
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
    together. `groups` names each pair's group, if pairs of a group depend on each other (they queued for each other);
    then whole groups are resampled. Raises ValueError if the lengths differ or are zero, or the denominator's mean is
    not above zero."""
    top, bottom, members = _pairs(numerator, denominator, groups)
    if not bottom.mean() > 0:
        raise ValueError("the denominator's mean is not above zero")
    tops, bottoms = (np.array([values[group].sum() for group in members]) for values in (top, bottom))
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, len(members), size=(resamples, len(members)))
    drawn = np.maximum(bottoms[picks].sum(axis=1), np.finfo(float).tiny)
    return _interval(float(top.mean() / bottom.mean()), tops[picks].sum(axis=1) / drawn, confidence)


def ratio_of_percentiles(
    numerator: Sequence[float],
    denominator: Sequence[float],
    percent: float,
    *,
    groups: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    seed: int = 0,
    resamples: int = BOOTSTRAP_RESAMPLES,
) -> Interval:
    """The same for a percentile instead of the mean. Raises ValueError if the lengths differ or are zero, or a value of
    the denominator is not above zero."""
    top, bottom, members = _pairs(numerator, denominator, groups)
    if not bottom.min() > 0:
        raise ValueError("a value of the denominator is not above zero")
    rng = np.random.default_rng(seed)
    draws = np.empty(resamples)
    for i in range(resamples):
        pick = np.concatenate([members[group] for group in rng.integers(0, len(members), size=len(members))])
        draws[i] = np.percentile(top[pick], percent) / np.percentile(bottom[pick], percent)
    return _interval(float(np.percentile(top, percent) / np.percentile(bottom, percent)), draws, confidence)


def _pairs(
    numerator: Sequence[float], denominator: Sequence[float], groups: Sequence[Hashable] | None
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Both as arrays, and the indices of each group's pairs."""
    if len(numerator) != len(denominator) or not len(numerator):
        raise ValueError(f"pairs are needed; there are {len(numerator)} numerators and {len(denominator)} denominators")
    names = range(len(numerator)) if groups is None else groups
    if len(names) != len(numerator):
        raise ValueError(f"each pair needs a group; there are {len(numerator)} pairs and {len(names)} groups")
    members: dict[Hashable, list[int]] = {}
    for i, name in enumerate(names):
        members.setdefault(name, []).append(i)
    indices = [np.array(found) for found in members.values()]
    return np.asarray(numerator, dtype=float), np.asarray(denominator, dtype=float), indices


def _interval(value: float, draws: np.ndarray, confidence: float) -> Interval:
    tail = 50.0 * (1.0 - confidence)
    low, high = np.percentile(draws, (tail, 100.0 - tail))
    return Interval(value, float(low), float(high))
