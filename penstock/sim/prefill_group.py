"""The prefill engines of one group: what each has ready, and the duration of their next step, in closed form.

A step is one batch on every engine (rank) of the group. Layer by layer, loads overlap compute: a step takes the longer
of the two, plus the first layer's load. Without layers, loads come first. Ranks exchange tokens in every layer:
attention takes as long as on the slowest rank, everything else is spread evenly over all. (A group of one rank computes
it all.)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from penstock.core.engine.compute_quota import ComputeQuota, level_s

if TYPE_CHECKING:
    from penstock.sim.sim_agent import SimAgent


@dataclass(frozen=True, slots=True)
class StepCost:
    """Parameters of a step: overhead, linear work per query token, compute NIC seconds per token, layers.

    With layers, only one layer's KV is in device memory; otherwise `memory_tokens` limits a rank's batch. `level`:
    ranks take only as much as completes the most work per step (`core.compute_quota.level_s`).
    """

    overhead_s: float
    linear_s: float
    nic_s: float
    layers: int
    layerwise: bool
    memory_tokens: int
    level: bool = False


class PrefillEngine:
    """One rank: its FIFO of requests whose KV is in a buffer, and when each direction of its compute NIC is free."""

    __slots__ = ("group", "in_free", "name", "node", "out_free", "ready")

    def __init__(self, name: str, node: int, group: PrefillGroup) -> None:
        self.name = name
        self.node = node
        self.group = group
        self.in_free = self.out_free = 0.0
        self.ready: deque[SimAgent] = deque()


class PrefillGroup:
    """Ranks that step together; `busy` between the start and the end of a step.

    `stepping` holds the requests whose part ends with the step, each with its placement.
    """

    __slots__ = (
        "attention_max_s",
        "attention_mean_s",
        "busy",
        "busy_s",
        "engines",
        "name",
        "stepping",
        "waiting",
    )

    def __init__(self, name: str) -> None:
        self.name = name
        self.engines: list[PrefillEngine] = []
        self.busy = False
        self.waiting = 0  # requests in the FIFOs of all ranks
        self.stepping: list[tuple[SimAgent, int]] = []
        self.busy_s = 0.0
        self.attention_max_s = 0.0  # sums over steps
        self.attention_mean_s = 0.0

    def start(self, now: float, quota: ComputeQuota, cost: StepCost) -> float:
        """Take what fits on every rank; returns the step's duration. The ending requests are in `stepping`."""
        slowest = attention_sum = load_max = 0.0
        queries = ranks = 0
        self.stepping = ended = []
        quota_s = self._level_s(quota, cost.overhead_s) if cost.level and len(self.engines) > 1 else None
        for engine in self.engines:
            ready = engine.ready
            if not ready:
                continue
            ranks += 1
            fitting = ready if cost.layerwise else _fitting(ready, cost.memory_tokens)
            taken, attention_s = quota.pack(((agent.query, agent.context) for agent in fitting), quota_s)
            load_end = now
            for tokens in taken:
                agent = ready[0]
                queries += tokens
                if not agent.loaded:
                    load_end = max(load_end, self._load(agent, engine, now, cost))
                agent.query -= tokens
                agent.context += tokens
                if not agent.query:
                    ready.popleft()
                    ended.append((agent, agent.placement))
            attention_sum += attention_s
            slowest = max(slowest, attention_s)
            load_max = max(load_max, load_end - now)
        self.waiting -= len(ended)
        count = len(self.engines)
        compute_s = cost.overhead_s + slowest + queries * cost.linear_s / count
        took = max(compute_s, load_max) + load_max / cost.layers if cost.layerwise else compute_s + load_max
        self.busy = True
        self.busy_s += took
        if ranks == count:
            self.attention_max_s += slowest
            self.attention_mean_s += attention_sum / count
        return took

    def _level_s(self, quota: ComputeQuota, overhead_s: float) -> float:
        return level_s(
            [quota.ready_s((a.query, a.context) for a in engine.ready) for engine in self.engines if engine.ready],
            overhead_s,
        )

    @staticmethod
    def _load(agent: SimAgent, engine: PrefillEngine, now: float, cost: StepCost) -> float:
        """The request's KV is uploaded (its own copy, or relayed by its decode engine) and sent to the decode engine;
        returns when its last byte is uploaded."""
        agent.loaded = True
        local, remote = agent.local, agent.remote
        nic_s, decode = cost.nic_s, agent.decode
        assert decode is not None
        end = engine.in_free = max(now, engine.in_free) + (local + remote) * nic_s
        if remote:
            relay = decode.out_free = max(now, decode.out_free) + remote * nic_s
            end = max(end, relay)
        if cost.layerwise:
            out = engine.out_free = max(now, engine.out_free) + (2 * local + agent.front + agent.miss) * nic_s
            into = decode.in_free = max(now, decode.in_free) + (local + agent.front + agent.miss) * nic_s
            agent.handed_off_s = max(out, into)
        return end


def _fitting(ready: Iterable[SimAgent], memory_tokens: int) -> Iterator[SimAgent]:
    """Leading requests whose prompts fit in device memory together, at least one."""
    left = memory_tokens
    for agent in ready:
        if agent.prompt > left and left < memory_tokens:
            return
        left -= agent.prompt
        yield agent
