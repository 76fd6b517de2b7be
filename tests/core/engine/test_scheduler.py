"""The scheduler core's promises, each on a virtual clock: orders, overlap, sharing, bounds, failures."""

from __future__ import annotations

import random
from typing import Any

import pytest

from penstock.core.bandwidth import LinkCost
from penstock.core.config import ConfigError, SchedulerConfig
from penstock.core.cost import ComputeCost, CostModel
from penstock.core.engine.scheduler import LoadScheduler, WaitingQueueFull
from penstock.core.keys import block_keys
from penstock.core.operations import BlockHit, Lookup, RequestSpec
from tests.core.scheduler_rig import BLOCK, BLOCK_BYTES, FINGERPRINT, LINK, Bench, overlap_s, prompt_of, spec

LONG, SHORT = 60, 10  # blocks: 60 and 10 ms on the link


def burst(bench: Bench, count: int = 12, seed: int = 0) -> None:
    """Requests of different sizes and deadlines, close together."""
    chance = random.Random(seed)
    for i in range(count):
        hit = chance.choice((SHORT, 20, 40, LONG))
        bench.submit(i * 1e-3, f"r{i}", i, hit, chance.choice((30, 99, 250)), i * 1e-3 + chance.uniform(0.05, 0.6))
    bench.driver.run()
    assert len(bench.driver.ended) == count
    assert bench.scheduler.idle


# -- the coupled baseline, and Penstock against it ---------------------------------------------------------------


def test_coupled_serves_one_request_after_the_other_stage_by_stage() -> None:
    bench = Bench(mode="coupled")
    burst(bench)
    busy = bench.driver.busy
    for one, other in (("fetch", "upload"), ("fetch", "compute"), ("upload", "compute")):
        assert overlap_s(busy[one], busy[other]) == pytest.approx(0.0, abs=1e-12), f"{one} overlaps {other}"
    assert bench.driver.order == [f"r{i}" for i in range(12)], "first come first served"


@pytest.mark.parametrize(("mode", "overlaps"), [("coupled", False), ("penstock", True)])
def test_a_hole_at_the_front_is_computed_while_the_rest_loads_but_not_by_the_baseline(
    mode: str, overlaps: bool
) -> None:
    bench = Bench(mode=mode, upload_group_blocks=1)
    prompt = prompt_of(1, 40 * BLOCK + 20)
    bench.stored(prompt, 40)
    for key in list(bench.pool)[:3]:
        del bench.pool[key]
    bench.driver.submit_at(0.0, spec("r", prompt))
    bench.driver.run()
    assert (overlap_s(bench.driver.busy["fetch"], bench.driver.busy["compute"]) > 0) is overlaps
    assert bench.driver.ended["r"].account.cached_tokens == 37 * BLOCK


def test_an_account_says_what_came_over_each_link_and_when() -> None:
    bench = Bench(links={LINK: 1e9, "memory:0": 4e9, "net": 4e9})
    on_ssd, both = prompt_of(1, 10 * BLOCK + 20), prompt_of(2, 12 * BLOCK + 20)
    bench.stored(on_ssd, 10)
    bench.stored(both, 12, ("memory:0", "net"))
    for key in list(bench.pool)[10:14]:
        bench.pool[key] = BlockHit(BLOCK_BYTES, (LINK, "net"))
    bench.driver.submit_at(0.0, spec("ssd", on_ssd))
    bench.driver.submit_at(1.0, spec("both", both))
    bench.driver.run()
    accounts = {name: ended.account for name, ended in bench.driver.ended.items() if ended.account is not None}
    assert set(accounts["ssd"].link_reads) == {LINK}
    first = accounts["ssd"].link_reads[LINK]
    assert first.size_bytes == 10 * BLOCK_BYTES and first.end_s - first.start_s == pytest.approx(0.010)
    reads = accounts["both"].link_reads
    assert {name: one.size_bytes // BLOCK_BYTES for name, one in reads.items()} == {LINK: 4, "memory:0": 8, "net": 12}
    first_token_s = accounts["both"].first_token_s
    assert first_token_s is not None
    assert all(1.0 <= one.start_s < one.end_s <= first_token_s for one in reads.values())
    assert reads["net"].end_s == max(one.end_s for one in reads.values())


def test_coupled_gives_the_example_of_calvo() -> None:
    """R1: 0.361 s to load, 0.019 s to compute; R2: 0.199 and 0.025. FIFO: a mean of 0.49 s."""
    compute = ComputeCost(0.019 - 28 * (6e-3 / 106), 6e-3 / 106, 0.0)
    bench = Bench(compute, {LINK: 281 * BLOCK_BYTES / 0.361}, 1e15, mode="coupled", l2_slots=400)
    bench.submit(0.0, "R1", 1, 281, 28)
    bench.submit(0.0, "R2", 2, 155, 134)
    bench.driver.run()
    assert bench.ttft("R1") == pytest.approx(0.380, abs=1e-3)
    assert bench.ttft("R2") == pytest.approx(0.604, abs=1e-3)
    assert round((bench.ttft("R1") + bench.ttft("R2")) / 2, 2) == 0.49


@pytest.mark.parametrize(("policy", "first"), [("fcfs", "R1"), ("sjf-compute", "R1"), ("sjf", "R2"), ("srpt", "R2")])
def test_overlap_shortens_the_example_and_keeps_its_order(policy: str, first: str) -> None:
    compute = ComputeCost(0.019 - 28 * (6e-3 / 106), 6e-3 / 106, 0.0)
    bench = Bench(compute, {LINK: 281 * BLOCK_BYTES / 0.361}, 1e15, policy=policy, l2_slots=400)
    bench.submit(0.0, "R1", 1, 281, 28)
    bench.submit(0.0, "R2", 2, 155, 134)
    bench.driver.run()
    mean = (bench.ttft("R1") + bench.ttft("R2")) / 2
    assert bench.driver.order[0] == first
    assert mean < (0.49 if first == "R1" else 0.41)
    assert mean > (0.47 if first == "R1" else 0.39)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["fcfs", "sjf", "srpt", "edf", "lstf", "feasible"])
def test_penstock_overlaps_stages_and_beats_the_baseline(policy: str) -> None:
    coupled, bench = Bench(mode="coupled"), Bench(policy=policy)
    burst(coupled)
    burst(bench)
    busy = bench.driver.busy
    assert overlap_s(busy["fetch"], busy["upload"]) > 0
    assert overlap_s(busy["fetch"], busy["compute"]) > 0
    names = list(bench.driver.ended)
    mean = sum(map(bench.ttft, names)) / len(names)
    assert mean < sum(map(coupled.ttft, names)) / len(names)
    assert bench.driver.now < coupled.driver.now


def test_the_link_is_never_idle_while_a_block_waits_for_it() -> None:
    bench = Bench(policy="sjf", fetch_window_blocks=4)
    burst(bench)
    spans = sorted((start, end) for start, end, _ in bench.driver.busy["fetch"])
    blocks = len(spans)
    assert max(end for _, end in spans) == pytest.approx(blocks * 1e-3, rel=1e-6), "gaps between fetches"


def test_a_request_on_a_busy_link_leaves_the_other_link_to_others() -> None:
    bench = Bench(links={"ssd:0": 1e9, "ssd:1": 1e9}, policy="fcfs")
    first, second = prompt_of(1, 50 * BLOCK + 10), prompt_of(2, 20 * BLOCK + 10)
    bench.stored(first, 50, ("ssd:0",))
    bench.stored(second, 20, ("ssd:1",))
    bench.driver.submit_at(0.0, spec("first", first))
    bench.driver.submit_at(0.0, spec("second", second))
    bench.driver.run()
    assert bench.ttft("second") < 0.030 < 0.050 < bench.ttft("first")


def dispatched(bench: Bench) -> list[tuple[str, bytes]]:
    """The route's first link and the key of each fetch, in the order in which they were issued at once."""
    first = {key: hit.route[0] for key, hit in bench.pool.items()}
    return [(first[key], key) for key in bench.driver.fetches]


def test_the_blocks_of_a_span_follow_each_other_and_the_least_busy_device_is_next() -> None:
    links = {"ssd:0": 1e9, "ssd:1": 1e9, "net": 1e12}
    bench = Bench(links=links, fetch_window_blocks=32, l2_slots=200, l1_pages=200)  # spans of four
    prompt = prompt_of(1, 60 * BLOCK + 10)
    for at, key in enumerate(block_keys(prompt[: 60 * BLOCK], FINGERPRINT, "", BLOCK)):
        bench.pool[key] = BlockHit(BLOCK_BYTES, (f"ssd:{at % 2}", "net"))
    bench.driver.submit_at(0.0, spec("one", prompt))
    bench.driver.run(until_s=1e-6)
    assert [link for link, _ in dispatched(bench)] == (["ssd:0"] * 4 + ["ssd:1"] * 4) * 4
    bench.driver.run()
    assert len(bench.driver.fetches) == 60 and bench.driver.ended["one"].reason == "length"


def test_an_urgent_request_gets_in_between_two_spans_of_another() -> None:
    bench = Bench(policy="edf", fetch_window_blocks=16, l2_slots=200, l1_pages=200)  # spans of two
    long, short = prompt_of(1, 60 * BLOCK + 10), prompt_of(2, 4 * BLOCK + 10)
    bench.stored(long, 60)
    bench.stored(short, 4)
    bench.driver.submit_at(0.0, spec("long", long, deadline_s=100.0))
    bench.driver.submit_at(0.0305, spec("short", short, deadline_s=1.0))
    bench.driver.run()
    urgent = set(block_keys(short[: 4 * BLOCK], FINGERPRINT, "", BLOCK))
    places = [at for at, key in enumerate(bench.driver.fetches) if key in urgent]
    assert len(places) == 4 and places[-1] <= 30 + 16 + 4  # behind what was in flight, and nothing else


# -- deadlines and fairness --------------------------------------------------------------------------------------


def test_feasible_puts_the_hopeless_last() -> None:
    bench = Bench(policy="feasible", fetch_window_blocks=2)
    bench.submit(0.0, "hopeless", 1, LONG, 50, 0.010)
    for i in range(3):
        bench.submit(0.0, f"fits{i}", 10 + i, SHORT, 50, 0.06 + i * 0.01)
    bench.driver.run()
    assert bench.driver.order[-1] == "hopeless"
    for i in range(3):
        assert bench.ttft(f"fits{i}") <= 0.06 + i * 0.01
    lstf = Bench(policy="lstf", fetch_window_blocks=2)
    lstf.submit(0.0, "hopeless", 1, LONG, 50, 0.010)
    for i in range(3):
        lstf.submit(0.0, f"fits{i}", 10 + i, SHORT, 50, 0.06 + i * 0.01)
    lstf.driver.run()
    assert lstf.driver.order[0] == "hopeless", "least slack alone serves it first"


@pytest.mark.slow
def test_feasible_meets_the_most_deadlines_under_overload() -> None:
    def met(policy: str) -> int:
        found = 0
        for seed in range(5):
            bench = Bench(policy=policy, fetch_window_blocks=2, check=False)
            burst(bench, 20, seed)
            accounts = [ended.account for ended in bench.driver.ended.values()]
            found += sum(a.first_token_s is not None and a.first_token_s <= a.deadline_s for a in accounts)
        return found

    feasible = met("feasible")
    assert all(feasible >= met(policy) for policy in ("fcfs", "edf", "lstf"))


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["sjf", "sjf-compute", "srpt", "edf", "lstf", "feasible"])
def test_ageing_bounds_the_wait_behind_an_endless_stream(policy: str) -> None:
    def wait_of_the_long_one(age_bound_s: float, age_delays: float = 0.0) -> float:
        settings: dict[str, Any] = {
            "fetch_window_blocks": 2,
            "age_bound_s": age_bound_s,
            "age_delays": age_delays,
            "max_running": 8,
        }
        bench = Bench(policy=policy, check=False, **settings)
        bench.submit(0.001, "long", 1, LONG, 900, 50.0)
        for i in range(250):  # each takes 10 ms of a link that gets one every 9 ms, and is more urgent
            bench.submit(i * 0.009, f"s{i}", 10 + i, SHORT, 20, i * 0.009 + 0.05)
        bench.driver.run()
        return bench.ttft("long")

    unbounded, bounded = wait_of_the_long_one(1e5), wait_of_the_long_one(0.5)
    assert unbounded > 2.0, "the stream does not starve it; the test shows nothing"
    assert 0.5 < bounded < 0.5 + 0.060 + 0.091 + 0.1
    assert wait_of_the_long_one(1e5, 1.0) < bounded, "the stream's own queue is short: so is the delay it may cause"


# -- sharing and L1 ----------------------------------------------------------------------------------------------


def test_a_shared_prefix_is_loaded_once() -> None:
    bench = Bench(l1_pages=200)
    base = prompt_of(1, 30 * BLOCK)
    bench.stored(base, 30)
    for i in range(6):
        bench.driver.submit_at(i * 1e-3, spec(f"r{i}", base + prompt_of(2 + i, 40)))
    bench.driver.run()
    assert len(bench.driver.fetches) == len(set(bench.driver.fetches)) == 30
    assert all(e.account.cached_tokens == 30 * BLOCK for e in bench.driver.ended.values())
    assert bench.scheduler.counters["loads_shared"] > 0


@pytest.mark.parametrize("layerwise", [True, False])
def test_only_the_last_group_of_a_load_may_be_followed_layer_by_layer(layerwise: bool) -> None:
    """Compute cannot pass blocks that do not come yet."""
    bench = Bench(layerwise=layerwise, upload_group_blocks=2)
    bench.submit(0.0, "a", 1, 9, 50)
    bench.driver.run()
    followed = [upload.followed for upload in bench.driver.uploads]
    assert len(followed) > 2 and followed == [False] * (len(followed) - 1) + [layerwise]


def test_a_prefix_in_l1_is_not_loaded_again() -> None:
    bench = Bench()
    base = prompt_of(1, 10 * BLOCK)
    bench.stored(base, 10)
    bench.driver.submit_at(0.0, spec("a", [*base, 1, 2, 3]))
    bench.driver.submit_at(5.0, spec("b", [*base, 4, 5, 6]))
    bench.driver.run()
    assert len(bench.driver.fetches) == 10
    assert bench.driver.ended["b"].account.loaded_bytes == 0
    assert bench.driver.ended["b"].account.cached_tokens == 10 * BLOCK


def test_the_last_token_is_always_computed() -> None:
    bench = Bench()
    prompt = prompt_of(1, 10 * BLOCK)
    bench.stored(prompt, 10)
    bench.driver.submit_at(0.0, spec("r", prompt))
    bench.driver.run()
    assert len(bench.driver.fetches) == 9
    assert len(bench.driver.ended["r"].tokens) == 1


@pytest.mark.parametrize("mode", ["penstock", "coupled"])
def test_decodes_beyond_l1_preempt_and_end_with_the_same_tokens(mode: str) -> None:
    def tokens(pages: int) -> tuple[dict[str, tuple[int, ...]], int]:
        bench = Bench(l1_pages=pages, mode=mode, policy="fcfs")
        for i in range(5):
            bench.driver.submit_at(i * 1e-3, spec(f"r{i}", prompt_of(i, 150), 500))
        bench.driver.run()
        ends = bench.driver.ended
        assert {end.reason for end in ends.values()} == {"length"}
        return {name: end.tokens for name, end in ends.items()}, bench.scheduler.counters.get("preemptions", 0)

    plenty, none = tokens(1000)
    little, some = tokens(14)
    assert little == plenty
    assert none == 0 < some


def test_a_request_without_room_in_l1_fetches_ahead_into_l2() -> None:
    bench = Bench(l1_pages=40, l2_slots=60, policy="fcfs")
    bench.driver.submit_at(0.0, spec("first", prompt_of(1, 30 * BLOCK), 200))
    second = prompt_of(2, 25 * BLOCK + 10)
    bench.stored(second, 25)
    bench.driver.submit_at(0.001, spec("second", second))
    bench.driver.run()
    assert any(label == "fetch" for label, _, _ in bench.driver.ended["second"].account.spans)
    first_end = bench.driver.ended["first"].account.end_s
    assert first_end is not None
    assert bench.driver.busy["fetch"][0][0] < first_end, "it waited for L1 before it fetched anything"


# -- failures ----------------------------------------------------------------------------------------------------


def test_a_hole_in_a_prefix_is_recomputed_and_the_blocks_behind_it_are_used() -> None:
    bench = Bench()
    prompt = prompt_of(1, 20 * BLOCK + 30)
    bench.stored(prompt, 20)
    lost = list(bench.pool)[7]
    bench.driver.fetch_fault = lambda key: "checksum" if key == lost else None
    bench.driver.submit_at(0.0, spec("r", prompt))
    bench.driver.run()
    account = bench.driver.ended["r"].account
    assert account.load_failures == {"checksum": 1}
    assert account.recomputed_tokens == BLOCK and account.cached_tokens == 19 * BLOCK
    assert bench.scheduler.counters["computed_tokens"] == BLOCK + 30


@pytest.mark.parametrize("mode", ["penstock", "coupled"])
def test_every_fetch_failing_is_a_request_without_hits(mode: str) -> None:
    bench = Bench(mode=mode)
    bench.driver.fetch_fault = lambda key: "network"
    bench.submit(0.0, "r", 1, 20, 30)
    bench.driver.run()
    end = bench.driver.ended["r"]
    assert end.reason == "length" and end.account.cached_tokens == 0
    assert end.account.load_failures == {"network": 20}
    assert bench.scheduler.counters["computed_tokens"] == 20 * BLOCK + 30


def test_hits_of_another_size_are_not_used() -> None:
    bench = Bench()
    prompt = prompt_of(1, 5 * BLOCK + 1)
    bench.stored(prompt, 5)
    for key in bench.pool:
        bench.pool[key] = BlockHit(BLOCK_BYTES // 2, (LINK,))
    bench.driver.submit_at(0.0, spec("r", prompt))
    bench.driver.run()
    assert not bench.driver.fetches and bench.driver.ended["r"].reason == "length"


# -- bounds and refusals -----------------------------------------------------------------------------------------


def scheduler(**settings: object) -> LoadScheduler:
    given = {"block_tokens": 4, "block_bytes": 4096, "l1_pages": 10, "l2_slots": 4} | settings
    return LoadScheduler(SchedulerConfig(**given), CostModel(LinkCost(1e9), ComputeCost(1e-3, 1e-5, 0.0)))  # type: ignore[arg-type]


def request(name: str, tokens: int = 8, new_tokens: int = 1) -> RequestSpec:
    return spec(name, list(range(tokens)), new_tokens)


def test_what_can_never_be_served_is_refused() -> None:
    one = scheduler()
    for tokens, new_tokens, message in ((0, 1, "at least one prompt"), (4, 0, "at least 1"), (40, 1, "need 11 blocks")):
        with pytest.raises(ValueError, match=message):
            one.submit(request("r", tokens, new_tokens), 0.0)
    one.submit(request("r", 39, 1), 0.0)
    with pytest.raises(ValueError, match="'r' is in use"):
        one.submit(request("r"), 0.0)


def test_the_waiting_queue_and_the_lookup_window_are_bounded() -> None:
    one = scheduler(max_waiting=3, lookup_window=2)
    for i in range(3):
        one.submit(request(f"r{i}"), 0.0)
    with pytest.raises(WaitingQueueFull, match="3 requests are waiting"):
        one.submit(request("r3"), 0.0)
    assert sum(isinstance(op, Lookup) for op in one.decide(0.0)) == 2
    one.cancel("r0", 0.0)
    one.submit(request("r3"), 0.0)
    one.check_integrity()


def test_a_lookup_that_failed_and_one_of_a_cancelled_request() -> None:
    one = scheduler()
    for name in ("a", "b"):
        one.submit(request(name), 0.0)
    lookups = [op for op in one.decide(0.0) if isinstance(op, Lookup)]
    one.cancel("b", 0.1)
    for op in lookups:
        one.lookup_done(op.op_id, None, 0.2)
    operations = one.decide(0.2)
    assert [type(op).__name__ for op in operations] == ["Emit", "Compute"]
    assert one.counters["lookup_failures"] == 1
    one.check_integrity()


def test_requests_time_out_wherever_they_are() -> None:
    one = scheduler(request_timeout_s=5.0)
    one.submit(request("a"), 0.0)
    one.decide(0.0)
    wakeup = one.next_wakeup_s()
    assert wakeup is not None and wakeup <= 5.0
    ends = one.decide(5.0)
    assert [(op.request_id, op.finish_reason) for op in ends] == [("a", "timeout")]


@pytest.mark.parametrize("field", ["l1_pages", "max_batch_tokens", "max_running", "save_window_blocks", "age_bound_s"])
def test_settings_below_their_range_are_refused_by_name(field: str) -> None:
    with pytest.raises(ConfigError, match=f"{field} is 0"):
        scheduler(**{field: 0})
