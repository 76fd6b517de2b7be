"""Ageing: the delay that a request is allowed, in virtual time, and that nobody starves whatever the order."""

from __future__ import annotations

import functools
import statistics
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.config import ConfigError, SchedulerConfig
from penstock.core.engine.ageing import SHARE_OF_WORST, Ageing
from penstock.core.engine.request import Request
from tests.core.scheduler_rig import BLOCK, Bench, prompt_of, spec

OWN_S, BOUND_S = 1.0, 60.0


def request(sequence: int, now: float, load_s: float = OWN_S) -> Request:
    made = Request(spec(f"r{sequence}", prompt_of(sequence, 10)), sequence, now, BLOCK, now + 10.0)
    made.account.predicted_load_s = load_s
    return made


def arrive(ageing: Ageing, sequence: int, now: float, load_s: float = OWN_S) -> Request:
    made = request(sequence, now, load_s)
    ageing.arrived(made)
    ageing.estimated(made)
    ageing.check_integrity()
    return made


# -- the rule ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delays", [0.5, 1.0, 3.0])
def test_a_request_ages_after_the_work_that_was_there_when_it_came(delays: float) -> None:
    ageing = Ageing(BOUND_S, delays)
    before = [arrive(ageing, number, 0.0) for number in range(4)]
    last = arrive(ageing, 9, 0.0)
    for one in before:
        ageing.first_token(one)
    assert last not in ageing.due(OWN_S + delays * 4 * OWN_S - 1e-6)
    assert last in ageing.due(OWN_S + delays * 4 * OWN_S)


def test_one_that_came_early_into_a_burst_is_allowed_a_share_of_the_longest_delay() -> None:
    ageing = Ageing(BOUND_S, 1.0)
    first = arrive(ageing, 0, 0.0)
    for number in range(1, 11):
        arrive(ageing, number, 0.1)
    assert first not in ageing.due(OWN_S + SHARE_OF_WORST * 10 * OWN_S - 1e-6), "there was nobody before it"
    assert first in ageing.due(OWN_S + SHARE_OF_WORST * 10 * OWN_S)


def test_it_ages_earlier_by_the_work_of_those_that_aged_before_it() -> None:
    ageing = Ageing(BOUND_S, 1.0)
    for number in range(6):
        arrive(ageing, number, 0.0)
    last = arrive(ageing, 9, 1.0, load_s=2.0)
    times_s = {}
    while (next_s := ageing.next_s) is not None:
        times_s.update(dict.fromkeys(ageing.due(next_s), next_s))
        ageing.check_integrity()
    first_ages_s = OWN_S + SHARE_OF_WORST * 6 * OWN_S  # and with it, one by one, all that have to wait for it
    assert times_s[last] == pytest.approx(first_ages_s)
    assert len(times_s) == 7


def test_the_longest_delay_is_forgotten_when_the_burst_is_over() -> None:
    ageing = Ageing(BOUND_S, 1.0)
    for one in [arrive(ageing, number, 0.0) for number in range(10)]:
        ageing.first_token(one)
    for number in range(200):
        ageing.first_token(arrive(ageing, 100 + number, 1.0))
    late = arrive(ageing, 999, 100.0)
    assert late in ageing.due(100.0 + OWN_S + 0.1)


def test_the_bound_counts_where_hits_are_not_known_or_delays_are_off() -> None:
    for delays in (0.0, 1.0):
        ageing = Ageing(BOUND_S, delays)
        unknown = request(1, 0.0)
        ageing.arrived(unknown)
        if not delays:
            ageing.estimated(unknown)
        assert ageing.due(BOUND_S - 1e-6) == [] and ageing.next_s == BOUND_S
        assert ageing.due(BOUND_S) == [unknown]


def test_one_that_aged_before_its_hits_were_known_is_counted_when_they_are() -> None:
    ageing = Ageing(BOUND_S, 1.0)
    early = request(1, 0.0)
    ageing.arrived(early)
    assert ageing.due(BOUND_S) == [early]
    ageing.estimated(early)
    ageing.check_integrity()
    ageing.first_token(early)
    ageing.check_integrity()
    assert ageing.next_s is None


def test_nothing_is_remembered_of_requests_that_ended() -> None:
    ageing = Ageing(BOUND_S, 1.0)
    for number in range(1000):
        ageing.ended(arrive(ageing, number, 0.0))
        ageing.check_integrity()
    assert ageing.next_s is None
    assert ageing.due(1e9) == []


@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 5), st.sampled_from(["token", "end", "stay"])), max_size=40),
    st.sampled_from([0.0, 0.5, 1.0, 4.0]),
)
def test_everybody_ages_in_time_and_is_named(arrivals: list[tuple[float, float, str]], delays: float) -> None:
    ageing = Ageing(BOUND_S, delays)
    now = 0.0
    alive: dict[Request, float] = {}
    for sequence, (gap_s, load_s, fate) in enumerate(arrivals):
        now += gap_s
        for aged in ageing.due(now):
            aged.aged_s = now
            alive.pop(aged, None)
        one = arrive(ageing, sequence, now, load_s)
        if fate == "token":
            ageing.first_token(one)
        elif fate == "end":
            ageing.ended(one)
        else:
            alive[one] = now
        assert all(now < since + BOUND_S for since in alive.values())
    named = set()
    while (next_s := ageing.next_s) is not None and next_s <= now + BOUND_S:
        named.update(ageing.due(next_s))
    assert named >= set(alive), "somebody never ages"


def test_a_wrong_setting_is_refused_and_zero_is_none() -> None:
    SchedulerConfig(block_tokens=1, block_bytes=1, l1_pages=1, l2_slots=2, age_delays=0)
    with pytest.raises(ConfigError, match="age_delays is -1"):
        SchedulerConfig(block_tokens=1, block_bytes=1, l1_pages=1, l2_slots=2, age_delays=-1)


# -- in an engine ------------------------------------------------------------------------------------------------


def burst_ttfts_s(policy: str, mode: str = "penstock", **config: Any) -> list[float]:
    """Small requests keep a link full behind which some large ones wait; TTFTs in order of arrival."""
    bench = Bench(policy=policy, mode=mode, fetch_window_blocks=2, max_running=8, check=False, **config)
    for i in range(8):
        bench.submit(0.001 * i, f"large{i}", i, 60, 90, 0.001 * i + 0.1)
    for i in range(200):
        bench.submit(0.01 + i * 0.011, f"small{i}", 100 + i, 10, 20, 0.01 + i * 0.011 + 0.3)
    bench.driver.run()
    return [bench.ttft(name) for name in bench.driver.ended]


@functools.cache
def baseline_ttfts_s() -> list[float]:
    return sorted(burst_ttfts_s("fcfs", "coupled"))


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["sjf", "srpt", "feasible"])
def test_the_tail_is_no_worse_than_the_baselines(policy: str) -> None:
    baseline = baseline_ttfts_s()
    aged, unaged = sorted(burst_ttfts_s(policy)), sorted(burst_ttfts_s(policy, age_delays=0.0))
    p99 = -len(aged) // 100
    assert unaged[p99] > 1.2 * baseline[p99], "the order has no tail; the test shows nothing"
    assert aged[p99] <= baseline[p99]
    assert statistics.mean(aged) < 0.7 * statistics.mean(baseline)


def test_one_workload_gives_one_history() -> None:
    assert burst_ttfts_s("feasible") == burst_ttfts_s("feasible")


@pytest.mark.slow
@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.integers(1, 60), st.floats(0, 0.05), st.floats(0.01, 3)), min_size=2, max_size=25),
    st.sampled_from(["sjf", "srpt", "edf", "lstf", "feasible"]),
)
def test_nobody_waits_longer_than_the_work_that_there_was(
    arrivals: list[tuple[int, float, float]], policy: str
) -> None:
    bench = Bench(policy=policy, fetch_window_blocks=2, l1_pages=130, check=True)
    now = 0.0
    for number, (hit, gap_s, slo_s) in enumerate(arrivals):
        now += gap_s
        bench.submit(now, f"r{number}", number, hit, 50, now + slo_s)
    bench.driver.run()
    accounts = [bench.driver.ended[f"r{number}"].account for number in range(len(arrivals))]
    total_s = sum(a.predicted_load_s + a.predicted_compute_s for a in accounts if a is not None)
    # delayed as in order of arrival, at most by all others; then behind those that aged before, and those admitted
    assert max(bench.ttft(f"r{number}") for number in range(len(arrivals))) < 3 * total_s + 0.2


# -- room for a large one ----------------------------------------------------------------------------------------


def aged_and_held_up(small_at_s: float) -> Bench:
    """Long answers hold L1 and end one after the other; a large request ages at 1.05 s and fits when the second ends; a
    small one fits beside it when the first does."""
    bench = Bench(policy="sjf", l1_pages=100, age_bound_s=0.2, max_batch_tokens=1000, age_delays=0)
    for family, (blocks, answer) in enumerate(((25, 1000), (30, 600), (20, 300))):
        bench.driver.submit_at(0.0, spec(f"hold{family}", prompt_of(family, blocks * BLOCK), new_tokens=answer))
    bench.submit(0.85, "large", 3, 60, 50, 50.0)
    bench.driver.submit_at(small_at_s, spec("small", prompt_of(4, 30 * BLOCK), new_tokens=2))
    bench.driver.run()
    return bench


def test_a_small_one_passes_a_large_aged_one_that_has_room_beside_it() -> None:
    bench = aged_and_held_up(small_at_s=0.9)
    small, large = (bench.driver.ended[name].account for name in ("small", "large"))
    assert small is not None and large is not None and small.admitted_s is not None and large.admitted_s is not None
    assert small.admitted_s > 0.9 and large.admitted_s > 1.05, "it is not held up; the test shows nothing"
    assert small.admitted_s < large.admitted_s


def test_one_that_comes_after_it_aged_does_not_pass() -> None:
    bench = aged_and_held_up(small_at_s=1.1)
    small, large = (bench.driver.ended[name].account for name in ("small", "large"))
    assert small is not None and large is not None and small.admitted_s is not None and large.admitted_s is not None
    assert large.admitted_s > 1.1, "it is not held up any more; the test shows nothing"
    assert small.admitted_s >= large.admitted_s


def test_those_that_pass_leave_room_for_the_aged_one() -> None:
    """Many that were there pass; the large one still enters as soon as those admitted before it are gone."""
    bench = Bench(policy="sjf", l1_pages=100, age_bound_s=0.05, max_batch_tokens=1000, max_running=64, age_delays=0)
    bench.driver.submit_at(0.0, spec("hold", prompt_of(1, 50 * BLOCK), new_tokens=600))
    bench.driver.submit_at(0.0, spec("short", prompt_of(2, 45 * BLOCK), new_tokens=200))
    bench.submit(1.0, "large", 3, 80, 50, 50.0)
    for number in range(20):
        bench.driver.submit_at(1.02, spec(f"small{number}", prompt_of(10 + number, 9 * BLOCK), new_tokens=400))
    bench.driver.run()
    hold, large = (bench.driver.ended[name].account for name in ("hold", "large"))
    assert hold is not None and large is not None and hold.end_s is not None and large.admitted_s is not None
    assert large.admitted_s <= hold.end_s + 1e-6
    smalls = [bench.driver.ended[f"small{number}"].account for number in range(20)]
    passed = [a for a in smalls if a is not None and a.admitted_s is not None and a.admitted_s < large.admitted_s]
    assert 0 < len(passed) < 4, "some pass, as many as leave room"
