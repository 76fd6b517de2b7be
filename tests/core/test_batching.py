"""Prefills share a batch when that pays, and take turns when it does not."""

from __future__ import annotations

import pytest

from penstock.core.config import SchedulerConfig
from penstock.core.cost import ComputeCost, CostModel, LinkCost
from penstock.core.keys import root_key
from penstock.core.operations import RequestSpec
from penstock.core.scheduler import LoadScheduler
from penstock.testing.virtual_body import VirtualBody


@pytest.mark.parametrize(("fixed_s", "first_s", "second_s"), [(1.0, 2.3, 2.3), (0.0, 0.2, 0.3)])
def test_a_second_prefill_joins_only_when_the_fixed_cost_is_worth_the_delay(
    fixed_s: float, first_s: float, second_s: float
) -> None:
    compute = ComputeCost(fixed_s, 0.01, 0.0)
    config = SchedulerConfig(block_tokens=4, block_bytes=64, l1_pages=64, l2_slots=4, pool=False, policy="fcfs")
    body = VirtualBody(LoadScheduler(config, CostModel(LinkCost(1e9), compute)), {}, {}, 1e9, compute, check=True)
    for name in ("x", "a", "b"):  # the other two meet while x is computed
        body.submit_at(0.0, RequestSpec(name, [ord(name)] * 10, 1, root_key(b"k" * 16, "")))
    body.run()
    assert body.ended["a"].account.first_token_s == pytest.approx(first_s, rel=0.01, abs=0.002)
    assert body.ended["b"].account.first_token_s == pytest.approx(second_s, rel=0.01, abs=0.002)
