"""Sides, split reads, link traffic, ratio bounds, load-or-recompute and the compute quota of the two paths."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.cluster.bounds import NodeLinks, link_use, ratio_bounds
from penstock.core.cluster.paths import shorter_side, split_tokens
from penstock.core.config import ConfigError
from penstock.core.cost import ComputeCost
from penstock.core.engine.compute_quota import AttentionCost, ComputeQuota, level_s
from penstock.core.load_or_recompute import recompute_tokens

BLOCK = 64


def test_the_bounds_of_the_paper() -> None:
    low, high = ratio_bounds(NodeLinks(8, 50e9, 50e9, 500e9))
    assert low == pytest.approx(1 / 7)
    assert high == pytest.approx(7 / 2)


@pytest.mark.parametrize(("prefill", "decode", "free"), [(1, 7, True), (1, 8, False), (7, 2, True), (4, 1, False)])
def test_ratios_inside_the_bounds_leave_no_link_but_storage_a_bottleneck(prefill: int, decode: int, free: bool) -> None:
    assert (link_use(NodeLinks(8, 50e9, 50e9, 500e9), prefill, decode).worst[1] <= 1.0 + 1e-9) is free


def test_the_bounds_name_the_link_that_is_short() -> None:
    assert link_use(NodeLinks(8, 50e9, 50e9, 500e9), 1, 20).worst[0] == "prefill_in"
    assert link_use(NodeLinks(8, 50e9, 50e9, 200e9), 2, 2).worst[0] == "decode_memory"


def test_a_link_without_bandwidth_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="storage_nic_bytes_per_s"):
        NodeLinks(8, 50e9, 0, 500e9)


def test_link_use_is_the_sum_of_the_traffic_of_requests() -> None:
    """Reads balanced over one prefill and two decode nodes put on each compute NIC what the inequalities say. A request
    with 3,000 hit tokens: read by the prefill side, and by the decode side. A local copy counts in both directions."""
    hits = 3000
    local = {"prefill_in": hits, "prefill_out": 2 * hits, "decode_in": 2 * hits, "decode_out": hits}
    remote = {"prefill_in": hits, "prefill_out": 0, "decode_in": hits, "decode_out": 2 * hits}
    use = link_use(NodeLinks(1, 1000.0, 1000.0, 1e9), 1, 2)  # in a second each storage NIC reads 1000 tokens
    assert (local["prefill_out"] + 2 * remote["prefill_out"]) / 3 == pytest.approx(use.prefill_out * 1000)
    assert (local["prefill_in"] + 2 * remote["prefill_in"]) / 3 == pytest.approx(use.prefill_in * 1000)
    assert (local["decode_out"] + 2 * remote["decode_out"]) / 3 / 2 == pytest.approx(use.decode_out * 1000)
    assert (local["decode_in"] + 2 * remote["decode_in"]) / 3 / 2 == pytest.approx(use.decode_in * 1000)


def test_the_shorter_queue_reads_and_equal_queues_read_where_nothing_is_relayed() -> None:
    assert shorter_side(1.0, 0.5) == "decode"
    assert shorter_side(0.5, 1.0) == "prefill"
    assert shorter_side(1.0, 1.0) == "prefill"


@given(
    hit=st.integers(0, 2000).map(lambda n: n * BLOCK),
    local_s=st.floats(0, 10),
    remote_s=st.floats(0, 10),
    local_rate=st.floats(1e3, 1e7),
    remote_rate=st.floats(1e3, 1e7),
)
def test_a_split_read_ends_on_both_sides_at_once(
    hit: int, local_s: float, remote_s: float, local_rate: float, remote_rate: float
) -> None:
    tokens = split_tokens(hit, local_s, remote_s, local_rate, remote_rate, BLOCK, BLOCK)
    assert 0 <= tokens <= hit and tokens % BLOCK == 0
    ends = local_s + (hit - tokens) / local_rate, remote_s + tokens / remote_rate
    block_s = BLOCK / local_rate + BLOCK / remote_rate
    if 0 < tokens < hit:
        assert abs(ends[0] - ends[1]) <= block_s
    one_side = min(local_s + hit / local_rate, remote_s + hit / remote_rate)
    assert max(ends[0] if tokens < hit else 0, ends[1] if tokens else 0) <= one_side + block_s


def test_a_side_that_is_down_reads_nothing_and_small_parts_are_not_split_off() -> None:
    inf = float("inf")
    assert split_tokens(6400, inf, 1.0, 0.0, 1e6, BLOCK, 1024) == 6400
    assert split_tokens(6400, 1.0, inf, 1e6, 0.0, BLOCK, 1024) == 0
    assert split_tokens(6400, 0.0, 0.0, 1e6, 1e5, BLOCK, 1024) == 0
    assert split_tokens(6400, 0.0, 0.0, 1e5, 1e6, BLOCK, 1024) == 6400


COST = ComputeCost(0.0, 1e-4, 1e-9)


def test_nothing_is_recomputed_while_loading_is_faster_than_the_engine() -> None:
    assert recompute_tokens(32_768, 0.0, 1e6, 0.5, COST, BLOCK) == 0


@given(hit=st.integers(1, 1000).map(lambda n: n * BLOCK), wait_s=st.floats(0, 60), rate=st.floats(1e3, 1e6))
def test_the_front_is_computed_by_the_time_the_back_is_loaded(hit: int, wait_s: float, rate: float) -> None:
    tokens = recompute_tokens(hit, wait_s, rate, 0.0, COST, BLOCK)
    assert 0 <= tokens <= hit and tokens % BLOCK == 0
    end_s = wait_s + (hit - tokens) / rate
    assert COST.rebuild_s(tokens, 0) <= end_s + 1e-9
    more = tokens + BLOCK
    assert tokens == hit or COST.rebuild_s(more, 0) > wait_s + (hit - more) / rate


ATTENTION = AttentionCost(1e-5, 1e-9)


def test_requests_are_packed_in_order_up_to_the_quota_and_the_one_that_overflows_is_cut() -> None:
    quota = ComputeQuota(ATTENTION, attention_s_max=0.04)
    taken, spent_s = quota.pack([(500, 10_000), (500, 30_000), (5_000, 30_000), (10, 0)])
    assert taken[:2] == [500, 500]
    assert 0 < taken[2] < 5_000
    assert len(taken) == 3
    assert spent_s <= 0.04 < spent_s + ATTENTION.seconds(1, 36_000)


def test_one_token_at_least_is_taken() -> None:
    taken, _ = ComputeQuota(AttentionCost(1.0, 0.0), attention_s_max=0.3).pack([(5, 0)])
    assert taken == [1]


def test_the_baseline_packs_by_tokens() -> None:
    quota = ComputeQuota(ATTENTION, by="tokens", tokens_max=1000)
    assert quota.pack([(600, 0), (600, 50_000), (5, 0)])[0] == [600, 400]


@given(st.lists(st.tuples(st.integers(1, 20_000), st.integers(0, 100_000)), max_size=20))
def test_a_batch_keeps_its_quota(waiting: list[tuple[int, int]]) -> None:
    quota = ComputeQuota(ATTENTION, attention_s_max=0.3, tokens_max=30_000, requests_max=8)
    taken, spent_s = quota.pack(waiting)
    assert spent_s <= 0.3 + ATTENTION.seconds(1, 100_000) and sum(taken) <= 30_000 and len(taken) <= 8
    assert spent_s == pytest.approx(sum(ATTENTION.seconds(q, c) for q, (_, c) in zip(taken, waiting, strict=False)))
    assert all(q == waiting[i][0] for i, q in enumerate(taken[:-1]))
    assert bool(taken) == bool(waiting)


def test_a_quota_of_another_kind_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="by is 'luck'; allowed: attention, tokens"):
        ComputeQuota(ATTENTION, by="luck")


@given(
    ready=st.lists(st.floats(1e-3, 0.3), min_size=1, max_size=16),
    overhead_s=st.floats(1e-3, 0.05),
)
def test_no_other_quota_gets_more_done_per_second_of_a_step(ready: list[float], overhead_s: float) -> None:
    def rate(quota_s: float) -> float:
        return sum(min(x, quota_s) for x in ready) / (overhead_s + quota_s)

    chosen = level_s(ready, overhead_s)
    assert any(chosen == pytest.approx(x) for x in ready)
    assert all(rate(chosen) >= rate(x) * (1 - 1e-6) for x in (*ready, *(i / 100 for i in range(1, 40))))


def test_one_rank_with_more_than_the_others_does_not_hold_up_the_step() -> None:
    assert level_s([0.07] * 15 + [0.3], 0.012) == pytest.approx(0.07)
    assert level_s([0.3], 0.012) == pytest.approx(0.3)
    assert level_s([], 0.012) == 0.0


def test_a_batch_may_have_less_than_the_quota() -> None:
    quota = ComputeQuota(ATTENTION, attention_s_max=0.3)
    waiting = [(5_000, 30_000.0), (5_000, 30_000.0)]
    assert quota.ready_s(waiting) == 0.3
    assert quota.pack(waiting, 0.04)[1] <= 0.04 < quota.pack(waiting)[1] <= 0.3
    assert quota.pack(waiting, 1.0) == quota.pack(waiting)
