"""`penstock sim cost`: what one decision of an engine's brain costs with many requests waiting, and one event."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from penstock.bench.report import Report
from penstock.bench.statistics import percentile
from penstock.core.config import POLICIES, Policy, SchedulerConfig
from penstock.core.cost import ComputeCost, CostModel, LinkCost
from penstock.core.engine.scheduler import LoadScheduler
from penstock.core.keys import KeyChain, root_key
from penstock.core.operations import BlockHit, Operation, RequestSpec
from penstock.sim.clock import VirtualClock
from penstock.sim.engine_body import EngineBody, ideal_links

WAITING_GOAL_S = {1000: 50e-6, 10_000: 100e-6}
DECISIONS = 3000
BLOCK_TOKENS, BLOCK_BYTES, BLOCKS = 64, 1 << 20, 4


class TimedScheduler(LoadScheduler):
    """Notes the processor time of each decision."""

    def __init__(self, config: SchedulerConfig, cost: CostModel) -> None:
        super().__init__(config, cost)
        self.decisions_s: list[float] = []

    def decide(self, now: float) -> list[Operation]:
        """As the scheduler's, and the thread's processor seconds are noted."""
        started_s = time.thread_time()
        operations = super().decide(now)
        self.decisions_s.append(time.thread_time() - started_s)
        return operations


def decisions_s(policy: Policy, waiting: int) -> tuple[list[float], float]:
    """Processor time of single decisions while about `waiting` requests wait, and of one event with its decision."""
    config = SchedulerConfig(
        block_tokens=BLOCK_TOKENS, block_bytes=BLOCK_BYTES, l1_pages=4000, l2_slots=4000, policy=policy,
        max_waiting=waiting + 1000, age_bound_s=1e6, request_timeout_s=1e7, lookup_window=64,
    )  # fmt: skip
    brain = TimedScheduler(config, CostModel(LinkCost(2e9), ComputeCost(1e-3, 1e-5, 1e-10)))
    clock, root, dice = VirtualClock(), root_key(b"cost", ""), random.Random(1)
    pool: dict[bytes, BlockHit] = {}
    body = EngineBody(clock, brain, pool, ideal_links(clock, {"net": 1e9}, 2e9), ComputeCost(1e-3, 1e-5, 1e-10))
    admitted = config.max_running
    for number in range(waiting + admitted + DECISIONS // 10):
        tokens = [number, *(dice.randrange(1000) for _ in range(BLOCKS * BLOCK_TOKENS + 9))]
        for key in KeyChain(root, BLOCK_TOKENS).extend(tokens):
            pool[key] = BlockHit(BLOCK_BYTES, ("net",))
        body.submit_at(number * 1e-9, RequestSpec(str(number), tokens, 1, root, dice.uniform(1, 1e4)))
    while brain.gauges()["requests_waiting"] < waiting + DECISIONS // 10 and clock.step():
        pass
    brain.decisions_s.clear()
    gc.disable()
    started_s, events = time.thread_time(), clock.events
    while len(brain.decisions_s) < DECISIONS and clock.step():
        pass
    event_s = (time.thread_time() - started_s) / (clock.events - events)
    gc.enable()
    return brain.decisions_s, event_s


def tables(report: Report, policies: Sequence[Policy]) -> None:
    """Figures of every policy with each number of waiting requests."""
    for policy in policies:
        for waiting, goal_s in WAITING_GOAL_S.items():
            costs_s, event_s = decisions_s(policy, waiting)
            label = f"{policy}_{waiting}_waiting"
            report.figure(f"{label}_decision_mean_us", statistics.mean(costs_s) * 1e6, goal_s * 1e6)
            report.figure(f"{label}_decision_median_us", statistics.median(costs_s) * 1e6)
            report.figure(f"{label}_decision_p99_us", percentile(costs_s, 99) * 1e6)
            report.figure(f"{label}_event_mean_us", event_s * 1e6)


def cost(
    json: Annotated[Path | None, typer.Option(help="Write the figures to this file.")] = None,
    policy: Annotated[list[str] | None, typer.Option(help=f"Policies: {', '.join(POLICIES)}. Default: all.")] = None,
) -> None:
    """Processor time of one decision with 1,000 and 10,000 waiting requests, and of one simulated event."""
    chosen = tuple(policy or POLICIES)
    for name in chosen:
        if name not in POLICIES:
            raise typer.BadParameter(f"{name!r}; allowed: {', '.join(POLICIES)}")
    report = Report("sim cost")
    tables(report, chosen)  # type: ignore[arg-type]
    report.print(Console())
    if json is not None:
        report.write_json(json)
