"""Part `many` of `benchmarks pool`: 16 requests at once; idle devices, and the share of each of two tenants."""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.pooling.rig import CONTEXTS, MODELS, QUESTION_TOKENS, Rig, document_root, fill, open_rig, pooled
from benchmarks.pooling.ttft import engine_config, last_event
from penstock.bench.documents import BLOCK_TOKENS, Document, document
from penstock.core.bandwidth import LinkCost
from penstock.core.cost import CostModel
from penstock.core.keys import BlockKey
from penstock.core.layout import staging_bytes
from penstock.engine.api import GenerationRequest
from penstock.engine.engine import Engine, new_request_id
from penstock.engine.modelled_runner import ModelledRunner
from penstock.engine.runner import SamplingParams
from penstock.io.memory import aligned_buffer
from penstock.pool.api import PoolError
from penstock.report import Report

TIME_FACTOR = 8.0
MODEL, CONTEXT = "gpt_oss", "16k"
REQUESTS = {"a": 12, "b": 4}  # two tenants; one has three times the requests
READS_OPEN = 48  # of each request
SAMPLE_S, WINDOW_S = 0.001, 0.5
READ_TIMEOUT_S, END_TIMEOUT_S = 30.0, 60.0
IDLE_GOAL, FAIR_LOW, FAIR_HIGH = 0.0, 0.9, 1.1


def measure_many(report: Report, folder: Path, run_s: float, step: Callable[[str], None]) -> None:
    """Figures `many_*`: at the pool with tenants of unequal demand, and through one engine."""
    model = MODELS[MODEL]
    profile = model.scaled(TIME_FACTOR)
    root = document_root(profile)
    count = sum(REQUESTS.values())
    documents = [document(root, CONTEXTS[CONTEXT], profile.vocab_size, seed) for seed in range(count)]
    tenants = [name for name, requests in REQUESTS.items() for _ in range(requests)]
    blocks = sum(len(one.keys) for one in documents)
    with contextlib.ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder)))
        rig = stack.enter_context(open_rig(pooled(), place, model.block_bytes, blocks, TIME_FACTOR))
        step("16 requests: filling")
        for one, tenant in zip(documents, tenants, strict=True):
            fill(rig, [one], model.block_bytes, tenant)
        step("16 requests of two tenants")
        _at_the_pool(report, rig, documents, tenants, model.block_bytes, run_s)
        step("16 requests through one engine")
        _through_an_engine(report, rig, documents, ModelledRunner(profile, BLOCK_TOKENS))
    asked = " and ".join(f"{requests} of tenant {name}" for name, requests in REQUESTS.items())
    report.notes.append(
        f"many: {count} requests at once ({asked}), {READS_OPEN} reads of each open at any time; fairness is "
        f"the ratio of the tenants' bytes in windows of {WINDOW_S:g} s, goal {FAIR_LOW} to {FAIR_HIGH}"
    )
    report.modelled.append("many: devices are paced as for reads; through the engine compute is modelled as for ttft")


# -- at the pool ------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _ReadState:
    """State shared by readers and samplers."""

    stop: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    bytes_by_tenant: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REQUESTS, 0))
    waiting: dict[str, int] = field(default_factory=dict)  # member -> reads submitted and not ended
    ended: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    errors: list[PoolError] = field(default_factory=list)


def _at_the_pool(
    report: Report, rig: Rig, documents: Sequence[Document], tenants: Sequence[str], block_bytes: int, run_s: float
) -> None:
    state = _ReadState()
    padded = staging_bytes(block_bytes)
    memory = aligned_buffer(padded * READS_OPEN * len(documents))
    rig.pool.register(memory)
    opened = 0
    for number, (one, tenant) in enumerate(zip(documents, tenants, strict=True)):
        located = rig.pool.lookup(one.keys, 10.0)
        members = [found.route[0] for found in located if found is not None]
        at = number * READS_OPEN * padded
        views = [memory[at + n * padded : at + (n + 1) * padded] for n in range(READS_OPEN)]
        _ask(rig, state, one.keys, members, views, tenant, block_bytes)
        opened += len(views)
    idle, ratios = _sample(rig, state, run_s)
    state.stop.set()
    for _ in range(opened):
        if not state.ended.acquire(timeout=END_TIMEOUT_S):
            raise TimeoutError(f"a read did not end within {END_TIMEOUT_S:g} s")
    if state.errors:
        raise state.errors[0]
    report.figure("many_idle_while_queued_share", max(idle.values()), IDLE_GOAL)
    report.figure("many_tenant_bytes_ratio", statistics.median(ratios), 1.0)
    report.figure("many_tenant_bytes_ratio_low", min(ratios), FAIR_LOW)
    report.figure("many_tenant_bytes_ratio_high", max(ratios), FAIR_HIGH)


def _ask(
    rig: Rig,
    state: _ReadState,
    keys: Sequence[BlockKey],
    members: Sequence[str],
    views: Sequence[memoryview],
    tenant: str,
    block_bytes: int,
) -> None:
    """Read a document repeatedly, in order, with one open read for each view."""

    def read(at: int, view: memoryview) -> None:
        member = members[at % len(keys)]

        def done(error: PoolError | None) -> None:
            with state.lock:
                state.waiting[member] -= 1
                state.bytes_by_tenant[tenant] += block_bytes
                if error is not None:
                    state.errors.append(error)
            if error is not None or state.stop.is_set():
                state.ended.release()
            else:
                read(at + len(views), view)

        with state.lock:
            state.waiting[member] = state.waiting.get(member, 0) + 1
        rig.pool.read(keys[at % len(keys)], block_bytes, view, READ_TIMEOUT_S, done)

    for number, view in enumerate(views):
        read(number, view)


def _sample(rig: Rig, state: _ReadState, run_s: float) -> tuple[dict[str, float], list[float]]:
    """Share of the time that each member's device was idle while reads of it waited; and the first tenant's bytes over
    the second's, by window. The first window fills the queues and does not count."""
    clocks = {member.name: clock for member, clock in zip(rig.pool.members, rig.clocks, strict=True)}
    idle = dict.fromkeys(clocks, 0)
    ratios: list[float] = []
    samples = 0
    time.sleep(WINDOW_S)
    window_s = time.monotonic()
    end_s, before = window_s + run_s, _bytes(state)
    while (now_s := time.monotonic()) < end_s and not state.errors:
        samples += 1
        for name, clock in clocks.items():
            idle[name] += state.waiting.get(name, 0) > 0 and not clock.busy(now_s)
        if now_s - window_s >= WINDOW_S:
            after = _bytes(state)
            first, second = (after[name] - before[name] for name in REQUESTS)
            ratios.append(first / max(second, 1))
            window_s, before = now_s, after
        time.sleep(SAMPLE_S)
    return {name: count / max(samples, 1) for name, count in idle.items()}, ratios or [float("nan")]


def _bytes(state: _ReadState) -> dict[str, int]:
    with state.lock:
        return dict(state.bytes_by_tenant)


# -- through an engine ------------------------------------------------------------------------------------------------


def _through_an_engine(report: Report, rig: Rig, documents: Sequence[Document], runner: ModelledRunner) -> None:
    """All documents requested at once, from an engine with an empty L1 that has room for all."""
    pages = sum(len(one.keys) + 2 for one in documents)
    runner.allocate(pages)
    cost = CostModel(LinkCost(runner.profile.upload_bytes_per_s), runner.profile.compute_cost())
    cost.default_link_bytes_per_s = rig.speeds[0]
    engine = Engine(engine_config(runner, "penstock", pages, pages), cost, runner, rig.pool)
    try:
        busy_s = [clock.busy_s for clock in rig.clocks]
        began_s = time.monotonic()
        waiting = []
        for one in documents:
            prompt, sampling = one.tokens + [1] * QUESTION_TOKENS, SamplingParams(max_tokens=1, temperature=0.0)
            waiting.append(last_event(engine, GenerationRequest(new_request_id(), prompt, sampling)))
        reports = [wait() for wait in waiting]
        loaded_s = max(clock.free_s for clock in rig.clocks) - began_s
        shares = [(clock.busy_s - before) / loaded_s for clock, before in zip(rig.clocks, busy_s, strict=True)]
    finally:
        engine.close(10.0)
        runner.close()
    failed = [one.load_failures for one in reports if one.load_failures]
    if failed:
        raise RuntimeError(f"loads failed: {failed[0]}")
    report.figure("many_engine_device_busy_share_min", min(shares), 1.0)
    report.figure("many_engine_ttft_mean_s", statistics.mean(one.ttft_s or 0.0 for one in reports) / TIME_FACTOR)
