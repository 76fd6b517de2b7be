"""`benchmarks dualpath` online: the highest rate of turns within TTFT and TPOT limits; TPOT beside bulk loads."""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from benchmarks.dualpath.agents import BLOCK_TOKENS, Agent, AgentTurn
from benchmarks.dualpath.live_offline import NAMES, Size, workload
from benchmarks.dualpath.live_runs import Run, run_agents
from benchmarks.dualpath.testbed import Scale, Testbed, Topology
from penstock.report import Report
from penstock.sim.cluster_shape import LAYERWISE, SPLIT, System
from penstock.workloads.generators import poisson_starts_s
from penstock.workloads.progress import Counter, Progress

PAPER_TTFT_S, PAPER_TPOT_S = 4.0, 0.05
CAPACITY_GOAL, TPOT_GOAL = 1.96, 1.05
STEPS = 3
TPOT_REPEATS = 5
SHARES = (0.6, 1.0)  # of the rate that fills a system's storage NICs: the range in which its capacity is searched
AGENTS_PER_NIC = 70  # each with one turn: with fewer, the previous turn would still be in memory, not in storage
FOREGROUND, ANSWER_TOKENS, QUESTION_TOKENS = 4, 80, 600
BULK = Size(agents=18, turns=4)


def limits(scale: Scale) -> tuple[float, float]:
    """TTFT and TPOT. Both times are scaled by `time_factor`; a TTFT also by the length of what is loaded."""
    return PAPER_TTFT_S * scale.time_factor / scale.token_divisor, PAPER_TPOT_S * scale.time_factor


def kept(run: Run, scale: Scale, half_s: float) -> tuple[bool, float, float]:
    """Whether the means over the requests that arrived after `half_s` are within both limits; and the means."""
    late = [answered for answered in run.answered if answered.arrival_s - run.begin_s >= half_s]
    if not late or run.failed:
        return False, float("inf"), float("inf")
    ttft_s = statistics.fmean(answered.ttft_s for answered in late)
    tpot_s = statistics.fmean(answered.tpot_s for answered in late)
    ttft_max_s, tpot_max_s = limits(scale)
    return ttft_s <= ttft_max_s and tpot_s <= tpot_max_s, ttft_s, tpot_s


class _Search:
    """Bisection for one system between two rates. Its number of arrivals is proportional to its storage NICs, so that
    all systems' runs near their limits take equally long; every step has the same arrivals, scaled to the rate."""

    def __init__(self, system: System, nics: int, bytes_per_s: float, scale: Scale) -> None:
        self.system = system
        self.agents = workload("64K", scale, Size(AGENTS_PER_NIC * nics, 1), None, seed=2)
        hits = sum(agent.turns[0].hit_tokens for agent in self.agents)
        full = bytes_per_s * len(self.agents) / (hits * scale.bytes_per_token)
        self.low, self.high = (share * full for share in SHARES)
        unit = poisson_starts_s(np.random.default_rng(3), 1.0, len(self.agents))
        self._unit = [start * len(unit) / unit[-1] for start in unit]
        self.best: tuple[float, float, float] | None = None

    @property
    def rate(self) -> float:
        return (self.low + self.high) / 2

    @property
    def starts_s(self) -> list[float]:
        return [start / self.rate for start in self._unit]

    def tried(self, run: Run, scale: Scale) -> None:
        """Take the result of the run at `rate`."""
        fine, ttft_s, tpot_s = kept(run, scale, self.starts_s[-1] / 2)
        if fine:
            self.best = (self.rate, ttft_s, tpot_s)
            self.low = self.rate
        else:
            self.high = self.rate


def measure_capacity(
    report: Report, scale: Scale, topology: Topology, steps: int, progress: Progress, unique: Callable[[], str]
) -> float:
    """The highest rates of Basic and of split reads, searched in turn; and the gain."""
    hosts = topology.prefill + topology.decode
    with Testbed(topology, scale) as bed:
        per_nic = bed.raw_bytes_per_s() / hosts
        searches = [
            _Search(system, nics, per_nic * nics, scale)
            for system, nics in ((LAYERWISE, topology.prefill), (SPLIT, hosts))
        ]
        with bed.engines("penstock"):
            for _, search in itertools.product(range(steps), searches):
                counter = Counter(progress, _title(topology, search.system, search.rate), len(search.agents))
                search.tried(run_agents(bed, search.system, search.agents, unique(), counter, search.starts_s), scale)
    ttft_max_s, tpot_max_s = limits(scale)
    for search in searches:
        label = f"online_{topology.name}_{NAMES[search.system.name]}"
        if search.best is None:
            report.notes.append(f"{label}: no rate that was tried kept the limits; the lowest was {search.high:.3g}")
            continue
        report.figure(f"{label}_turns_per_s", search.best[0])
        report.figure(f"{label}_ttft_mean_s", search.best[1], ttft_max_s)
        report.figure(f"{label}_tpot_mean_s", search.best[2], tpot_max_s)
    basic, split = searches
    gain = split.best[0] / (basic.best[0] if basic.best else basic.high) if split.best else 0.0
    report.figure(f"online_{topology.name}_gain", gain)
    return gain


def _title(topology: Topology, system: System, rate: float) -> str:
    return f"online {topology.name}: {NAMES[system.name]}, {rate:.2f} turns/s"


def measure_tpot(report: Report, scale: Scale, repeats: int, progress: Progress, unique: Callable[[], str]) -> None:
    """Time per token of requests that decode alone, and while others' KV is read through the same engine at full speed;
    with and without the transfer to the decode engine. The others' prompts end with a whole block and one token, so
    that the decode engine does not compute for them. The mean of each run, and the median over runs."""
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
                loaded = repeat % 4 in (1, 2)  # alternately without, with, with, without
                agents = [*bulk, *foreground] if loaded else foreground
                starts = [0.0] * len(bulk) + [0.3] * len(foreground) if loaded else [0.0] * len(foreground)
                title = f"TPOT {'beside bulk loads' if loaded else 'alone'}"
                counter = Counter(progress, title, sum(len(agent.turns) for agent in agents))
                run = run_agents(bed, SPLIT, agents, unique(), counter, starts)
                if run.failed:
                    raise RuntimeError(f"{title}: a request failed: {run.failed[0]}")
                first = len(agents) - len(foreground)
                mine = [answered for answered in run.answered if answered.agent >= first]
                tpots[loaded].append(statistics.fmean(answered.tpot_s for answered in mine))
                steps[loaded].append(statistics.fmean(answered.step_s for answered in mine))
                if loaded:
                    start_s, end_s = min(a.second_s for a in mine), max(a.last_s for a in mine)
                    read.append(sum(run.loads.between(start_s, end_s)) / (end_s - start_s) / raw)
    for name, values in (("tpot", tpots), ("step", steps)):
        alone, beside = statistics.median(values[False]), statistics.median(values[True])
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
