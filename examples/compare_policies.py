"""Compares request orderings on a virtual clock, in a second and without a model: `python
examples/compare_policies.py`."""

from __future__ import annotations

import random
import statistics

from penstock.core.bandwidth import LinkCost
from penstock.core.config import POLICIES, Policy, SchedulerConfig
from penstock.core.cost import ComputeCost, CostModel
from penstock.core.engine.scheduler import LoadScheduler
from penstock.core.keys import KeyChain, root_key
from penstock.core.operations import BlockHit, RequestSpec
from penstock.testing.virtual_driver import Ended, VirtualDriver

BLOCK_TOKENS, BLOCK_BYTES = 256, 256 * 131_072  # Llama-3.1-8B
FETCH, UPLOAD = 17.2e9, 25e9  # bytes per second
REQUESTS, RATE_PER_S = 60, 3.2


def run(policy: Policy) -> list[Ended]:
    """The same requests under one policy: contexts of 8K to 60K tokens, held by the pool, and deadlines of 1 to 4 s."""
    cost = CostModel(LinkCost(UPLOAD), ComputeCost(0.017, 4e-5, 1.3e-9), {"net": LinkCost(FETCH)})
    config = SchedulerConfig(BLOCK_TOKENS, BLOCK_BYTES, l1_pages=1800, l2_slots=3000, policy=policy)
    pool: dict[bytes, BlockHit] = {}
    driver = VirtualDriver(LoadScheduler(config, cost), pool, {"net": FETCH}, UPLOAD, cost.compute)
    rng = random.Random(1)
    at = 0.0
    for number in range(REQUESTS):
        root = root_key(b"example", str(number))
        context = [number] * (rng.randrange(32, 240) * BLOCK_TOKENS)
        for key in KeyChain(root, BLOCK_TOKENS).extend(context):
            pool[key] = BlockHit(BLOCK_BYTES, ("net",))
        at += rng.expovariate(RATE_PER_S)
        driver.submit_at(at, RequestSpec(str(number), [*context, 1, 2, 3], 1, root, at + rng.choice((1.0, 2.0, 4.0))))
    driver.run()
    return list(driver.ended.values())


for name in POLICIES:
    accounts = [end.account for end in run(name) if end.account is not None]  # type: ignore[arg-type]
    ttfts = [(account.first_token_s or 0.0) - account.arrival_s for account in accounts]
    met = statistics.mean(float((account.first_token_s or 1e9) <= account.deadline_s) for account in accounts)
    print(f"{name:12} mean TTFT {statistics.mean(ttfts):6.3f} s   SLO attainment {met:.2f}")
