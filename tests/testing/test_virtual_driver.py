"""The virtual driver: ideal links, exact times, one history per input."""

from __future__ import annotations

import pytest

from penstock.core.cost import ComputeCost
from tests.core.scheduler_rig import BLOCK, BLOCK_BYTES, LINK, Bench, prompt_of, spec


def test_one_request_takes_what_arithmetic_says() -> None:
    bench = Bench(ComputeCost(1e-3, 1e-4, 0.0), {LINK: 1e9}, 1e15, fetch_window_blocks=1)
    bench.submit(2.0, "r", 1, 25, 40)
    bench.driver.run()
    assert bench.ttft("r") == pytest.approx(25e-3 + 1e-3 + 40 * 1e-4, rel=1e-6)
    account = bench.driver.ended["r"].account
    assert account.measured_fetch_s == pytest.approx(25e-3)
    assert account.measured_compute_s == pytest.approx(5e-3)
    assert account.predicted_load_s == pytest.approx(25e-3) and account.predicted_compute_s == pytest.approx(5e-3)


def test_a_route_over_two_links_takes_the_slower_one() -> None:
    bench = Bench(ComputeCost(1e-9, 0.0, 0.0), {"ssd:0": 1e9, "net": 5e8}, 1e15)
    prompt = prompt_of(1, 20 * BLOCK + 1)
    bench.stored(prompt, 20, ("ssd:0", "net"))
    bench.driver.submit_at(0.0, spec("r", prompt))
    bench.driver.run()
    assert bench.ttft("r") == pytest.approx(20 * BLOCK_BYTES / 5e8, rel=1e-6)


def test_saved_blocks_are_hits_later() -> None:
    bench = Bench(l1_pages=12)
    bench.driver.save_route = (LINK,)
    first, other = prompt_of(1, 8 * BLOCK + 5), prompt_of(2, 9 * BLOCK)
    for at_s, name, prompt in ((0.0, "a", first), (10.0, "b", other), (20.0, "c", first)):
        bench.driver.submit_at(at_s, spec(name, prompt))
    bench.driver.run()
    assert bench.scheduler.counters["saved_blocks"] == 8 + 9
    assert bench.driver.ended["c"].account.cached_tokens == 8 * BLOCK
    assert bench.driver.ended["c"].account.loaded_bytes > 0


def test_one_input_has_one_history() -> None:
    def history() -> list[tuple[str, tuple[int, ...], float | None]]:
        bench = Bench(policy="feasible", l1_pages=120, l2_slots=20)
        for i in range(15):
            bench.submit(i * 2e-3, f"r{i}", i % 4, 5 + 7 * (i % 5), 30 + i, i * 2e-3 + 0.1)
        bench.driver.run()
        return [(name, end.tokens, end.account.end_s) for name, end in bench.driver.ended.items()]

    assert history() == history()


def test_run_stops_at_the_time_it_is_given() -> None:
    bench = Bench()
    bench.submit(1.0, "r", 1, 50, 10)
    bench.driver.run(until_s=1.010)
    assert bench.driver.now <= 1.010 and not bench.driver.ended and 0 < len(bench.driver.fetches) < 50
    bench.driver.run()
    assert bench.driver.ended["r"].reason == "length"
