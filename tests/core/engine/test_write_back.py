"""Saves in the background: beside batches, or between them where both need the processor."""

from __future__ import annotations

import pytest

from tests.core.scheduler_rig import LINK, Bench, overlap_s


@pytest.mark.parametrize("saves_yield", [False, True])
def test_saves_go_between_batches_where_they_share_the_processor(saves_yield: bool) -> None:
    bench = Bench(saves_yield=saves_yield)
    bench.driver.save_route = (LINK,)
    for i in range(5):
        bench.submit(i * 0.5, f"r{i}", i, 0, 1000)  # computed for 0.1 s, ten blocks to save
    bench.submit(0.05, "second", 5, 0, 1000)  # keeps compute busy after the first ended
    bench.driver.run()
    overlap = overlap_s(bench.driver.busy["save"], bench.driver.busy["compute"])
    assert overlap == 0.0 if saves_yield else overlap > 0.0
    assert bench.scheduler.counters["saved_blocks"] == 6 * 10
    assert "saves_dropped" not in bench.scheduler.counters


def test_saves_that_yield_are_not_lost_when_compute_never_rests() -> None:
    """Twenty requests back to back through an L1 that holds four of them: pins press, so saves go beside batches."""
    bench = Bench(saves_yield=True, l1_pages=44)
    bench.driver.save_route = (LINK,)
    for i in range(20):
        bench.submit(0.0, f"r{i}", i, 0, 1000)
    bench.driver.run()
    assert bench.scheduler.counters["saved_blocks"] == 20 * 10
    assert "saves_dropped" not in bench.scheduler.counters
