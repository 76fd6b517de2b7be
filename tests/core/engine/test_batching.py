"""Prefills share a batch when that pays, and take turns when it does not."""

from __future__ import annotations

import pytest

from penstock.core.bandwidth import LinkCost
from penstock.core.config import SchedulerConfig
from penstock.core.cost import ComputeCost, CostModel
from penstock.core.engine.scheduler import LoadScheduler
from penstock.core.keys import root_key
from penstock.core.operations import Compute, Operation, RequestSpec
from penstock.testing.virtual_driver import VirtualDriver


@pytest.mark.parametrize(("fixed_s", "first_s", "second_s"), [(1.0, 2.3, 2.3), (0.0, 0.2, 0.3)])
def test_a_second_prefill_joins_only_when_the_fixed_cost_is_worth_the_delay(
    fixed_s: float, first_s: float, second_s: float
) -> None:
    compute = ComputeCost(fixed_s, 0.01, 0.0)
    config = SchedulerConfig(block_tokens=4, block_bytes=64, l1_pages=64, l2_slots=4, pool=False, policy="fcfs")
    driver = VirtualDriver(LoadScheduler(config, CostModel(LinkCost(1e9), compute)), {}, {}, 1e9, compute, check=True)
    for name in ("x", "a", "b"):  # the other two meet while x is computed
        driver.submit_at(0.0, RequestSpec(name, [ord(name)] * 10, 1, root_key(b"k" * 16, "")))
    driver.run()
    assert driver.ended["a"].account.first_token_s == pytest.approx(first_s, rel=0.01, abs=0.002)
    assert driver.ended["b"].account.first_token_s == pytest.approx(second_s, rel=0.01, abs=0.002)


@pytest.mark.parametrize(("quota_s", "longest"), [(1e9, 400), (1.0, 100), (1e-3, 4)])
def test_the_compute_quota_bounds_a_batch_and_every_prefill_gets_on(quota_s: float, longest: int) -> None:
    """10 ms a token: a quota of 1 s is 100 tokens; one that allows none still lets a block through."""
    compute = ComputeCost(0.0, 0.01, 0.0)
    config = SchedulerConfig(
        block_tokens=4, block_bytes=64, l1_pages=128, l2_slots=4, pool=False, max_batch_s=quota_s, request_timeout_s=1e6
    )
    batches: list[int] = []

    class Counted(VirtualDriver):
        def _carry_out(self, operation: Operation) -> None:
            if isinstance(operation, Compute):
                batches.append(max(len(chunk.tokens) for chunk in operation.chunks))
            super()._carry_out(operation)

    driver = Counted(LoadScheduler(config, CostModel(LinkCost(1e9), compute)), {}, {}, 1e9, compute, check=True)
    driver.submit_at(0.0, RequestSpec("a", list(range(400)), 3, root_key(b"k" * 16, "")))
    driver.run()
    assert driver.ended["a"].reason == "length"
    assert max(batches) == longest
