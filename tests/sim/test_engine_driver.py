"""The simulated engine: times by arithmetic, layers under uploads, faults of links and devices, refusals, and ends."""

from __future__ import annotations

from itertools import count

import pytest

from penstock.core.keys import KeyChain
from penstock.core.operations import BlockHit, Compute, Upload
from penstock.sim.engine_driver import Overheads
from tests.sim.sim_rig import BLOCK, BLOCK_BYTES, LINK, ROOT, SimBench


def test_one_request_takes_what_arithmetic_says() -> None:
    bench = SimBench(upload_bytes_per_s=1e15, fetch_window_blocks=1)
    bench.submit(2.0, "r", 25, 40)
    bench.driver.run()
    assert bench.ttft_s("r") == pytest.approx(25e-3 + 1e-3 + 40 * 1e-4, rel=1e-6)
    account = bench.driver.ended["r"].account
    assert account is not None and account.measured_fetch_s == pytest.approx(25e-3)
    assert account.measured_compute_s == pytest.approx(5e-3)


def test_a_route_over_two_links_takes_the_slower_one() -> None:
    bench = SimBench({"ssd": 1e9, "net": 5e8}, upload_bytes_per_s=1e15)
    prompt = bench.submit(0.0, "r", 20, 1)
    bench.stored(prompt, 20, ("ssd", "net"))
    bench.driver.run()
    assert bench.ttft_s("r") == pytest.approx(20 * BLOCK_BYTES / 5e8 + 1.1e-3, rel=1e-6)


def test_devices_behind_one_link_are_all_read_at_once() -> None:
    """Four devices of 1 GB/s behind a link of 4 GB/s, whose window is full all the time."""
    names = [f"ssd:{i}" for i in range(4)]
    bench = SimBench(dict.fromkeys(names, 1e9) | {"net": 4e9}, upload_bytes_per_s=1e15)
    prompt = bench.submit(0.0, "r", 200, 1)
    keys = KeyChain(ROOT, BLOCK).extend(prompt)
    for index in range(200):
        bench.pool[keys[index]] = BlockHit(BLOCK_BYTES, (names[index % 4], "net"))
    bench.driver.run()
    assert bench.ttft_s("r") == pytest.approx(200 * BLOCK_BYTES / 4e9, rel=0.05)


def test_overheads_of_operations_are_added_where_they_belong() -> None:
    overheads = Overheads(lookup_s=0.5, fetch_s=0.1, upload_s=0.02, compute_s=0.003)
    bench = SimBench(upload_bytes_per_s=1e15, fetch_window_blocks=1, driver={"overheads": overheads})
    bench.submit(0.0, "r", 1, 10)
    bench.driver.run()
    assert bench.ttft_s("r") == pytest.approx(0.5 + (1e-3 + 0.1) + 0.02 + (2e-3 + 0.003), rel=1e-6)


def test_with_layerwise_the_batch_runs_under_the_upload() -> None:
    """Upload 100 ms, compute 101 ms, 4 layers: the last layer's compute follows the last byte."""

    def ttft_s(layerwise: bool) -> float:
        bench = SimBench(
            {LINK: 1e15}, upload_bytes_per_s=1e8, driver={"layers": 4}, layerwise=layerwise, l2_slots=200,
            max_batch_tokens=2000,
        )  # fmt: skip
        bench.submit(0.0, "r", 10, 1000)
        bench.driver.run()
        return bench.ttft_s("r")

    assert ttft_s(False) == pytest.approx(0.201, rel=1e-3)
    assert ttft_s(True) == pytest.approx(0.1 + 0.101 / 4, rel=1e-3)


@pytest.mark.parametrize("reason", ["checksum", "missing", "network", "deadline"])
def test_a_fetch_that_fails_is_recomputed(reason: str) -> None:
    numbers = count()
    driver = {"fetch_fault": lambda key: reason if next(numbers) in (3, 7) else None}
    bench = SimBench(driver=driver, fetch_timeout_s=0.5)
    bench.submit(0.0, "r", 10, 10)
    bench.driver.run()
    account = bench.driver.ended["r"].account
    assert bench.driver.ended["r"].reason == "length"
    assert account is not None and set(account.load_failures) == {reason}
    failed = account.load_failures[reason]
    assert account.recomputed_tokens == failed * BLOCK
    if reason == "deadline":  # a link that serves in order is held up until then
        assert failed >= 2 and bench.ttft_s("r") > 0.5
    else:
        assert failed == 2


def test_a_link_that_fails_loses_what_is_on_its_way() -> None:
    bench = SimBench()
    bench.submit(0.0, "r", 50, 10)
    bench.clock.at(0.0105, lambda: bench.driver.fail_link(LINK))
    bench.driver.run()
    account = bench.driver.ended["r"].account
    assert bench.driver.ended["r"].reason == "length"
    assert account is not None and set(account.load_failures) == {"network"}
    assert 1 <= account.load_failures["network"] <= bench.scheduler.config.fetch_window_blocks


def test_a_failed_upload_makes_misses_of_its_blocks() -> None:
    failed = iter([True])
    bench = SimBench(driver={"fails": lambda op: isinstance(op, Upload) and next(failed, False)})
    bench.submit(0.0, "r", 10, 10)
    bench.driver.run()
    assert bench.driver.ended["r"].reason == "length" and bench.scheduler.counters["upload_failures"] == 1


def test_a_failed_batch_ends_its_request_with_an_error() -> None:
    bench = SimBench(driver={"fails": lambda op: isinstance(op, Compute)})
    bench.submit(0.0, "r", 2, 10)
    bench.driver.run()
    assert bench.driver.ended["r"].reason == "error" and bench.scheduler.idle


def test_a_pool_that_does_not_answer_is_a_miss_after_the_deadline() -> None:
    bench = SimBench(lookup_timeout_s=0.25)
    bench.driver.pool_answers = False
    bench.submit(0.0, "r", 5, 10)
    bench.driver.run()
    account = bench.driver.ended["r"].account
    assert account is not None and account.cached_tokens == 0 and bench.ttft_s("r") > 0.25


def test_a_refused_request_ends_as_refused_and_a_cancelled_one_as_cancelled() -> None:
    bench = SimBench(max_waiting=1, max_running=1)
    for name in "abc":
        bench.submit(0.0, name, 30, 10, family=ord(name))
    bench.driver.cancel_at(0.001, "a")
    bench.driver.run()
    assert {name: end.reason for name, end in bench.driver.ended.items()} == {
        "a": "cancelled", "b": "refused", "c": "refused"
    }  # fmt: skip
    assert bench.driver.ended["b"].account is None


def test_what_is_saved_is_a_hit_later() -> None:
    bench = SimBench(l1_pages=12, driver={"save_route": (LINK,)})
    for at_s, family in ((0.0, 1), (10.0, 2), (20.0, 1)):
        prompt = [family * 100_000 + i for i in range(8 * BLOCK + 5)]
        bench.submit(at_s, f"{at_s}", 0, len(prompt), family)
    bench.driver.run()
    last = bench.driver.ended["20.0"].account
    assert bench.scheduler.counters["saved_blocks"] == 16
    assert last is not None and last.cached_tokens == 8 * BLOCK and last.loaded_bytes > 0


def test_run_stops_at_the_time_it_is_given() -> None:
    bench = SimBench()
    bench.submit(1.0, "r", 50, 10)
    bench.driver.run(until_s=1.010)
    assert bench.clock.now_s <= 1.010 and not bench.driver.ended
    bench.driver.run()
    assert bench.driver.ended["r"].reason == "length" and bench.scheduler.idle
