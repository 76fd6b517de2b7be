"""Load or recompute: the front of a hit is computed while the rest loads, where the first token comes sooner."""

from __future__ import annotations

import pytest

from penstock.core.cost import ComputeCost
from penstock.core.load_or_recompute import recompute_tokens
from tests.core.scheduler_rig import BLOCK, Bench

LINK_BLOCK_S, COMPUTE_BLOCK_S = 1e-3, 2e-3  # of the rig: 1 MB at 1 GB/s; 100 tokens at 20 us
FAST = ComputeCost(1e-3, COMPUTE_BLOCK_S / BLOCK, 0.0)


def warm(bench: Bench) -> None:
    """Enough batches and blocks that costs are known."""
    for number in range(10):
        bench.submit(number * 0.1, f"warm{number}", 900 + number, 2, 50)


def bench(recompute: bool, compute: ComputeCost = FAST) -> Bench:
    return Bench(compute, recompute=recompute, policy="fcfs")


def test_front_and_rest_meet() -> None:
    """60 blocks: 60 ms of loading, or 20 blocks computed (41 ms) while 40 load (40 ms)."""
    times = {}
    for recompute in (False, True):
        one = bench(recompute)
        warm(one)
        one.submit(5.0, "asked", 1, 60, 50)
        one.driver.run()
        times[recompute] = one.ttft("asked")
        computed = one.scheduler.counters.get("computed_instead_tokens", 0)
        assert (computed > 0) == recompute
        assert one.driver.ended["asked"].account.cached_tokens + computed >= 60 * BLOCK
    assert times[False] == pytest.approx(60 * LINK_BLOCK_S + 2e-3, rel=0.05)
    assert times[True] == pytest.approx(40 * LINK_BLOCK_S + 4e-3, rel=0.1)


def test_nothing_is_computed_where_loading_is_faster() -> None:
    one = bench(True, ComputeCost(1e-3, 1.0, 0.0))
    warm(one)
    one.submit(5000.0, "asked", 1, 60, 50)
    one.driver.run()
    assert one.scheduler.counters["computed_instead_tokens"] == 0
    assert one.driver.ended["asked"].account.cached_tokens == 60 * BLOCK


def test_nothing_is_computed_before_costs_are_known() -> None:
    one = bench(True)
    one.submit(0.0, "asked", 1, 60, 50)
    one.driver.run()
    assert one.scheduler.counters["computed_instead_tokens"] == 0


def test_what_lies_in_l1_or_is_on_its_way_is_not_computed() -> None:
    one = bench(True)
    warm(one)
    one.submit(5.0, "first", 1, 60, 50)
    one.submit(5.01, "second", 1, 60, 50)  # shares the first one's loads
    one.submit(6.0, "third", 1, 60, 50)  # finds all of it in L1
    one.driver.run()
    assert one.driver.ended["third"].account.cached_tokens == 60 * BLOCK
    assert len(one.driver.fetches) == len(set(one.driver.fetches))


def test_a_busy_processor_leaves_the_front_to_the_link() -> None:
    """Another prefill of 100 ms goes on meanwhile: computing the front would end after the load of all of it."""
    one = bench(True)
    warm(one)
    one.submit(5.0, "miss", 2, 0, 5000)
    one.submit(5.001, "asked", 1, 60, 50)
    one.driver.run()
    assert one.scheduler.counters["computed_instead_tokens"] == 0


@pytest.mark.parametrize(
    ("load_free_s", "compute_free_s", "expected"), [(0.0, 0.0, 19), (0.0, 1.0, 0), (1.0, 0.0, 60), (0.03, 0.0, 29)]
)
def test_backlogs_move_the_place_where_they_meet(load_free_s: float, compute_free_s: float, expected: int) -> None:
    tokens = recompute_tokens(60 * BLOCK, load_free_s, BLOCK / LINK_BLOCK_S, compute_free_s, FAST, BLOCK)
    assert tokens == expected * BLOCK
