"""Runs `benchmarks vllm`: fills stores, calibrates, then runs every system on every workload in turn."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.peers.loads import (
    DATASETS,
    Trace,
    agents,
    alone,
    arriving,
    contexts_of,
    conversation,
    dataset,
    never_seen,
    unique_tokens,
    warm_tokens,
)
from benchmarks.peers.systems import LMCACHE, STOCK, Bed, Run, Server
from penstock.bench.system_under_test import SystemFailed
from penstock.workloads.deadlines import RequestName, TtftModel, deadlines_s
from penstock.workloads.generators import Segment, Session, Turn, Workload
from penstock.workloads.replay import RequestRecord

ALONE_REQUESTS = 10
NEVER_SEEN_REQUESTS = 5
CAPACITY_AT_ONCE = 8
WARM_UP_TOKENS = (300, 1200, 300, 1200)
FILL_TRIES = 4
FILLED_LEAST = 0.99  # a store's missing rest is computed by its own vLLM, and counts against it

Step = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run. `rate` is a share of the baseline's capacity; traces without a path are skipped."""

    systems: tuple[str, ...]
    datasets: tuple[str, ...]
    requests: int
    trace_requests: int
    repeats: int
    rate: float
    seed: int
    agent_traces: Path | None = None
    conversations: Path | None = None

    @property
    def baseline(self) -> str:
        """The system whose TTFT alone gives the deadlines, and whose capacity `rate` refers to."""
        stores = [system for system in self.systems if system != STOCK]
        return LMCACHE if LMCACHE in stores else stores[0] if stores else STOCK

    @property
    def replays(self) -> int:
        """Approximate number of requests of all runs."""
        stores = len([system for system in self.systems if system != STOCK])
        one = self.requests * (self.repeats * stores + (STOCK in self.systems) + 1 + stores) + ALONE_REQUESTS
        traces = bool(self.agent_traces) + bool(self.conversations)
        return len(self.datasets) * one + traces * self.repeats * len(self.systems) * self.trace_requests


@dataclass(slots=True)
class Found:
    """Runs by workload and system, in the order of repeats; capacities and shares of reuse by workload; how often a
    store was filled until it was complete, and its final share."""

    runs: dict[str, dict[str, list[Run]]] = field(default_factory=dict)
    capacity_per_s: dict[str, float] = field(default_factory=dict)
    alone_s: dict[str, float] = field(default_factory=dict)
    reuse: dict[str, float] = field(default_factory=dict)
    fills: dict[str, int] = field(default_factory=dict)
    filled: dict[str, float] = field(default_factory=dict)
    model: TtftModel | None = None

    def add(self, workload: str, run: Run) -> None:
        """Add a run, in the order of repeats."""
        self.runs.setdefault(workload, {}).setdefault(run.system, []).append(run)


class Measurement:
    """Running servers, and the measurements on them. Systems take turns in random order within each repeat."""

    def __init__(
        self, bed: Bed, plan: Plan, servers: dict[str, Server], progress: Callable[[object], None], step: Step
    ):
        self._bed = bed
        self._plan = plan
        self._servers = servers
        self._advance = progress
        self._step = step
        self._shuffle = random.Random(plan.seed)
        self.found = Found()

    def run(self) -> Found:
        """Raises SystemFailed."""
        plan = self._plan
        self._warm_up()
        workloads = [dataset(name, plan.requests, plan.seed) for name in plan.datasets]
        for workload in workloads:
            self._fill(contexts_of(workload))
        if not workloads:  # traces only: the baseline alone is still measured
            self._fill(contexts_of(_some_requests(plan.seed)))
        self.found.model = model = self._alone(workloads or [_some_requests(plan.seed)])
        for workload in workloads:
            self._capacity(workload)
        for workload in workloads:
            self._dataset(workload, deadlines_s(workload, warm_tokens(workload), model))
        for trace in self._traces():
            self._trace(trace)
        return self.found

    def _warm_up(self) -> None:
        """Send the same few requests to every system, twice each: loads code and gives a first cost fit."""
        turns = tuple(Turn((Segment(f"warm-up/{i}", size),), 4) for i, size in enumerate(WARM_UP_TOKENS))
        for system, server in self._servers.items():
            self._step(f"{system}: warm-up")
            for _ in range(2):
                run = server.replay(Workload("warm-up", (Session("warm-up", turns),)), {}, _ignore)
                _check(run, "warm-up")
                server.reset()

    def _fill(self, fill: Workload) -> None:
        """Send these prompts to every store's own vLLM, two of them at a time. What a store did not save (saves may be
        dropped) is sent again."""
        stores = [server for system, server in self._servers.items() if system != STOCK]
        if not stores:
            return
        name = fill.name.removesuffix("-fill")
        self._step(f"{name}: filling the stores")
        wanted_bytes = unique_tokens(fill, self._bed.vocabulary) * self._bed.kv_bytes_per_token

        def one(server: Server) -> None:
            before = server.transferred()
            for attempt in range(FILL_TRIES):
                _check(server.replay(fill, {}, self._advance if attempt == 0 else _ignore), "fill")
                server.reset()
                sent_bytes = server.transferred().since(before).up_bytes
                key, share = f"{name}_{server.system}", min(1.0, sent_bytes / wanted_bytes)
                if share >= 1.0 or (attempt == FILL_TRIES - 1 and share >= FILLED_LEAST):
                    self.found.fills[key] = max(self.found.fills.get(key, 0), attempt + 1)
                    self.found.filled[key] = min(self.found.filled.get(key, 1.0), share)
                    return
            raise SystemFailed(f"{server.system}: {sent_bytes} of {wanted_bytes} bytes of KV reached its store")

        with ThreadPoolExecutor(2) as pool:
            for done in [pool.submit(one, server) for server in stores]:
                done.result()

    def _alone(self, workloads: Sequence[Workload]) -> TtftModel:
        """The baseline without interference: some requests alone, and prompts that no store holds. The fit over them
        gives every request's deadline."""
        server = self._servers[self._plan.baseline]
        self._step(f"{server.system}: requests alone")
        records: list[RequestRecord] = []
        for workload in workloads:
            run = server.replay(alone(workload, ALONE_REQUESTS), {}, self._advance)
            _check(run, "alone")
            server.reset()
            records += run.records
            self.found.alone_s[workload.name] = sum(run.ttfts_s) / len(run.ttfts_s)
        run = server.replay(never_seen(NEVER_SEEN_REQUESTS), {}, _ignore)
        _check(run, "alone")
        server.reset()
        return TtftModel.fit([*records, *run.records])

    def _capacity(self, workload: Workload) -> None:
        """The baseline's throughput in a closed loop of all requests."""
        server = self._servers[self._plan.baseline]
        self._step(f"{server.system}: capacity for {workload.name}")
        run = server.replay(workload, {}, self._advance, at_once=CAPACITY_AT_ONCE)
        _check(run, "capacity")
        server.reset()
        self.found.capacity_per_s[workload.name] = workload.requests / run.wall_s

    def _dataset(self, workload: Workload, deadlines: dict[RequestName, float]) -> None:
        """CALVO's requests: Poisson arrivals at the plan's share of the baseline's capacity. A system without a store
        computes everything, which takes several times as long, so it runs once."""
        rate_per_s = self._plan.rate * self.found.capacity_per_s[workload.name]
        for repeat in range(self._plan.repeats):
            requests = arriving(workload, rate_per_s, repeat)
            for system in self._order():
                if system == STOCK and repeat:
                    continue
                self._one(system, workload.name, requests, deadlines, repeat)

    def _traces(self) -> Iterator[Trace]:
        plan = self._plan
        assert self.found.model is not None
        if plan.agent_traces is not None:
            yield agents(plan.agent_traces, plan.trace_requests, self._bed.vocabulary, plan.seed)
        if plan.conversations is not None:
            path, model = plan.conversations, self.found.model
            yield conversation(path, plan.trace_requests, self._bed.vocabulary, plan.seed, model)

    def _trace(self, trace: Trace) -> None:
        assert self.found.model is not None
        name = trace.workload.name
        self.found.reuse[name] = trace.reuse
        deadlines = deadlines_s(trace.workload, trace.reusable, self.found.model)
        for repeat in range(self._plan.repeats):
            this = trace.again(f"run-{repeat}")
            if this.before is not None:
                self._fill(this.before)
            for system in self._order():
                self._one(system, name, this.workload, deadlines, repeat)

    def _order(self) -> list[str]:
        return self._shuffle.sample(list(self._servers), len(self._servers))

    def _one(
        self, system: str, name: str, requests: Workload, deadlines: dict[RequestName, float], repeat: int
    ) -> None:
        self._step(f"{name}, repeat {repeat + 1}: {system}")
        server = self._servers[system]
        self.found.add(name, server.replay(requests, deadlines, self._advance))
        server.reset()


def _some_requests(seed: int) -> Workload:
    """The requests that run alone if no dataset is chosen."""
    return replace(dataset(DATASETS[0], ALONE_REQUESTS, seed), name="alone")


def _ignore(_: object) -> None:
    """Shows nothing."""


def _check(run: Run, what: str) -> None:
    errors = [record.error for record in run.records if record.error is not None]
    if errors:
        raise SystemFailed(f"{run.system}: {len(errors)} of {len(run.records)} {what} requests failed: {errors[0]}")


@contextmanager
def servers_up(bed: Bed, systems: Sequence[str], step: Step) -> Iterator[dict[str, Server]]:
    """Start all systems at once; only one has work at a time. Raises SystemFailed."""
    with ExitStack() as stack:
        servers: dict[str, Server] = {}
        for system in systems:
            step(f"starting {system}")
            servers[system] = stack.enter_context(Server(bed, system))
        yield servers
