"""The simulator's predictions for `benchmarks dualpath --engine vllm`: costs of one run, and what follows."""

from __future__ import annotations

import pytest

from benchmarks.dualpath.agents import BLOCK_TOKENS, Agent, AgentTurn
from benchmarks.dualpath.live_runs import Answered, Run
from benchmarks.dualpath.testbed import NicLoads, Topology
from benchmarks.dualpath.vllm_simulated import VllmCosts, VllmHosts, median_error, predicted
from penstock.sim.cluster_shape import LAYERWISE, PAPER, SPLIT

BLOCKS, BLOCK_BYTES, NIC = 16, 262_144, 4e6
LOAD_S = BLOCKS * BLOCK_BYTES / NIC  # of one prompt over one NIC
AGENTS = [Agent(str(n), [AgentTurn([1] * (BLOCKS * BLOCK_TOKENS + 9), BLOCKS * BLOCK_TOKENS, 8)]) for n in range(8)]


def test_costs_are_those_of_the_run_that_computes_all() -> None:
    firsts_s = [6.0, 7.0, 8.0, 9.0]
    tokens = list(range(8))
    answered = [Answered(n, 0, 1000, 5.0, at, at + 0.2, at + 0.8, tokens) for n, at in enumerate(firsts_s)]
    costs = VllmCosts.of(Run(answered, NicLoads([]), 5.0, 12.0, 12.0), BLOCK_BYTES)
    assert costs.token_s == pytest.approx(4.0 / 4000) and costs.step_s == pytest.approx(0.1)
    assert costs.token_bytes == 4096


def test_predictions_follow_the_nics_where_computing_is_short() -> None:
    costs = VllmCosts(0.001, 1e-6, BLOCK_BYTES // BLOCK_TOKENS)
    for decode, nics in ((1, 2), (2, 3)):
        hosts = VllmHosts(Topology(1, decode), NIC, 8 * NIC, 96 << 20, 160 << 20, 128)
        (one_s, one_job_s), (both_s, both_job_s) = (predicted(hosts, costs, s, AGENTS) for s in (LAYERWISE, SPLIT))
        assert one_s == pytest.approx(LOAD_S * 4.5, rel=0.05) and one_job_s == pytest.approx(8 * LOAD_S, rel=0.05)
        assert both_job_s == pytest.approx(8 * LOAD_S / nics, rel=0.2) and both_s < 1.2 * one_s / nics
        assert both_s <= predicted(hosts, costs, PAPER, AGENTS)[0]


def test_the_error_is_the_median_of_the_relative_ones() -> None:
    assert median_error({"a": (1.1, 1.0), "b": (1.0, 2.0), "c": (3.0, 3.0)}) == pytest.approx(0.1)
