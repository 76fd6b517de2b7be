"""A cluster of stock vLLMs with their agents: a pool node, a prefill and a decode engine, and routers before them."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from penstock.cluster.router.router import ClusterEngine, RouterSettings
from penstock.core.cluster.decisions import InterEngineConfig
from penstock.core.cluster.paths import ReadPolicy
from penstock.core.layout import staging_bytes
from penstock.engine.api import GenerationRequest, RequestReport, TokenEvent
from penstock.engine.runner import SamplingParams
from penstock.pool.api import MemberStat
from penstock.pool.net.connect import connect_pool
from penstock.pool.net.secret import Secret
from tests.inside_vllm.vllm_rig import BLOCK, KV_BYTES, MAX_TOKENS, START_S, VLLM_BLOCK, PoolProcess, wait_until

SECRET = "0123456789abcdef" * 4
ANSWER_S = 60.0
LEASE_S = 15.0  # beside several vLLMs that compute, a process may wait some seconds for its turn
BLOCK_BYTES = 4 * 2 * 2 * 32 * 4 * BLOCK  # of the tiny Llama: layers, K and V, heads, their size, float32
BUFFER_BLOCKS = 20
VLLM_FLAGS = (
    *("--dtype", "float32", "--block-size", str(VLLM_BLOCK), "--kv-cache-memory-bytes", str(KV_BYTES)),
    *("--max-model-len", str(MAX_TOKENS), "--enforce-eager", "--no-enable-prefix-caching"),  # all KV comes from others
)
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO", "TORCHDYNAMO_DISABLE": "1"}


def free_port() -> int:
    """A port for routers to come: not one of those that the system gives to whom asks for any."""
    while True:
        port = random.randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


class Agent:
    """A `penstock vllm-engine`, in a process of its own."""

    def __init__(self, model: Path, role: str, port: int, pool: str, secret: Path, log: Path, *more: str) -> None:
        self.role, self._log = role, log
        command = [sys.executable, "-m", "penstock", "vllm-engine", str(model), "--router", f"127.0.0.1:{port}"]
        command += ["--role", role, "--node", f"host-{role}", "--engine-name", role, "--secret-file", str(secret)]
        command += ["--pool", pool, "--staging", "48MiB", "--port", "0"]
        command += ["--sidecars"] if role == "prefill" else []
        command += ["--buffer", f"{BUFFER_BLOCKS * staging_bytes(BLOCK_BYTES)}B"] if role == "decode" else []
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [*command, *VLLM_FLAGS, *more],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | ENVIRONMENT,
                start_new_session=True,
            )

    def log(self) -> str:
        return self._log.read_text()

    def wait_ready(self) -> None:
        def ready() -> bool:
            assert self.process.poll() is None, self.log()[-4000:]
            return "listening on" in self.log()

        wait_until(ready, f"the {self.role} engine is ready", 2 * START_S, look_every_s=0.2)

    @property
    def url(self) -> str:
        """Of the agent's own pages."""
        found = re.search(r"listening on (http://\S+)", self.log())
        assert found is not None
        return found[1]

    def vllm(self) -> psutil.Process:
        """The API server that the agent started."""
        return psutil.Process(self.process.pid).children()[0]

    def tree(self) -> list[psutil.Process]:
        return [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]

    def client(self) -> httpx.Client:
        """Asks its vLLM directly: one stock vLLM, which computes every prompt."""
        return client_of(self.vllm())

    def metric(self, name: str, missing: float = 0.0) -> float:
        """Of the agent's own."""
        found = re.search(rf"^{name} (\S+)$", httpx.get(f"{self.url}/metrics").text, re.MULTILINE)
        return float(found[1]) if found is not None else missing

    def is_idle(self) -> bool:
        """Whether it waits for no answer of its vLLM."""
        return self.metric("penstock_engine_requests_in_vllm", missing=1.0) == 0.0

    def stop(self) -> None:
        processes = []
        with contextlib.suppress(psutil.NoSuchProcess):
            processes = self.tree()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(60.0)
        for one in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()


def client_of(vllm: psutil.Process) -> httpx.Client:
    """Asks the API server that an agent started."""
    words = vllm.cmdline()
    port = words[words.index("--port") + 1]
    headers = {"Authorization": f"Bearer {vllm.environ()['VLLM_API_KEY']}"}
    return httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=2 * ANSWER_S)


@dataclass
class Answer:
    """A request to an in-process router, and what came of it."""

    tokens: list[int] = field(default_factory=list)
    end: TokenEvent | None = None
    ended: threading.Event = field(default_factory=threading.Event)
    first: threading.Event = field(default_factory=threading.Event)

    def on_event(self, event: TokenEvent) -> None:
        if event.token_id is not None:
            self.tokens.append(event.token_id)
            self.first.set()
        if event.finish_reason is not None:
            self.end = event
            self.ended.set()

    def wait(self, timeout_s: float = ANSWER_S) -> list[int]:
        assert self.ended.wait(timeout_s), f"no end after {timeout_s:g} s, {len(self.tokens)} tokens"
        assert self.end is not None and self.end.finish_reason in ("stop", "length"), self.end
        return self.tokens

    @property
    def report(self) -> RequestReport:
        assert self.end is not None and self.end.report is not None
        return self.end.report


class Cluster:
    """One pool node and two agents on one cluster port."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.model, self.folder, self.port = model, folder, free_port()
        self.secret = folder / "secret"
        self.secret.touch(0o600)
        self.secret.write_text(SECRET)
        self.pool = PoolProcess("--memory", "128MiB", "--secret-file", str(self.secret))
        self.agents: dict[str, Agent] = {}
        self._logs = 0

    def in_pool(self) -> MemberStat:
        """What the pool's member holds and has read."""
        node = connect_pool(self.pool.address, secret=Secret(SECRET.encode()))
        try:
            return node.stat(5.0).members[0]
        finally:
            node.close(1.0)

    def start(self, *roles: str) -> None:
        """Start these engines at once. Returns when they are ready."""
        for role in roles:
            self._logs += 1
            log = self.folder / f"{role}-{self._logs}.log"
            self.agents[role] = Agent(self.model, role, self.port, self.pool.address, self.secret, log)
        for role in roles:
            self.agents[role].wait_ready()

    @contextlib.contextmanager
    def router(self, read: ReadPolicy = "split", no_engine_s: float = 30.0) -> Iterator[ClusterEngine]:
        """A router in this process, with both engines registered."""
        sock = socket.create_server(("127.0.0.1", self.port))
        scheduler = InterEngineConfig(read=read, block_tokens=BLOCK, part_tokens_min=BLOCK)
        settings = RouterSettings(lease_s=LEASE_S, grace_s=0.0, no_engine_s=no_engine_s, scheduler=scheduler)
        router = ClusterEngine(sock, Secret(SECRET.encode()), settings)
        try:
            wait_until(lambda: router.stats().gauges["engines"] == len(self.agents), "all engines have registered")
            yield router
        finally:
            router.close(5.0)

    @contextlib.contextmanager
    def api(self, *more: str) -> Iterator[httpx.Client]:
        """A `penstock router` process with these further flags, and a client of it."""
        command = [sys.executable, "-m", "penstock", "router", str(self.model), "--port", "0", "--secret-file"]
        command += [
            str(self.secret),
            "--cluster-listen",
            f"127.0.0.1:{self.port}",
            "--served-model-name",
            "tiny",
            "--lease-s",
            str(LEASE_S),
            *more,
        ]
        log = self.folder / "router.log"
        with log.open("w") as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        try:
            wait_until(lambda: "listening on" in log.read_text(), "the router listens")
            found = re.search(r"listening on (http://[\w.:]+)", log.read_text())
            assert found is not None
            with httpx.Client(base_url=found[1], timeout=ANSWER_S) as client:
                wait_until(lambda: client.get("/health").status_code == 200, "the router has its engines")
                yield client
        finally:
            process.terminate()
            process.wait(30.0)

    def stop(self) -> None:
        for agent in self.agents.values():
            agent.stop()
        self.pool.stop()


def ask(router: ClusterEngine, name: str, prompt: Sequence[int], new_tokens: int = 12, **sampling: Any) -> Answer:
    """Submit a request; greedy unless `sampling` says otherwise."""
    answer = Answer()
    given = {"temperature": 0.0, "ignore_eos": True} | sampling
    request = GenerationRequest(name, list(prompt), SamplingParams(max_tokens=new_tokens, **given))
    router.submit(request, answer.on_event)
    return answer


def wait_gone(processes: Sequence[psutil.Process], timeout_s: float = 120.0) -> None:
    """Wait until these processes, of killed parents, have ended."""
    _, left = psutil.wait_procs(processes, timeout=timeout_s)
    names = [" ".join(one.cmdline())[:200] for one in left if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    assert not names, f"not ended within {timeout_s:g} s: {names}"


def wait_idle(router: ClusterEngine) -> None:
    end_s = time.monotonic() + ANSWER_S
    while router.requests:
        assert time.monotonic() < end_s
        time.sleep(0.01)
