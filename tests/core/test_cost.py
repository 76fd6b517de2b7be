"""The cost model: planted coefficients are found, changes are followed, errors are measured."""

from __future__ import annotations

import random

import pytest

from penstock.core.bandwidth import LinkCost
from penstock.core.cost import ComputeCost, CostModel, RelativeError, compute_features, least_squares

PLANTED = (4e-3, 5e-5, 2e-9)


def batches(seed: int, count: int) -> list[list[tuple[int, int]]]:
    """Spans as they occur: decode tokens of several requests, and chunks of one or two prompts."""
    chance = random.Random(seed)
    found = []
    for _ in range(count):
        spans = [(1, chance.randrange(100, 40_000)) for _ in range(chance.randrange(0, 8))]
        spans += [(chance.randrange(16, 2048), chance.randrange(0, 60_000)) for _ in range(chance.randrange(0, 3))]
        found.append(spans or [(1, 500)])
    return found


def planted(spans: list[tuple[int, int]], factor: float = 1.0) -> float:
    return factor * sum(c * f for c, f in zip(PLANTED, compute_features(spans), strict=True))


def worst_error(cost: ComputeCost, factor: float = 1.0) -> float:
    return max(abs(cost.seconds(s) / planted(s, factor) - 1) for s in batches(99, 50))


def test_features_of_a_batch() -> None:
    assert compute_features([(10, 100), (1, 5)]) == (1.0, 11.0, 10 * 105 + 1 * 5.5)


def test_least_squares_solves_what_can_be_solved() -> None:
    rows = [[1.0, x, x * x] for x in (0.0, 1.0, 2.0, 5.0)]
    assert least_squares(rows, [3 + 2 * r[1] - r[2] for r in rows]) == pytest.approx([3, 2, -1], abs=1e-6)
    assert least_squares([[2.0, 0.0], [4.0, 0.0]], [6.0, 12.0]) == pytest.approx([3.0, 0.0], abs=1e-6)
    with pytest.raises(ValueError, match="at least one"):
        least_squares([], [])


def test_a_fit_recovers_planted_coefficients() -> None:
    exact = ComputeCost.fit([(spans, planted(spans)) for spans in batches(1, 60)])
    assert (exact.a, exact.b, exact.c) == pytest.approx(PLANTED, rel=1e-3)
    chance = random.Random(2)
    noisy = ComputeCost.fit([(s, planted(s) * chance.uniform(0.9, 1.1)) for s in batches(3, 400)])
    assert worst_error(noisy) < 0.05


def test_coefficients_are_never_negative() -> None:
    cost = ComputeCost.fit([([(q, 0)], 1.0 / q) for q in (1, 10, 100, 1000)])
    assert min(cost.a, cost.b, cost.c) >= 0
    for spans in batches(4, 200):
        cost.observe(spans, 1e-6)
        assert min(cost.a, cost.b, cost.c) >= 0


@pytest.mark.parametrize("factor", [0.25, 3.0])
def test_compute_follows_a_change_of_speed(factor: float) -> None:
    cost = ComputeCost.fit([(spans, planted(spans)) for spans in batches(5, 60)])
    for spans in batches(6, 400):
        cost.observe(spans, planted(spans, factor))
    assert worst_error(cost, factor) < 0.05


def test_compute_learns_from_a_wrong_beginning() -> None:
    cost = ComputeCost(1e-2, 1e-4, 1e-9)
    for spans in batches(7, 300):
        cost.observe(spans, planted(spans))
    assert worst_error(cost) < 0.05


def test_many_equal_samples_keep_the_model_sane() -> None:
    cost = ComputeCost(*PLANTED)
    for _ in range(5000):
        cost.observe([(1, 1000)], planted([(1, 1000)]))
    assert worst_error(cost) < 0.5
    for spans in batches(8, 400):
        cost.observe(spans, planted(spans))
    assert worst_error(cost) < 0.05


def test_a_link_follows_its_bandwidth() -> None:
    link = LinkCost(1e9)
    assert link.seconds(2e9) == pytest.approx(2.0)
    for speed in (2e8, 3e9):
        for _ in range(1500):
            link.observe(2 << 20, (2 << 20) / speed)
        assert link.bytes_per_s == pytest.approx(speed, rel=0.05)
    with pytest.raises(ValueError, match="bytes_per_s is 0"):
        LinkCost(0)


def test_one_odd_sample_does_not_upset_a_link() -> None:
    link = LinkCost(1e9)
    for _ in range(300):
        link.observe(1 << 20, (1 << 20) / 1e9)
    link.observe(1 << 20, 0.0)
    assert link.bytes_per_s == pytest.approx(1e9, rel=0.02)


def test_the_slowest_link_decides_and_shared_links_add_up() -> None:
    cost = CostModel(LinkCost(4e9), ComputeCost(*PLANTED))
    cost.links = {"ssd:0": LinkCost(1e9), "ssd:1": LinkCost(2e9), "net": LinkCost(1.5e9)}
    by_route: dict[tuple[str, ...], int] = {("ssd:0", "net"): 10**9, ("ssd:1", "net"): 10**9}
    assert cost.load_s(by_route, 2 * 10**9, serial=False) == pytest.approx(2 / 1.5)
    assert cost.load_s(by_route, 2 * 10**9, serial=True) == pytest.approx(2 / 1.5 + 0.5)
    assert cost.load_s({}, 8 * 10**9, serial=False) == pytest.approx(2.0)
    assert cost.load_s({}, 0, serial=False) == 0.0
    assert cost.load_s({("new",): 10**9}, 0, serial=False) == pytest.approx(1.0)


def test_relative_error_is_a_running_mean() -> None:
    error = RelativeError()
    error.observe(1.0, 0.0)
    assert error.count == 0
    for predicted, measured in ((1.1, 1.0), (1.0, 2.0), (3.0, 1.0)):
        error.observe(predicted, measured)
    assert error.mean == pytest.approx((0.1 + 0.5 + 2.0) / 3)
    for _ in range(2000):
        error.observe(1.0, 1.0)
    assert error.mean < 1e-3
