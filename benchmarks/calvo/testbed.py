"""CALVO's set-up at a stated scale: a paced pool node in a separate process, modelled compute, real bytes."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

from benchmarks.pool_fill import fill_pool
from penstock.bench.processes import pool_process
from penstock.core.bandwidth import LinkCost
from penstock.core.config import Mode, Policy, SchedulerConfig
from penstock.core.cost import CostModel
from penstock.core.engine.scheduler import LoadScheduler
from penstock.core.keys import BlockKey, KeyChain, root_key
from penstock.core.new_block import NewBlock, prefix_position
from penstock.core.operations import BlockHit, RequestSpec
from penstock.engine.api import GenerationRequest, RequestReport, TokenEvent
from penstock.engine.engine import Engine
from penstock.engine.modelled_runner import ModelledRunner
from penstock.engine.profile import Profile, load_profile
from penstock.engine.runner import SamplingParams
from penstock.pool.net.connect import connect_pool
from penstock.process.startup_objects import freeze_startup_objects
from penstock.testing.virtual_driver import VirtualDriver
from penstock.workloads.generators import CALVO_DATASETS, SLO_MULTIPLIERS, Workload, calvo, prompt_tokens
from penstock.workloads.recording import RecordedProfile, RecordedRequest, RecordedRun

FETCH_BYTES_PER_S = 17.2e9
"""Not in the paper. Its example loads 28.1K tokens (3.68 GB) in 0.361 s through both stages one after the other;
uploads at the profile's 25 GB/s take 0.147 s, which leaves 0.214 s for the fetch."""
L1_BYTES = 60e9  # an 80 GB GPU minus weights and activations
L2_BYTES = 128e9
FETCH_WINDOW_TOKENS, SAVE_WINDOW_TOKENS, UPLOAD_GROUP_TOKENS = 2048, 1024, 1024
CONTEXT_TOKENS = 256  # contexts are multiples of it, whatever the size of a block
RUN_LIMIT_S = 120.0


@dataclass(frozen=True, slots=True)
class BlockShape:
    """KV blocks of a model. `bytes_divisor`: a usual scale that divides the bytes of a token."""

    tokens: int
    layers: int
    layer_bytes_per_token: int
    bytes_divisor: int

    @property
    def bytes_per_token(self) -> int:
        """Of all layers."""
        return self.layers * self.layer_bytes_per_token


BLOCK_SHAPES = {
    "llama-3.1-8b": BlockShape(256, 32, 4096, 256),
    "deepseek-v3": BlockShape(64, 61, 2 * (512 + 64), 288),  # latent and rotary part of MLA, bfloat16
}
PAPER = "llama-3.1-8b"


@dataclass(frozen=True, slots=True)
class Scale:
    """KV bytes are the paper's divided by `bytes_divisor`; all times are the paper's multiplied by `time_factor`.

    `blocks`: whose KV blocks, of BLOCK_SHAPES. With others than the paper's, bandwidths are in proportion to the bytes
    of a token, so that loads take as long as the paper's, and only the number and size of blocks differ."""

    bytes_divisor: int
    time_factor: float
    fetch_bytes_per_s: float = FETCH_BYTES_PER_S
    blocks: str = PAPER

    @property
    def shape(self) -> BlockShape:
        """Of one block, unscaled."""
        return BLOCK_SHAPES[self.blocks]

    @property
    def _bytes_ratio(self) -> float:
        return self.shape.bytes_per_token / BLOCK_SHAPES[PAPER].bytes_per_token

    def profile(self) -> Profile:
        """The paper's compute profile with the KV of `blocks`, at this scale."""
        paper = load_profile("h100-llama-3.1-8b")
        unscaled = replace(
            paper,
            layers=self.shape.layers,
            layer_bytes_per_token=self.shape.layer_bytes_per_token,
            upload_bytes_per_s=paper.upload_bytes_per_s * self._bytes_ratio,
        )
        return unscaled.scaled(self.bytes_divisor, self.time_factor)

    @property
    def paced_bytes_per_s(self) -> float:
        """Rate of the fetch link at this scale."""
        return self.fetch_bytes_per_s * self._bytes_ratio / self.bytes_divisor / self.time_factor


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request: its prompt, which leading blocks the pool holds, its SLO multiplier and its arrival."""

    tokens: list[int]
    warm_tokens: int
    slo_multiplier: float
    start_s: float


@dataclass(frozen=True, slots=True)
class RunResult:
    """One policy on one workload: each request's report, deadline and TTFT, in order of arrival."""

    reports: tuple[RequestReport, ...]
    slos_s: tuple[float, ...]
    ttfts_s: tuple[float, ...]
    starts_s: tuple[float, ...]
    wall_s: float
    fetched_bytes: int
    link_bytes_per_s: dict[str, float]  # as the engine observed them

    @property
    def met(self) -> list[float]:
        """1.0 for each request that met its deadline, 0.0 for each other."""
        return [float(ttft <= slo) for ttft, slo in zip(self.ttfts_s, self.slos_s, strict=True)]


def arrivals(
    dataset: str, rate_per_s: float, seed: int, hit_ratios: Sequence[float], vocabulary: int, warm_only: bool
) -> list[Arrival]:
    """The workload with its tokens, contexts in whole blocks. With `warm_only`, prompts contain only the warm part of
    their context: then the load varies with the hit ratio, and the compute does not."""
    workload: Workload = calvo(
        dataset, rate_per_s, seed, hit_ratios=hit_ratios, context_tokens_multiple=CONTEXT_TOKENS, context_spread=0.5
    )
    found = []
    for session in workload.sessions:
        turn = session.turns[0]
        multiplier = turn.slo_multiplier or SLO_MULTIPLIERS[0]
        context, query = turn.prompt
        prompt = (replace(context, length=turn.warm_tokens), query) if warm_only else turn.prompt
        tokens = prompt_tokens(prompt, vocabulary)
        found.append(Arrival(tokens, turn.warm_tokens, multiplier, session.start_s))
    return found


class Testbed:
    """A pool node that holds the contexts, and engines that use it, one after the other."""

    def __init__(self, scale: Scale, pool_address: str) -> None:
        self.scale = scale
        self.profile = scale.profile()
        self._address = pool_address
        self._block_tokens = scale.shape.tokens
        self._runner = ModelledRunner(self.profile, self._block_tokens)
        self.block_bytes = self._runner.layout.full_block_bytes
        self.pages = int(L1_BYTES / scale.bytes_divisor) // self.block_bytes
        self.slots = int(L2_BYTES / scale.bytes_divisor) // self.block_bytes
        self._runner.allocate(self.pages)
        self._root = root_key(self._runner.layout.fingerprint(self._runner.model_id), "")
        self._warm: set[BlockKey] = set()

    def _keys(self, arrival: Arrival) -> list[BlockKey]:
        return KeyChain(self._root, self._block_tokens).extend(arrival.tokens)

    def warm(self, requests: Sequence[Arrival]) -> None:
        """Write every warm block into the pool."""
        pool = connect_pool(self._address)
        try:
            fill_pool(pool, self._warm_blocks(requests), self.block_bytes, 30.0)
        finally:
            pool.close(10.0)

    def _warm_blocks(self, requests: Sequence[Arrival]) -> Iterator[NewBlock]:
        for arrival in requests:
            chain = KeyChain(self._root, self._block_tokens)
            keys = chain.extend(arrival.tokens[: arrival.warm_tokens])
            self._warm.update(keys)
            for index, key in enumerate(keys):
                yield NewBlock(key, chain.parent_of(index), self.block_bytes, prefix_position(keys[0], index))

    def forget(self, requests: Sequence[Arrival]) -> None:
        """Evict what was not warm at first (blocks that runs computed and saved)."""
        pool = connect_pool(self._address)
        pool.evict([key for arrival in requests for key in self._keys(arrival) if key not in self._warm])
        pool.close(10.0)

    def drop(self, requests: Sequence[Arrival]) -> None:
        """Evict all blocks of the requests."""
        pool = connect_pool(self._address)
        for arrival in requests:
            keys = self._keys(arrival)
            pool.evict(keys)
            self._warm.difference_update(keys)
        pool.close(10.0)

    def config(self, mode: Mode, policy: Policy) -> SchedulerConfig:
        """Settings of the engine's scheduler for one mode and policy. Windows and groups hold as many tokens whatever
        the size of a block, so that with links in proportion they cover as much time."""
        return SchedulerConfig(
            block_tokens=self._block_tokens,
            block_bytes=self.block_bytes,
            l1_pages=self.pages,
            l2_slots=self.slots,
            mode=mode,
            policy=policy,
            max_batch_tokens=8192,
            fetch_window_blocks=FETCH_WINDOW_TOKENS // self._block_tokens,
            upload_group_blocks=UPLOAD_GROUP_TOKENS // self._block_tokens,
            save_window_blocks=SAVE_WINDOW_TOKENS // self._block_tokens,
            age_bound_s=60.0 * self.scale.time_factor,
        )

    def cost(self) -> CostModel:
        """The profile of this testbed."""
        model = CostModel(LinkCost(self.profile.upload_bytes_per_s), self.profile.compute_cost())
        model.default_link_bytes_per_s = self.scale.paced_bytes_per_s
        return model

    def run(
        self, requests: Sequence[Arrival], slos_s: Sequence[float], mode: Mode, policy: Policy, outstanding: int = 0
    ) -> RunResult:
        """Open loop by arrival times, or a closed loop of `outstanding` requests. L1 is empty at first."""
        pool = connect_pool(self._address)
        engine = Engine(self.config(mode, policy), self.cost(), self._runner, pool)
        freeze_startup_objects()
        try:
            return _drive(engine, requests, slos_s, outstanding)
        finally:
            engine.close(10.0)
            pool.close(10.0)

    def profile_of(self, alone: RunResult) -> RecordedProfile:
        """Link bandwidths and overheads, derived from requests that ran one at a time on the coupled baseline."""
        upload = alone.link_bytes_per_s["upload"]
        loaded = sum(report.loaded_bytes for report in alone.reports)
        fetching_s = sum(end - start for r in alone.reports for label, start, end in r.spans if label == "fetch")
        links = {name: loaded / fetching_s for name in alone.link_bytes_per_s if name != "upload"}
        compute = self.profile.compute_cost()
        lookups, rests = [], []
        for report in alone.reports:
            lookups.append(sum(end - start for label, start, end in report.spans if label == "lookup"))
            query = report.prompt_tokens - report.cached_tokens
            modelled_s = compute.seconds([(query, report.cached_tokens)])
            rests.append((report.ttft_s or 0.0) - lookups[-1] - report.measured_load_s - modelled_s)
        return RecordedProfile(
            [tuple(sorted(links))], links, upload, (compute.a, compute.b, compute.c),
            statistics.median(lookups), 0.0, max(0.0, statistics.median(rests)),
        )  # fmt: skip

    def recorded(
        self,
        label: str,
        requests: Sequence[Arrival],
        result: RunResult,
        profile: RecordedProfile,
        mode: Mode,
        policy: Policy,
    ) -> RecordedRun:
        """The record of a run, for simulation."""
        rows = [
            RecordedRequest(start, len(a.tokens), [0] * (a.warm_tokens // self._block_tokens), slo, ttft)
            for start, a, slo, ttft in zip(result.starts_s, requests, result.slos_s, result.ttfts_s, strict=True)
        ]
        return RecordedRun(label, asdict(self.config(mode, policy)), profile, rows)

    def ideal(self, requests: Sequence[Arrival], slos_s: Sequence[float], mode: Mode, policy: Policy) -> list[float]:
        """TTFTs of the same decisions on ideal links: no overhead, and no link idle while it has work."""
        cost = self.cost()
        speed = self.scale.paced_bytes_per_s
        cost.links["net"] = LinkCost(speed)
        config = replace(self.config(mode, policy), fetch_window_blocks=2)
        compute = self.profile.compute_cost()
        hit = BlockHit(self.block_bytes, ("net",))
        keys = [self._keys(arrival)[: arrival.warm_tokens // self._block_tokens] for arrival in requests]
        pool = {key: hit for chain in keys for key in chain}
        driver = VirtualDriver(
            LoadScheduler(config, cost), pool, {"net": speed}, self.profile.upload_bytes_per_s, compute
        )
        for i, (arrival, slo_s) in enumerate(zip(requests, slos_s, strict=True)):
            spec = RequestSpec(str(i), arrival.tokens, 1, self._root, arrival.start_s + slo_s)
            driver.submit_at(arrival.start_s, spec)
        driver.run()
        accounts = [driver.ended[str(i)].account for i in range(len(requests))]
        return [(a.first_token_s or float("inf")) - a.arrival_s for a in accounts if a is not None]


@contextmanager
def testbed(scale: Scale) -> Iterator[Testbed]:
    """A testbed with room for one dataset at a time (two with some of its blocks rewritten)."""
    tokens = max(row.requests * row.context_tokens_mean for row in CALVO_DATASETS.values())
    profile = scale.profile()
    size = int(tokens * profile.layers * profile.layer_bytes_per_token * 1.3)
    pace = f"{int(scale.paced_bytes_per_s)}B/s"
    with pool_process("--listen", "127.0.0.1:0", "--memory", f"{size}B", "--pace", pace) as node:
        yield Testbed(scale, node.address)


class _Collector:
    """Collects the reports of a run; `closed` is called after each end."""

    def __init__(self, count: int, closed: Callable[[], None]) -> None:
        self.reports: list[RequestReport | None] = [None] * count
        self.errors: list[str] = []
        self._left = count
        self._closed = closed
        self.done = threading.Event()

    def event(self, index: int, event: TokenEvent) -> None:
        if event.finish_reason is None:
            return
        if event.finish_reason in ("error", "timeout", "cancelled"):
            self.errors.append(f"request {index}: {event.finish_reason} {event.error}")
        self.reports[index] = event.report
        self._left -= 1
        if not self._left:
            self.done.set()
        self._closed()


def _drive(engine: Engine, requests: Sequence[Arrival], slos_s: Sequence[float], outstanding: int) -> RunResult:
    free = threading.Semaphore(outstanding)
    collector = _Collector(len(requests), free.release)
    sampling = SamplingParams(max_tokens=1, temperature=0.0)
    started_s = time.monotonic()
    starts_s = []
    for index, (arrival, slo_s) in enumerate(zip(requests, slos_s, strict=True)):
        if outstanding:
            if not free.acquire(timeout=RUN_LIMIT_S):
                raise TimeoutError(f"no request ended within {RUN_LIMIT_S:g} s")
        else:
            time.sleep(max(0.0, started_s + arrival.start_s - time.monotonic()))
        request = GenerationRequest(str(index), arrival.tokens, sampling, slo_ttft_s=slo_s)
        starts_s.append(time.monotonic() - started_s)
        engine.submit(request, lambda event, index=index: collector.event(index, event))  # type: ignore[misc]
    if not collector.done.wait(RUN_LIMIT_S):
        raise TimeoutError(f"the run did not end within {RUN_LIMIT_S:g} s of its last arrival")
    wall_s = time.monotonic() - started_s
    if collector.errors:
        raise RuntimeError(collector.errors[0])
    reports = [report for report in collector.reports if report is not None]
    ttfts_s = tuple(report.ttft_s if report.ttft_s is not None else float("inf") for report in reports)
    stats = engine.stats()
    fetched = int(stats.counters.get("fetched_bytes", 0))
    speeds = stats.labelled["link_bytes_per_s"]
    return RunResult(tuple(reports), tuple(slos_s), ttfts_s, tuple(starts_s), wall_s, fetched, speeds)
