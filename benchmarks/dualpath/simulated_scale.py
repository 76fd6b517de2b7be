"""DualPath's scale: from 2P4D to 48P96D with 24 times the agents, job time stays equal; and the cost of simulating
it."""

from __future__ import annotations

import random
import resource
import time
from dataclasses import replace

from benchmarks.dualpath.simulated_offline import SET_UPS
from penstock.core.cluster.decisions import InterEngineConfig, Place
from penstock.core.cluster.engine_groups import EngineSpec, Role
from penstock.core.cluster.inter_engine import InterEngineScheduler
from penstock.core.cluster.nic_speed import StorageSpeeds
from penstock.report import Report
from penstock.sim.cluster_shape import PAPER
from penstock.sim.serving_run import Bench

PAPER_JOB_S = {1: 3167.0, 24: 3201.0}
AGENTS = 2000
HEARTBEATS = 2000


def scale(report: Report, factor: int, divisor: int = 1) -> None:
    """`factor` times 2P4D with `factor` times 2,000 agents (both divided by `divisor` in agents)."""
    set_up = SET_UPS["660b"]
    times = {}
    for times_over in (1, factor):
        shape = replace(set_up.shape, prefill_nodes=2 * times_over, decode_nodes=4 * times_over)
        base = set_up.bench("64K")
        agents = AGENTS * times_over // divisor
        run = Bench(shape, base.model, base.trajectories).offline(PAPER, agents)
        times[times_over] = run.job_s
        label = f"scale_{shape.name}_{agents}"
        report.figure(f"{label}_job_s", run.job_s, PAPER_JOB_S.get(times_over) if divisor == 1 else None)
        report.figure(f"{label}_requests", run.record.requests)
        report.figure(f"{label}_simulator_cpu_s", run.busy_s, 1800.0)
        report.figure(f"{label}_simulator_us_per_request", run.cost_us)
        report.figure(f"{label}_simulator_us_per_event", run.busy_s / run.record.events * 1e6)
    report.figure(f"scale_{factor}_over_1_job", times[factor] / times[1], 1.03)
    report.figure("scale_memory_gib", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 8.0)


def decision_cost(report: Report) -> None:
    """Processor time of one placement by the core with 1,000 and 10,000 requests waiting, on 48P96D: 1,152 engines."""
    for waiting, limit_us in ((1_000, 50.0), (10_000, 100.0)):
        scheduler = _scheduler(waiting)
        full = [d for d in scheduler.decide(0.0) if isinstance(d, Place)]
        for number in range(waiting):
            scheduler.submit(("more", number), 33_000, 32_704, 150, 0.0)
        scheduler.decide(0.0)
        before, placed = time.thread_time(), 0
        for place in full[:2_000]:
            scheduler.prefilled(place.request_id, place.attempt)
            scheduler.ended(place.request_id, place.attempt)
            placed += len(scheduler.decide(1.0))
        took_s = time.thread_time() - before
        report.figure(f"decision_{waiting}_waiting_us", took_s / max(1, placed) * 1e6, limit_us)


def heartbeat_cost(report: Report) -> None:
    """Processor time of processing an engine's heartbeat in the core, and of the next decision, with 100 and 1,152
    engines of which none has room for the waiting request."""
    dice = random.Random(1)
    for engines in (100, 1152):
        scheduler, speeds = InterEngineScheduler(InterEngineConfig()), StorageSpeeds()
        for number in range(engines):
            node, role = f"n{number // 8}", "prefill" if number % 3 == 0 else "decode"
            scheduler.node_registered(node, speeds.see(node, 1e9, 64, 1 << 21))
            scheduler.engine_registered(EngineSpec(str(number), role, role, node, 3.7e5, 2_000_000))  # type: ignore[arg-type]
        for number in range(22 * engines):
            scheduler.submit(number, 33_000, 32_704, 150, 0.0)
        scheduler.decide(0.0)
        assert scheduler.waiting, "an engine has room"
        before = time.thread_time()
        for _ in range(HEARTBEATS):
            number = dice.randrange(engines)
            node = f"n{number // 8}"
            scheduler.node_registered(node, speeds.see(node, dice.uniform(1e9, 2e9), 64, 1 << 21))
            scheduler.engine_speed(str(number), dice.uniform(3.6e5, 3.7e5), None)
            scheduler.report(node, scheduler.unread_tokens(node))
            scheduler.decide(0.0)
        report.figure(f"heartbeat_{engines}_engines_us", (time.thread_time() - before) / HEARTBEATS * 1e6)


def _scheduler(waiting: int) -> InterEngineScheduler:
    """All engines filled up to beta, and `waiting` further requests."""
    scheduler = InterEngineScheduler(InterEngineConfig(max_waiting=1 << 20))
    for node in range(144):
        scheduler.node_registered(f"n{node}", 1e6)
        for gpu in range(8):
            prefill = node < 48
            group = f"p{node // 2}" if prefill else f"d{node // 4}"
            role: Role = "prefill" if prefill else "decode"
            scheduler.engine_registered(EngineSpec(f"n{node}.{gpu}", role, group, f"n{node}", 3.7e5, 2_000_000))
    for number in range(22_000 + waiting):
        scheduler.submit(number, 33_000, 32_704, 150, 0.0)
    return scheduler
