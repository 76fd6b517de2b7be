"""A system under test: a pool node and an engine as processes, and a workload replayed against them over HTTP."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import httpx

from penstock.bench.processes import ProcessFailed, ReadyProcess, pool_process, serve_process
from penstock.workloads.deadlines import TtftModel, one_at_a_time
from penstock.workloads.generators import Segment, Session, Turn, Workload
from penstock.workloads.progress import Counter, Progress
from penstock.workloads.replay import ReplaySettings, RequestRecord, replay

System = Literal["penstock", "coupled", "no_pool"]
WARM_UP_TENANT = "warm-up"
CALIBRATION_SESSIONS = 4


class SystemFailed(RuntimeError):
    """A system under test did not start, or failed its warm-up or calibration; the message gives the reason."""


@dataclass(frozen=True, slots=True)
class Bed:
    """Sizes common to all systems. `l1_tokens` is device memory, `l2_bytes` host staging memory; `pace` limits the pool
    node's sending (a modelled NIC); `serve_arguments` are for every engine. The model is a Llama in float32."""

    model: Path
    block_tokens: int
    l1_tokens: int
    l2_bytes: int
    pool_bytes: int
    pace: str | None = None
    policy: str | None = None
    sessions_at_once: int = 8
    request_s_max: float = 120.0
    serve_arguments: tuple[str, ...] = ()

    def _config(self) -> dict[str, int]:
        config: dict[str, int] = json.loads((self.model / "config.json").read_text())
        return config

    @property
    def vocabulary(self) -> int:
        """Size of the model's vocabulary."""
        return self._config()["vocab_size"]

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of KV of one token, in float32."""
        config = self._config()
        return 2 * 4 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]

    def pool_command(self) -> list[str]:
        """Arguments of `penstock pool serve`."""
        pace = [] if self.pace is None else ["--pace", self.pace]
        return ["--listen", "127.0.0.1:0", "--memory", f"{self.pool_bytes}B", *pace]

    def serve_command(self, system: System, pool: str | None) -> list[str]:
        """Arguments of `penstock serve` for a system; `pool` is the node's address, None for no pool."""
        where = ["--no-pool"] if pool is None else ["--pool", pool]
        policy = [] if self.policy is None or system == "coupled" else ["--policy", self.policy]
        return [
            str(self.model),
            *("--host", "127.0.0.1", "--port", "0", "--log-level", "warning"),
            *("--mode", "coupled" if system == "coupled" else "penstock"),
            *("--block-tokens", str(self.block_tokens)),
            *("--kv-memory", f"{self.l1_tokens * self.kv_bytes_per_token}B"),
            *("--staging", f"{self.l2_bytes}B"),
            *where,
            *policy,
            *self.serve_arguments,
        ]


@dataclass(frozen=True, slots=True)
class Run:
    """One replay of a workload on one system."""

    system: System
    records: list[RequestRecord]
    wall_s: float


@dataclass(slots=True)
class SystemUnderTest:
    """The processes of one system between `__enter__` and `__exit__`: a new pool and a new engine."""

    bed: Bed
    system: System
    url: str = ""
    model: str = ""
    _stack: ExitStack = field(default_factory=ExitStack)
    _processes: list[ReadyProcess] = field(default_factory=list)

    def __enter__(self) -> SystemUnderTest:
        """Start the processes. Raises SystemFailed."""
        try:
            with ExitStack() as stack:
                self._start(stack)
                self._stack = stack.pop_all()
        except (ProcessFailed, httpx.HTTPError) as error:
            raise SystemFailed(f"{self.system}: {error}") from error
        return self

    def _start(self, stack: ExitStack) -> None:
        pool = None
        if self.system != "no_pool":
            node = stack.enter_context(pool_process(*self.bed.pool_command()))
            self._processes.append(node)
            pool = node.address
        engine = stack.enter_context(serve_process(*self.bed.serve_command(self.system, pool)))
        self._processes.append(engine)
        self.url = engine.address
        self.model = httpx.get(f"{self.url}/v1/models", timeout=30.0).json()["data"][0]["id"]

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def replay(
        self,
        workload: Workload,
        deadlines: Mapping[tuple[str, int], float],
        replay_s_max: float,
        on_record: Callable[[RequestRecord], None] | None = None,
        tenant: str = "",
    ) -> Run:
        """Replay a workload. Raises SystemFailed if a process ended meanwhile."""
        settings = ReplaySettings(
            model=self.model,
            vocabulary=self.bed.vocabulary,
            sessions_at_once=self.bed.sessions_at_once,
            request_s_max=self.bed.request_s_max,
            replay_s_max=replay_s_max,
            slo_s=deadlines,
            tenant_suffix=tenant,
        )
        start_s = time.monotonic()
        records = replay(self.url, workload, settings, on_record)
        wall_s = time.monotonic() - start_s
        try:
            for process in self._processes:
                process.check()
        except ProcessFailed as error:
            raise SystemFailed(f"{self.system}: {error}") from error
        return Run(self.system, records, wall_s)

    def warm_up(self, context_tokens: int) -> None:
        """Send the same few requests to every system, of another tenant: this loads code paths and gives a first cost
        fit. Raises SystemFailed if one of them fails."""
        sizes = (context_tokens // 8, context_tokens // 2, context_tokens // 8, context_tokens // 2)
        turns = tuple(Turn((Segment(f"warm-up/{size}", max(8, size)),), 4) for size in sizes)
        run = self.replay(Workload("warm-up", (Session("warm-up", turns),)), {}, 120.0, tenant=WARM_UP_TENANT)
        errors = [record.error for record in run.records if record.error is not None]
        if errors:
            raise SystemFailed(f"{self.system}: a warm-up request failed: {errors[0]}")


@dataclass(frozen=True, slots=True)
class Calibration:
    """The coupled baseline without interference: TTFT by cached and computed tokens, and seconds per decoded token."""

    ttft: TtftModel
    decode_s: float


def calibrate(bed: Bed, workload: Workload, requests: int, replay_s_max: float, progress: Progress) -> Calibration:
    """Sends requests one at a time to a separate coupled system whose device memory just holds one of them. Raises
    SystemFailed if too few of them succeed."""
    alone = one_at_a_time(workload, requests, CALIBRATION_SESSIONS)
    counter = Counter(progress, "calibration: coupled, one request at a time", alone.requests)
    longest = alone.context_tokens_max
    with SystemUnderTest(replace(bed, l1_tokens=longest + longest // 8 + bed.block_tokens), "coupled") as served:
        served.warm_up(longest)
        records = served.replay(alone, {}, replay_s_max, counter).records
    decoded = [
        (record.total_s - record.ttft_s) / (len(record.output_tokens) - 1)
        for record in records
        if record.error is None and record.ttft_s is not None and len(record.output_tokens) > 1
    ]
    try:
        return Calibration(TtftModel.fit(records), sum(decoded) / len(decoded) if decoded else 0.0)
    except ValueError as error:
        errors = sorted({record.error for record in records if record.error is not None})
        raise SystemFailed(f"{error}; {'; '.join(errors[:3])}") from error


def run_system(
    bed: Bed,
    system: System,
    workload: Workload,
    deadlines: Mapping[tuple[str, int], float],
    replay_s_max: float,
    progress: Progress,
) -> Run:
    """One replay on a new pool node and engine, after the warm-up."""
    counter = Counter(progress, f"{system}: {workload.name}", workload.requests)
    with SystemUnderTest(bed, system) as served:
        served.warm_up(workload.context_tokens_max)
        return served.replay(workload, deadlines, replay_s_max, counter)
