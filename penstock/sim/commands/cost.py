"""`penstock sim cost`: the cost of one scheduler decision, and of one event, with many waiting requests.

For short prompts: processor time, with a queue for each policy. For long prompts also counted work: the bytecodes that
one event and its decisions execute. That count is the same on every machine; a loop inside the interpreter (such as
copying a list) counts as one.
"""

from __future__ import annotations

import gc
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console

from penstock.core.bandwidth import LinkCost
from penstock.core.config import POLICIES, Policy, SchedulerConfig
from penstock.core.connector.records import Landed
from penstock.core.connector.scheduler import ConnectorScheduler
from penstock.core.cost import ComputeCost, CostModel
from penstock.core.engine.scheduler import LoadScheduler
from penstock.core.keys import KeyChain, root_key
from penstock.core.operations import BlockHit, Compute, Fetch, Lookup, Operation, RequestSpec, Save
from penstock.report import Report
from penstock.sim.clock import VirtualClock
from penstock.sim.engine_driver import EngineDriver, ideal_links
from penstock.workloads.statistics import percentile

WAITING_GOAL_S = {1000: 50e-6, 10_000: 100e-6}
DECISIONS = 3000
BLOCK_TOKENS, BLOCK_BYTES, BLOCKS = 64, 1 << 20, 4
LONG = (2000, 1000)  # blocks of a prompt, waiting requests
SHARE_A_PROMPT = 8  # waiting requests with the same leading blocks
SAVES = 8
EVENTS = 16  # measured per kind
GROWTH_MAX = 2.0  # of counted work with ten times the blocks and requests: logarithmic growth stays below


class TimedScheduler(LoadScheduler):
    """Records the processor time of each decision."""

    def __init__(self, config: SchedulerConfig, cost: CostModel) -> None:
        super().__init__(config, cost)
        self.decisions_s: list[float] = []

    def decide(self, now: float) -> list[Operation]:
        """Decide, and record the thread's processor seconds."""
        started_s = time.thread_time()
        operations = super().decide(now)
        self.decisions_s.append(time.thread_time() - started_s)
        return operations


def decisions_s(policy: Policy, waiting: int) -> tuple[list[float], float]:
    """Processor time of single decisions with about `waiting` waiting requests, and of one event with its decision."""
    config = SchedulerConfig(
        block_tokens=BLOCK_TOKENS, block_bytes=BLOCK_BYTES, l1_pages=4000, l2_slots=4000, policy=policy,
        max_waiting=waiting + 1000, age_bound_s=1e6, request_timeout_s=1e7, lookup_window=64,
    )  # fmt: skip
    scheduler = TimedScheduler(config, CostModel(LinkCost(2e9), ComputeCost(1e-3, 1e-5, 1e-10)))
    clock, root, dice = VirtualClock(), root_key(b"cost", ""), random.Random(1)
    pool: dict[bytes, BlockHit] = {}
    driver = EngineDriver(clock, scheduler, pool, ideal_links(clock, {"net": 1e9}, 2e9), ComputeCost(1e-3, 1e-5, 1e-10))
    admitted = config.max_running
    for number in range(waiting + admitted + DECISIONS // 10):
        tokens = [number, *(dice.randrange(1000) for _ in range(BLOCKS * BLOCK_TOKENS + 9))]
        for key in KeyChain(root, BLOCK_TOKENS).extend(tokens):
            pool[key] = BlockHit(BLOCK_BYTES, ("net",))
        driver.submit_at(number * 1e-9, RequestSpec(str(number), tokens, 1, root, dice.uniform(1, 1e4)))
    while scheduler.gauges()["requests_waiting"] < waiting + DECISIONS // 10 and clock.step():
        pass
    scheduler.decisions_s.clear()
    gc.disable()
    started_s, events = time.thread_time(), clock.events
    while len(scheduler.decisions_s) < DECISIONS and clock.step():
        pass
    event_s = (time.thread_time() - started_s) / (clock.events - events)
    gc.enable()
    return scheduler.decisions_s, event_s


@dataclass(frozen=True, slots=True)
class EventCost:
    """Cost of one event and the decisions after it."""

    seconds: float
    bytecodes: float


def bytecodes(call: Callable[[], object]) -> int:
    """How many bytecodes the call executes."""
    count = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal count
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


def _cost_of(events: Sequence[Callable[[], object]], parts: int = 1) -> EventCost:
    """Alternate events are timed and counted; each consists of `parts` steps."""
    timed, counted = events[::2], events[1::2]
    seconds, executed = [], []
    for one, other in zip(timed, counted, strict=True):
        started_s = time.thread_time()
        one()
        seconds.append(time.thread_time() - started_s)
        executed.append(bytecodes(other))
    return EventCost(statistics.mean(seconds) / parts, statistics.mean(executed) / parts)


def _long_config(pages: int, waiting: int) -> SchedulerConfig:
    """Blocks of one token, so that prompts of many blocks take little memory."""
    return SchedulerConfig(
        block_tokens=1, block_bytes=BLOCK_BYTES, l1_pages=pages, l2_slots=16 * EVENTS, recompute=True,
        max_waiting=waiting + 2, max_batch_tokens=SAVES + 1, save_window_blocks=SAVES, age_bound_s=1e6,
        request_timeout_s=1e7, lookup_timeout_s=1e6,
    )  # fmt: skip


def _long_spec(number: int, blocks: int) -> RequestSpec:
    prompt = [number // SHARE_A_PROMPT + 1] * blocks + [number]
    return RequestSpec(str(number), prompt, 1, root_key(b"cost", ""))


def _costs() -> CostModel:
    return CostModel(LinkCost(2e9), ComputeCost(1e-3, 1e-5, 1e-10))


def engine_events(blocks: int, waiting: int) -> dict[str, EventCost]:
    """An engine's scheduler while one prompt of this many blocks is fetched and `waiting` more do not fit. Events: a
    block is saved (admission checks again who fits), a block is fetched."""
    scheduler = LoadScheduler(_long_config(blocks + blocks // 2, waiting), _costs())
    hit = BlockHit(BLOCK_BYTES, ("net",))
    scheduler.submit(RequestSpec("first", list(range(SAVES + 1)), 1, root_key(b"cost", "")), 0.0)
    saves: list[int] = []
    fetches: list[int] = []

    def run() -> None:
        while operations := scheduler.decide(0.0):
            for op in operations:
                if isinstance(op, Lookup):
                    scheduler.lookup_done(op.op_id, [None if op.request_id == "first" else hit] * len(op.keys), 0.0)
                elif isinstance(op, Compute):
                    scheduler.computed(op.op_id, [1] * len(op.chunks), 0.0)
                elif isinstance(op, Save):
                    saves.append(op.op_id)
                elif isinstance(op, Fetch):
                    fetches.append(op.op_id)

    run()
    for number in range(waiting + 1):
        scheduler.submit(_long_spec(number, blocks), 0.0)
    run()
    assert scheduler.gauges()["requests_waiting"] >= waiting and len(saves) == SAVES

    def saved(op_id: int, done: bool) -> None:
        scheduler.saved(op_id, None) if done else scheduler.downloaded(op_id)
        scheduler.decide(0.0)

    def fetched() -> None:
        scheduler.fetched(fetches.pop(0), None, 0.0)
        fetches.extend(op.op_id for op in scheduler.decide(0.0) if isinstance(op, Fetch))

    return {
        "save": _cost_of([partial(saved, op, done) for done in (False, True) for op in saves]),
        "fetch": _cost_of([fetched] * EVENTS),
    }  # fmt: skip


def guest_events(blocks: int, waiting: int) -> dict[str, EventCost]:
    """The scheduler inside vLLM with this many waiting requests whose prompts can be loaded. Event: a block is fetched;
    after it the host asks for one request which loads deserve pages."""
    scheduler = ConnectorScheduler(_long_config(4 * blocks, waiting), _costs())
    hit = BlockHit(BLOCK_BYTES, ("net",))
    for number in range(waiting):
        scheduler.submit(_long_spec(number, blocks), 0, 0.0)
    fetches: list[int] = []

    def run() -> bool:
        operations = scheduler.decide(0.0)
        for op in operations:
            assert not isinstance(op, Landed)
            if isinstance(op, Lookup):
                scheduler.lookup_done(op.op_id, [hit] * len(op.keys), 0.0)
            elif isinstance(op, Fetch):
                fetches.append(op.op_id)
        return bool(operations)

    def fetched() -> None:
        scheduler.fetched(fetches.pop(0), None, 0.0)
        run()

    while run():
        pass
    for _ in range(EVENTS):  # gives the cost model its measurements
        fetched()
        scheduler.stepped([(10, 10)], 0.01)
    found = scheduler.matched("0", 0, 0.0)
    assert found == blocks
    scheduler.allocated("0", 0, range(found), 0.0)
    for _ in range(EVENTS // 2):
        run()
        fetched()

    def step(name: str) -> None:
        fetched()
        scheduler.matched(name, 0, 0.0)

    asked = [partial(step, str(number)) for number in range(waiting - 2 * EVENTS, waiting)]
    return {"fetch": _cost_of([fetched] * EVENTS), "fetch_and_matched": _cost_of(asked)}


def long_prompts(report: Report, blocks: int, waiting: int) -> None:
    """The cost of an event with this many blocks and waiting requests, and the growth of counted work from a tenth."""
    for who, events in (("engine", engine_events), ("in_vllm", guest_events)):
        few, many = events(blocks // 10, waiting // 10), events(blocks, waiting)
        for kind, found in many.items():
            label = f"{who}_{blocks}_blocks_{waiting}_waiting_{kind}"
            report.figure(f"{label}_us", found.seconds * 1e6)
            report.figure(f"{label}_bytecodes", found.bytecodes)
            report.figure(f"{label}_growth", found.bytecodes / few[kind].bytecodes, GROWTH_MAX)


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
    """Processor time of one decision with 1,000 and 10,000 waiting requests, and of one simulated event; and the cost
    of an event with 1,000 waiting prompts of 2,000 blocks, also in counted work."""
    chosen = tuple(policy or POLICIES)
    for name in chosen:
        if name not in POLICIES:
            raise typer.BadParameter(f"{name!r}; allowed: {', '.join(POLICIES)}")
    report = Report("sim cost")
    tables(report, chosen)  # type: ignore[arg-type]
    long_prompts(report, *LONG)
    report.print(Console())
    if json is not None:
        report.write_json(json)
