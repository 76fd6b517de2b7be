"""Experiments on the simulated cluster: offline jobs, online arrivals, capacity under an SLO."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from penstock.sim.cluster_shape import ClusterShape, System
from penstock.sim.prefill_decode import Fault, PrefillDecodeCluster, Settings
from penstock.sim.served_model import ServedModel
from penstock.sim.serving_record import Balance, Record, balance
from penstock.sim.trajectories import Trajectory
from penstock.workloads.generators import poisson_starts_s


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a run, and the cost of simulating it."""

    record: Record
    balance: Balance
    busy_s: float  # CPU time of this process

    @property
    def job_s(self) -> float:
        """Seconds until the last request ended."""
        return self.record.end_s

    @property
    def tokens_per_s(self) -> float:
        """Prompt and generated tokens."""
        return (self.record.prompt_tokens + self.record.answer_tokens) / self.record.end_s

    @property
    def ttft_mean_s(self) -> float:
        """Mean seconds to the first token."""
        return float(np.mean(self.record.ttft_s))

    @property
    def cost_us(self) -> float:
        """Seconds of CPU time to simulate one request."""
        return self.busy_s / max(1, self.record.requests) * 1e6


@dataclass(frozen=True, slots=True)
class Bench:
    """A model on a cluster under a workload, on which systems are compared."""

    shape: ClusterShape
    model: ServedModel
    trajectories: Sequence[Trajectory]
    settings: Settings = field(default_factory=Settings)

    def offline(self, system: System, agents: int, faults: Sequence[Fault] = ()) -> Outcome:
        """All agents start at once; the job ends with the last of them."""
        return self._run(system, [0.0] * agents, float("inf"), faults)

    def online(self, system: System, agents_per_s: float, arrivals_s: float, seed: int) -> Outcome:
        """Agents arrive as a Poisson process for `arrivals_s`; the run ends a minute after the arrivals."""
        rng = np.random.default_rng(seed)
        starts = [
            s for s in poisson_starts_s(rng, agents_per_s, int(2 * agents_per_s * arrivals_s) + 50) if s < arrivals_s
        ]
        return self._run(system, starts, arrivals_s + 60.0, ())

    def _run(self, system: System, starts_s: list[float], until_s: float, faults: Sequence[Fault]) -> Outcome:
        before = time.process_time()
        cluster = PrefillDecodeCluster(self.shape, self.model, system, self.trajectories, self.settings)
        record = cluster.run(starts_s, until_s, faults)
        busy_s = time.process_time() - before
        return Outcome(record, balance(cluster.links, cluster.prefill_groups, record.end_s), busy_s)


@dataclass(frozen=True, slots=True)
class Slo:
    """Means over the requests of the second half of the arrivals."""

    ttft_s: float = 4.0
    tpot_s: float = 0.05

    def kept(self, record: Record, arrivals_s: float) -> tuple[bool, float, float]:
        """Whether mean TTFT and mean TPOT are within the SLO."""
        since = arrivals_s / 2
        arrivals = np.asarray(record.arrival_s)
        chosen = (arrivals >= since) & (arrivals < arrivals_s)
        ttft = float(np.asarray(record.ttft_s)[chosen].mean()) if chosen.any() else float("inf")
        ends = np.asarray(record.end_at_s)
        late = ends >= since
        tpot = float(np.asarray(record.tpot_s)[late].mean()) if late.any() else float("inf")
        return ttft <= self.ttft_s and tpot <= self.tpot_s, ttft, tpot


@dataclass(frozen=True, slots=True)
class Capacity:
    """The highest rate that meets the SLO, with its latencies (0 agents/s: none did), and the latencies at the lowest
    rate that misses it, which show the binding limit (0 s: every rate met it)."""

    agents_per_s: float = 0.0
    ttft_s: float = float("inf")
    tpot_s: float = float("inf")
    beyond_ttft_s: float = 0.0
    beyond_tpot_s: float = 0.0


def capacity(
    bench: Bench, system: System, slo: Slo, *, low: float, high: float, arrivals_s: float, seed: int, steps: int = 6
) -> Capacity:
    """Bisection (in logarithms) between two rates in `steps` runs, all with the same seed."""
    best = Capacity()
    for _ in range(steps):
        rate = float(np.sqrt(low * high))
        outcome = bench.online(system, rate, arrivals_s, seed)
        kept, ttft_s, tpot_s = slo.kept(outcome.record, arrivals_s)
        if kept:
            low, best = rate, replace(best, agents_per_s=rate, ttft_s=ttft_s, tpot_s=tpot_s)
        else:
            high, best = rate, replace(best, beyond_ttft_s=ttft_s, beyond_tpot_s=tpot_s)
    return best
