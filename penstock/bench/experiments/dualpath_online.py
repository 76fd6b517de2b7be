"""`bench dualpath` online: the highest rate of agents' turns within limits of TTFT and TPOT; TPOT beside bulk loads."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from penstock.bench.experiments.dualpath_agents import BLOCK_TOKENS, Agent, AgentTurn
from penstock.bench.experiments.dualpath_offline import NAMES, Size, workload
from penstock.bench.experiments.dualpath_runs import Run, run_agents
from penstock.bench.experiments.dualpath_testbed import Scale, Testbed, Topology
from penstock.bench.progress import Counter, Progress
from penstock.bench.report import Report
from penstock.bench.workloads import poisson_starts_s
from penstock.sim.cluster_shape import LAYERWISE, SPLIT, System

PAPER_TTFT_S, PAPER_TPOT_S = 4.0, 0.05
CAPACITY_GOAL, TPOT_GOAL = 1.96, 1.05
STEPS = 4
SHARES = (0.6, 1.2)  # of the rate at which a system's storage NICs are full: where its capacity is looked for
AGENTS = 64  # each with one turn: so few at work at once would find the turn before in memory, not in storage
FOREGROUND, ANSWER_TOKENS, QUESTION_TOKENS = 4, 80, 600
BULK = Size(agents=18, turns=4)


def limits(scale: Scale) -> tuple[float, float]:
    """TTFT and TPOT. Both times are scaled by `time_factor`; a TTFT also by the length of what is loaded."""
    return PAPER_TTFT_S * scale.time_factor / scale.token_divisor, PAPER_TPOT_S * scale.time_factor


def kept(run: Run, scale: Scale, half_s: float) -> tuple[bool, float, float]:
    """Whether the means over the requests that came after `half_s` keep both limits; the means."""
    late = [answered for answered in run.answered if answered.arrival_s - run.begin_s >= half_s]
    if not late or run.failed:
        return False, float("inf"), float("inf")
    ttft_s = statistics.fmean(answered.ttft_s for answered in late)
    tpot_s = statistics.fmean(answered.tpot_s for answered in late)
    ttft_max_s, tpot_max_s = limits(scale)
    return ttft_s <= ttft_max_s and tpot_s <= tpot_max_s, ttft_s, tpot_s


def measure_capacity(
    report: Report, scale: Scale, topology: Topology, steps: int, progress: Progress, unique: Callable[[], str]
) -> float:
    """Bisection for each system, step by step in turn, over the same arrivals stretched to the rate; the gain."""
    agents = workload("64K", scale, Size(AGENTS, 1), None, seed=2)
    bytes_per_agent = sum(t.hit_tokens for a in agents for t in a.turns) / len(agents) * scale.bytes_per_token
    unit = poisson_starts_s(np.random.default_rng(3), 1.0, len(agents))
    stretch = len(agents) / unit[-1]
    nics = {LAYERWISE.name: topology.prefill, SPLIT.name: topology.prefill + topology.decode}
    best: dict[str, tuple[float, float, float]] = {name: (0.0, 0.0, 0.0) for name in nics}
    with Testbed(topology, scale) as bed:
        per_nic = bed.raw_bytes_per_s() / (topology.prefill + topology.decode)
        bounds = {name: [share * per_nic * n / bytes_per_agent for share in SHARES] for name, n in nics.items()}
        with bed.engines("penstock"):
            for _ in range(steps):
                for system in (LAYERWISE, SPLIT):
                    low, high = bounds[system.name]
                    rate = (low + high) / 2
                    starts = [start * stretch / rate for start in unit]
                    counter = Counter(progress, _title(topology, system, rate), len(agents))
                    run = run_agents(bed, system, agents, unique(), counter, starts)
                    fine, ttft_s, tpot_s = kept(run, scale, starts[-1] / 2)
                    bounds[system.name] = [rate, high] if fine else [low, rate]
                    if fine:
                        best[system.name] = (rate, ttft_s, tpot_s)
    ttft_max_s, tpot_max_s = limits(scale)
    for name, (rate, ttft_s, tpot_s) in best.items():
        label = f"online_{topology.name}_{NAMES[name]}"
        report.figure(f"{label}_turns_per_s", rate or bounds[name][0])
        if rate:
            report.figure(f"{label}_ttft_mean_s", ttft_s, ttft_max_s)
            report.figure(f"{label}_tpot_mean_s", tpot_s, tpot_max_s)
        else:
            report.notes.append(f"{label}: no rate that was tried kept the limits; what stands here is the lower end")
    gain = (best[SPLIT.name][0] or bounds[SPLIT.name][0]) / (best[LAYERWISE.name][0] or bounds[LAYERWISE.name][0])
    report.figure(f"online_{topology.name}_gain", gain)
    return gain


def _title(topology: Topology, system: System, rate: float) -> str:
    return f"online {topology.name}: {NAMES[system.name]}, {rate:.2f} turns/s"


def measure_tpot(report: Report, scale: Scale, repeats: int, progress: Progress, unique: Callable[[], str]) -> None:
    """Time per token of requests that decode alone, and while others' KV is read through the same engine at full
    speed; with and without the way to the decode engine. The others' prompts end with a whole block and one token, so
    that the decode engine does not compute for them."""
    rng = random.Random(5)
    foreground = [_question(rng, number, scale) for number in range(FOREGROUND)]
    bulk = [_whole_blocks(agent) for agent in workload("64K", scale, BULK, None, seed=4)]
    tpots: dict[bool, list[float]] = {False: [], True: []}
    steps: dict[bool, list[float]] = {False: [], True: []}
    read: list[float] = []
    with Testbed(Topology(1, 1), scale) as bed:
        raw = bed.raw_bytes_per_s()
        with bed.engines("penstock"):
            for repeat in range(2 * repeats):
                loaded = repeat % 4 in (1, 2)  # without, with, with, without
                agents = [*bulk, *foreground] if loaded else foreground
                starts = [0.0] * len(bulk) + [0.3] * len(foreground) if loaded else [0.0] * len(foreground)
                title = f"TPOT {'beside bulk loads' if loaded else 'alone'}"
                counter = Counter(progress, title, sum(len(agent.turns) for agent in agents))
                run = run_agents(bed, SPLIT, agents, unique(), counter, starts)
                if run.failed:
                    raise RuntimeError(f"{title}: a request failed: {run.failed[0]}")
                first = len(agents) - len(foreground)
                mine = [answered for answered in run.answered if answered.agent >= first]
                tpots[loaded] += [answered.tpot_s for answered in mine]
                steps[loaded] += [answered.step_s for answered in mine]
                if loaded:
                    start_s, end_s = min(a.second_s for a in mine), max(a.last_s for a in mine)
                    read.append(sum(run.loads.between(start_s, end_s)) / (end_s - start_s) / raw)
    for name, values in (("tpot", tpots), ("step", steps)):
        alone, beside = statistics.fmean(values[False]), statistics.fmean(values[True])
        report.figure(f"lanes_{name}_alone_s", alone)
        report.figure(f"lanes_{name}_beside_bulk_s", beside)
        report.figure(f"lanes_{name}_ratio", beside / alone, TPOT_GOAL)
    report.figure("lanes_bulk_share_of_all_nics", statistics.fmean(read))


def _question(rng: random.Random, number: int, scale: Scale) -> Agent:
    prompt = [rng.randrange(16, scale.profile().vocab_size) for _ in range(QUESTION_TOKENS)]
    return Agent(f"foreground-{number}", [AgentTurn(prompt, 0, ANSWER_TOKENS)])


def _whole_blocks(agent: Agent) -> Agent:
    turns = []
    for turn in agent.turns:
        tokens = (len(turn.prompt) - 1) // BLOCK_TOKENS * BLOCK_TOKENS + 1
        turns.append(replace(turn, prompt=turn.prompt[:tokens], answer_tokens=2))
    return Agent(agent.name, turns)


def measure_online(
    report: Report, scale: Scale, topologies: Sequence[Topology], steps: int, progress: Progress,
    unique: Callable[[], str],
) -> None:  # fmt: skip
    """Capacities, and the mean gain."""
    gains = [measure_capacity(report, scale, topology, steps, progress, unique) for topology in topologies]
    report.figure("online_gain_mean", statistics.fmean(gains), CAPACITY_GOAL)
