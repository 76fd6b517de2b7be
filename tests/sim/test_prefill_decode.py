"""The simulated cluster of prefill and decode nodes: exact times, conservation, equal histories, faults, bounds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.dualpath.simulated_online import bound_per_s
from penstock.core.config import ConfigError
from penstock.sim.cluster_shape import (
    ABLATION,
    BASIC,
    LEVEL,
    ORACLE,
    PAPER,
    RECOMPUTE,
    SHORT_FIRST,
    SPLIT,
    ClusterShape,
    System,
)
from penstock.sim.decode_engine import DecodeEngine
from penstock.sim.fifo_link import FifoLink
from penstock.sim.fluid_bound import fluid_bound
from penstock.sim.prefill_decode import Fault, PrefillDecodeCluster, Settings
from penstock.sim.served_model import Gpu, load_model, model_names
from penstock.sim.serving_run import Bench, Slo, capacity
from penstock.sim.trajectories import Trajectory, from_table, load_of

SHAPE = ClusterShape(2, 2, 2, 2, gpus=8)
MODEL = load_model("deepseek-660b-like")
SHORT = [Trajectory(t.prompts[:12], t.hits[:12], t.answers[:12]) for t in from_table("32K", 3, 40)]
WARM = [
    Trajectory([hit + 300 for hit in hits], hits, [40] * len(hits))
    for hits in ([64 * (300 + 7 * i + 9 * turn) for turn in range(12)] for i in range(30))
]
"""Turns that find their context in storage: loads, not compute, are what takes time on slow NICs."""
SLOW = replace(SHAPE, storage_nic_bytes_per_s=5.0e9)
EVERY = (*ABLATION, RECOMPUTE, ORACLE)


def cluster(system: System, shape: ClusterShape = SHAPE, model: str = "deepseek-660b-like") -> PrefillDecodeCluster:
    return PrefillDecodeCluster(shape, load_model(model), system, SHORT)


def test_agents_have_the_means_of_the_table() -> None:
    trajectories = from_table("64K", 0)
    turns = [len(t.prompts) for t in trajectories]
    totals = [t.prompts[-1] + t.answers[-1] for t in trajectories]
    assert np.mean(turns) == pytest.approx(157, rel=0.02)
    assert np.mean(totals) == pytest.approx(55_958, rel=0.03)
    for t in trajectories[:50]:
        context = [p + a for p, a in zip(t.prompts, t.answers, strict=True)]
        assert t.hits == [0, *(c // 64 * 64 for c in context[:-1])]


def test_kv_to_load_per_compute_is_local_the_papers_row() -> None:
    """GB/PFLOP at 16K to 64K with 429 appended tokens: Qwen2.5-32B 117-267, DeepSeek-V3.2 13-36."""
    gpu = Gpu()
    for name, low, high in (("qwen2.5-32b", 117, 267), ("deepseek-660b-like", 13, 36)):
        model = load_model(name)
        per_pflop = []
        for context in (16_384, 65_536):
            flop = model.prefill_cost(gpu).rebuild_s(429, context) * gpu.flop_per_s
            per_pflop.append(context * model.kv_bytes_per_token / 1e9 / (flop / 1e15))
        assert per_pflop[0] == pytest.approx(low, rel=0.2)
        assert per_pflop[1] == pytest.approx(high, rel=0.2)


def test_every_model_is_readable_and_says_where_its_numbers_come_from() -> None:
    assert len(model_names()) >= 3
    assert all("odelled" in load_model(name).source for name in model_names())


def test_a_model_that_does_not_fit_is_one_line_with_the_field() -> None:
    with pytest.raises(ConfigError, match="memory_bytes is"):
        PrefillDecodeCluster(ClusterShape(1, 1), MODEL, PAPER, SHORT)
    with pytest.raises(ConfigError, match="storage_nic_bytes_per_s"):
        ClusterShape(1, 1, storage_nic_bytes_per_s=0.0)
    with pytest.raises(ConfigError, match="prefill_nodes is 3; allowed: a multiple of"):
        ClusterShape(3, 2, 2, 2)


def test_one_request_alone_takes_what_arithmetic_says() -> None:
    prompt, hit, answer = 20_000, 19_200, 11
    alone = [Trajectory([prompt], [hit], [answer])]
    run = PrefillDecodeCluster(SHAPE, MODEL, PAPER, alone)
    record = run.run([1.0])
    gpu, miss = SHAPE.gpu, prompt - hit
    read_s = hit * MODEL.kv_bytes_per_token / SHAPE.storage_nic_bytes_per_s
    load_s = hit * MODEL.kv_bytes_per_token / SHAPE.compute_nic_bytes_per_s
    compute_s = MODEL.step_overhead_s() + MODEL.attention(gpu).seconds(miss, hit)
    compute_s += miss * MODEL.linear_flop_per_token / gpu.flop_per_s / 16
    prefill_s = max(compute_s, load_s) + load_s / MODEL.layers
    assert record.ttft_s[0] == pytest.approx(read_s + prefill_s, rel=1e-5)
    a, b, c = MODEL.decode_step(gpu, 16)
    assert record.end_s - 1.0 - record.ttft_s[0] >= (answer - 1) * (a + b + c * prompt)
    assert record.tpot_s[0] == pytest.approx(a + b + c * (prompt + 5), rel=0.4)  # and its way to the decode engine


@pytest.mark.parametrize("system", EVERY, ids=lambda s: s.name)
@pytest.mark.parametrize("model", ["deepseek-660b-like", "moe-27b-like", "qwen2.5-32b"])
def test_every_request_ends_and_its_tokens_are_all_there(system: System, model: str) -> None:
    run = cluster(system, model=model)
    record = run.run([0.1 * i for i in range(60)])
    agents = [SHORT[i % len(SHORT)] for i in range(60)]
    load = load_of(agents, run.model.prefill_cost(SHAPE.gpu))
    assert record.requests == load.requests == len(record.ttft_s) == len(record.tpot_s)
    assert (record.prompt_tokens, record.hit_tokens) == (load.prompt_tokens, load.hit_tokens)
    assert record.answer_tokens == load.answer_tokens
    assert record.agents == 60 and len(run.scheduler) == 0
    run.scheduler.check_integrity()
    assert all(node.read_tokens == 0 and not node.unread for node in run.scheduler.groups.nodes.values())
    read = sum(link.tokens_total for link in run.links)
    assert read == (0 if system.read == "none" else load.hit_tokens - record.recomputed_tokens)


def test_the_same_arguments_give_the_same_history() -> None:
    first, second = (cluster(SPLIT).run([0.0] * 80) for _ in range(2))
    assert first.ttft_s == second.ttft_s and first.tpot_s == second.tpot_s and first.end_s == second.end_s


def test_dual_path_beats_basic_where_storage_is_the_bottleneck_and_nobody_beats_the_bound() -> None:
    bench = Bench(SLOW, MODEL, WARM)
    jobs = {s.name: bench.offline(s, 200).job_s for s in (BASIC, PAPER, SPLIT, SHORT_FIRST, ORACLE)}
    assert jobs["basic"] / jobs["scheduler"] > 1.6
    assert jobs["split"] <= jobs["scheduler"] * 1.02
    assert jobs["oracle"] < jobs["split"]
    bound = fluid_bound(SLOW, MODEL, WARM, 200, storage_nics=None)
    assert bound.seconds == bound.storage_s
    assert bound.seconds <= min(jobs["split"], jobs["scheduler"], jobs["short first"])
    assert fluid_bound(SLOW, MODEL, WARM, 200, storage_nics=2).seconds <= jobs["basic"]


def test_storage_nics_are_evenly_loaded() -> None:
    run = Bench(SLOW, MODEL, WARM, Settings(window_s=2.0)).offline(SPLIT, 300)
    assert run.balance.storage_max_avg < 1.18


def test_a_nic_that_is_cut_costs_bandwidth_and_no_request() -> None:
    bench = Bench(SLOW, MODEL, WARM)
    whole = bench.offline(SPLIT, 150).job_s
    faults = [Fault(whole / 4, "nic lost", 0), Fault(whole / 2, "nic healed", 0)]
    replanned, ignored = (bench.offline(replace(SPLIT, replan=p), 150, faults) for p in (True, False))
    requests = sum(len(WARM[i % len(WARM)].prompts) for i in range(150))
    assert replanned.record.requests == ignored.record.requests == requests
    assert replanned.job_s < ignored.job_s
    assert ignored.record.restarts > 0 and replanned.record.given_up == 0


@pytest.mark.parametrize("node", [0, 3])
def test_a_node_that_is_lost_restarts_its_requests_and_all_end(node: int) -> None:
    shape = ClusterShape(4, 4, 2, 2)
    run = PrefillDecodeCluster(shape, MODEL, SPLIT, SHORT)
    number = node if node == 0 else 6
    record = run.run([0.0] * 150, faults=[Fault(4.0, "node lost", number)])
    assert record.requests == sum(len(SHORT[i % len(SHORT)].prompts) for i in range(150))
    assert record.restarts > 0 and record.given_up == 0
    run.scheduler.check_integrity()
    assert not any(engine.node.name == f"n{number}" for engine in run.scheduler.groups.engines.values())


def test_slo_is_kept_at_a_low_rate_and_not_at_a_high_one() -> None:
    bench = Bench(replace(SHAPE, storage_nic_bytes_per_s=2.0e9), MODEL, SHORT)
    assert Slo().kept(bench.online(SPLIT, 0.5, 40.0, 0).record, 40.0)[0]
    assert not Slo().kept(bench.online(BASIC, 40.0, 40.0, 0).record, 40.0)[0]


def test_capacity_lies_where_a_limit_begins_to_bind_and_bounds_follow_the_nics_in_use() -> None:
    bench = Bench(replace(SHAPE, storage_nic_bytes_per_s=2.0e9), MODEL, SHORT)
    found = capacity(bench, BASIC, Slo(), low=0.5, high=40.0, arrivals_s=40.0, seed=0, steps=4)
    assert 0.5 < found.agents_per_s < 40.0
    assert found.ttft_s <= 4.0 and found.tpot_s <= 0.05
    assert found.beyond_ttft_s > 4.0 or found.beyond_tpot_s > 0.05
    basic, paper, oracle = (bound_per_s(bench, system) for system in (BASIC, PAPER, ORACLE))
    assert paper == pytest.approx(2 * basic) and oracle > paper


class Sequence:
    def __init__(self, number: int, length: int, steps: int) -> None:
        self.number, self.length, self.steps, self.context = number, length, steps, float(length)


def test_a_decode_engine_slows_down_while_others_are_there() -> None:
    engine = DecodeEngine("d", 0, 1000, (0.01, 0.002, 0.0))
    engine.join(Sequence(1, 100, 10), 0.0)
    assert engine.next_end() == pytest.approx(0.12)
    engine.join(Sequence(2, 100, 5), 0.06)  # the first has 5 tokens to go; a step takes 14 ms now
    assert engine.next_end() == pytest.approx(0.06 + 5 * 0.014)
    ended = engine.leave_finished(engine.next_end())
    assert [s.number for s in ended] == [1, 2]
    assert engine.used == 0 and engine.count == 0


def test_a_decode_engine_forgets_who_is_dropped() -> None:
    engine = DecodeEngine("d", 0, 1000, (0.01, 0.0, 0.0))
    first, second = Sequence(1, 600, 10), Sequence(2, 600, 10)
    engine.join(first, 0.0)
    assert not engine.has_room(second)
    engine.drop(first)
    assert engine.has_room(second) and engine.next_end() == float("inf")


def test_a_link_serves_in_order_and_counts_by_window() -> None:
    link = FifoLink("n", 100.0, 1.0)
    assert link.give(100, 0.0) == 1.0
    assert link.give(50, 0.5) == 1.5
    assert link.give(50, 4.0) == 4.5
    assert link.windows == [0.0, 150.0, 0.0, 0.0, 50.0]
    link.give(1000, 5.0)
    link.forget(6.0)
    assert link.free_at == 6.0 and len(link.windows) <= 7


def test_level_steps_spread_attention_evenly_and_bring_first_tokens_sooner() -> None:
    late = [Trajectory(t.prompts[30:50], t.hits[30:50], t.answers[30:50]) for t in from_table("64K", 0, 60)]
    bench = Bench(ClusterShape(2, 4, 2, 4), MODEL, [t for t in late if len(t.prompts) == 20])
    plain, level = (bench.offline(system, 300) for system in (SPLIT, LEVEL))
    assert level.record.requests == plain.record.requests
    assert level.balance.attention_max_avg < 1.06 < plain.balance.attention_max_avg
    assert level.ttft_mean_s < plain.ttft_mean_s
    assert level.job_s <= plain.job_s
