"""Hosts of `benchmarks dualpath`: network namespaces with two NICs each, the pool, real engines, and a router."""

from __future__ import annotations

import contextlib
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from benchmarks.dualpath.agents import BLOCK_TOKENS, Agent, trajectories
from benchmarks.dualpath.namespaces import Namespace, connect, received_bytes, switch
from benchmarks.pool_fill import fill_pool
from penstock.bench.processes import ReadyProcess, pool_process, serve_process
from penstock.cluster.router.engine_accounts import prompt_tokens_per_s
from penstock.cluster.router.router import ClusterEngine, RouterSettings
from penstock.core.cluster.decisions import InterEngineConfig
from penstock.core.config import Mode
from penstock.core.keys import KeyChain, root_key
from penstock.core.new_block import NewBlock, prefix_position, tenant_tag
from penstock.engine.modelled_runner import ModelledRunner
from penstock.engine.profile import Profile, load_profile
from penstock.pool.net.connect import connect_pool
from penstock.pool.net.secret import Secret
from penstock.sim.cluster_shape import System
from penstock.sim.trajectories import load_of

PROFILE = "h100-llama-3.1-8b"
ROUTER_ADDRESS, ROUTER_PORT, POOL_PORT = "10.2.0.1", 7100, 7070
REGISTER_S = 30.0
BETA_S = 5.0  # the paper's
STORAGE, COMPUTE = "storage", "compute"


@dataclass(frozen=True, slots=True)
class Scale:
    """KV bytes are the profile's divided by `bytes_divisor`, times multiplied by `time_factor`, the agents' lengths
    divided by `token_divisor`. Engines' memories are small relative to the KV of all agents, so that a turn's context
    comes from storage."""

    bytes_divisor: int = 64
    time_factor: float = 1.5
    token_divisor: int = 8
    storage_bytes_per_s: float = 40e6
    compute_ratio: int = 8
    prefill_memory_bytes: int = 40 << 20
    decode_memory_bytes: int = 256 << 20
    buffer_bytes: int = 48 << 20
    staging_bytes: int = 32 << 20
    pool_bytes: int = 4 << 30

    def profile(self) -> Profile:
        """The paper's compute profile at this scale."""
        return load_profile(PROFILE).scaled(self.bytes_divisor, self.time_factor)

    @property
    def block_bytes(self) -> int:
        """Bytes of KV in one block, at this scale."""
        profile = self.profile()
        return profile.layers * profile.layer_bytes_per_token * BLOCK_TOKENS

    @property
    def bytes_per_token(self) -> float:
        """Bytes of KV of one token, at this scale."""
        return self.block_bytes / BLOCK_TOKENS

    @property
    def part_tokens_min(self) -> int:
        """The smallest part of a split read, at this scale."""
        return max(BLOCK_TOKENS, 1024 // self.token_divisor)

    @property
    def compute_bytes_per_s(self) -> float:
        """Rate of a compute NIC at this scale."""
        return self.storage_bytes_per_s * self.compute_ratio


@dataclass(frozen=True, slots=True)
class Topology:
    """Prefill and decode hosts, an engine on each."""

    prefill: int
    decode: int

    @property
    def name(self) -> str:
        """For example "2P1D"."""
        return f"{self.prefill}P{self.decode}D"

    @property
    def hosts(self) -> list[tuple[str, str]]:
        """(name, role) of each."""
        return [(f"p{i}", "prefill") for i in range(self.prefill)] + [(f"d{i}", "decode") for i in range(self.decode)]


def scheduler_of(system: System, scale: Scale, agents: Sequence[Agent] = ()) -> InterEngineConfig:
    """A system's policies for the live router. If prefill engines are balanced by tokens, as in the paper, an engine's
    rate is in prompt tokens of these agents, including hits (as in the simulator)."""
    beta_s = BETA_S
    if agents and not system.weigh:
        cost = scale.profile().compute_cost()
        load = load_of(trajectories(agents), cost)
        beta_s *= load.prompt_tokens / load.compute_s / prompt_tokens_per_s(cost)
    return system.scheduler(beta_s=beta_s, part_tokens_min=scale.part_tokens_min)


def mode_of(system: System) -> Mode:
    """Flags for engines without layerwise loading: they load, copy and compute one request after the other."""
    return "penstock" if system.layerwise else "coupled"


@dataclass(slots=True, eq=False)
class _Host:
    name: str
    role: str
    namespace: Namespace
    process: ReadyProcess | None = None


class Testbed:
    """Hosts, NICs and the pool from `__enter__` on; engines by `engines`, a router by `router`."""

    def __init__(self, topology: Topology, scale: Scale, model: Path | None = None) -> None:
        """With a `model` (a checkpoint) engines compute for real; otherwise compute is modelled."""
        self.topology, self.scale, self.model = topology, scale, model
        self.profile = scale.profile()
        self._runner = ModelledRunner(self.profile, BLOCK_TOKENS)
        self._fingerprint = self._runner.layout.fingerprint(self._runner.model_id)
        self._stack = contextlib.ExitStack()
        self._hosts: list[_Host] = []
        self.secret = secrets.token_hex(32)

    def __enter__(self) -> Self:
        """Set everything up. Raises NamespaceError, ProcessFailed or OSError."""
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="penstock-bench-")))
            self.secret_file = folder / "secret"
            self.secret_file.touch(0o600)
            self.secret_file.write_text(self.secret)
            self.pool_host = stack.enter_context(Namespace())
            self.switch_host = stack.enter_context(Namespace())
            for number, (name, role) in enumerate(self.topology.hosts):
                host = _Host(name, role, stack.enter_context(Namespace()))
                self._wire(number, host.namespace)
                self._hosts.append(host)
            switch(self.switch_host, [f"port{i}" for i in range(len(self._hosts))])
            self.switch_host.run("ip", "addr", "add", f"{ROUTER_ADDRESS}/24", "dev", "switch")
            with self.pool_host.entered():
                arguments = ("--listen", f"0.0.0.0:{POOL_PORT}", "--memory", f"{self.scale.pool_bytes}B")
                self.pool = stack.enter_context(pool_process(*arguments, "--secret-file", str(self.secret_file)))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _wire(self, number: int, namespace: Namespace) -> None:
        """The two NICs of a host."""
        scale = self.scale
        net = f"10.1.{number}"
        storage, compute = scale.storage_bytes_per_s, scale.compute_bytes_per_s
        connect(self.pool_host, f"host{number}", f"{net}.1/30", namespace, STORAGE, f"{net}.2/30", storage)
        connect(self.switch_host, f"port{number}", "", namespace, COMPUTE, f"10.2.0.{number + 2}/24", compute)

    # -- engines ------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def engines(self, mode: Mode) -> Iterator[None]:
        """One engine process on each host. Raises ProcessFailed."""
        with contextlib.ExitStack() as stack:
            for number, host in enumerate(self._hosts):
                with host.namespace.entered():
                    host.process = stack.enter_context(serve_process(*self._serve(number, host, mode)))
            try:
                yield
            finally:
                for host in self._hosts:
                    host.process = None

    def _serve(self, number: int, host: _Host, mode: Mode) -> list[str]:
        scale = self.scale
        memory = scale.prefill_memory_bytes if host.role == "prefill" else scale.decode_memory_bytes
        where = ["--host", "127.0.0.1", "--port", "0", "--log-level", "warning"]
        cluster = ["--router", f"{ROUTER_ADDRESS}:{ROUTER_PORT}", "--role", host.role, "--secret-file"]
        cluster += [str(self.secret_file), "--engine-name", host.name, "--node", host.name]
        model = ["--executor", "modelled", "--profile", PROFILE, "--bytes-divisor", str(scale.bytes_divisor)]
        model += ["--time-factor", str(scale.time_factor)]
        if self.model is not None:
            model = [str(self.model), "--dtype", "float32", "--device", "cpu"]
        sizes = ["--block-tokens", str(BLOCK_TOKENS), "--kv-memory", f"{memory}B"]
        sizes += ["--staging", f"{scale.staging_bytes}B"]
        sizes += ["--mode", mode, "--policy", "fcfs"]
        relay = ["--relay-listen", f"10.2.0.{number + 2}:0", "--buffer", f"{scale.buffer_bytes}B"]
        pool = ["--pool", f"10.1.{number}.1:{POOL_PORT}"]
        return [*where, *cluster, *model, *sizes, *pool, *(relay if host.role == "decode" else [])]

    @contextlib.contextmanager
    def router(self, system: System, agents: Sequence[Agent] = ()) -> Iterator[ClusterEngine]:
        """A router with the system's policies for these agents, with every engine registered. Raises TimeoutError."""
        sock = self.switch_host.listen(ROUTER_ADDRESS, ROUTER_PORT)
        sock.listen()
        settings = RouterSettings(grace_s=0.0, scheduler=scheduler_of(system, self.scale, agents))
        router = ClusterEngine(sock, Secret(self.secret.encode()), settings)
        try:
            end_s = time.monotonic() + REGISTER_S
            while router.stats().gauges["engines"] < len(self._hosts):
                self.check()
                if time.monotonic() > end_s:
                    raise TimeoutError(f"not all engines registered within {REGISTER_S:g} s")
                time.sleep(0.02)
            yield router
        finally:
            router.close(5.0)

    def check(self) -> None:
        """Raises ProcessFailed when a process has ended by itself."""
        self.pool.check()
        for host in self._hosts:
            if host.process is not None:
                host.process.check()

    @property
    def pids(self) -> list[int]:
        """Process ids of the pool and of the running engines, prefill first."""
        engines = [host.process.pid for host in self._hosts if host.process is not None]
        return [self.pool.pid, *engines]

    # -- KV -----------------------------------------------------------------------------------------------------

    def fill(self, agents: Sequence[Agent], tenant: str) -> None:
        """Write the agents' initial contexts into the pool, without using the NICs. Raises PoolError or
        TimeoutError."""
        with self.pool_host.entered():
            pool = connect_pool(f"127.0.0.1:{POOL_PORT}", secret=Secret(self.secret.encode()))
            try:
                fill_pool(pool, self._blocks(agents, tenant), self.scale.block_bytes)
            finally:
                pool.close(10.0)

    def _blocks(self, agents: Sequence[Agent], tenant: str) -> Iterator[NewBlock]:
        """The pool's initial content, each block once."""
        size, seen = self.scale.block_bytes, set()
        for agent in agents:
            first = agent.turns[0]
            chain = KeyChain(root_key(self._fingerprint, tenant), BLOCK_TOKENS)
            for index, key in enumerate(chain.extend(first.prompt[: first.hit_tokens])):
                if key not in seen:
                    seen.add(key)
                    position = prefix_position(chain.keys[0], index)
                    yield NewBlock(key, chain.parent_of(index), size, position, tenant_tag(tenant))

    # -- NICs ---------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def watched(self, every_s: float = 0.1) -> Iterator[NicLoads]:
        """Sample what the storage NICs receive while the context is open."""
        loads = NicLoads([host.name for host in self._hosts])
        pids = self.pids[1:]
        stop = threading.Event()

        def sample() -> None:
            while True:
                loads.add(time.monotonic(), [received_bytes(pid, STORAGE) for pid in pids])
                if stop.wait(every_s):
                    return

        thread = threading.Thread(target=sample, name="penstock-bench-nics", daemon=True)
        thread.start()
        try:
            yield loads
        finally:
            stop.set()
            thread.join()

    def raw_bytes_per_s(self, windows: int = 4, window_s: float = 1.0) -> float:
        """The bandwidth of plain sockets from the pool's host to all hosts at once, over all storage NICs, by these
        NICs' counters; the best of several windows."""
        with contextlib.ExitStack() as stack:
            pairs = []
            for number, host in enumerate(self._hosts):
                listener = stack.enter_context(self.pool_host.listen(f"10.1.{number}.1"))
                listener.listen()
                with host.namespace.entered():
                    remote = stack.enter_context(socket.create_connection(listener.getsockname(), timeout=5.0))
                local, _ = listener.accept()
                pairs.append((stack.enter_context(local), remote))
            stop = threading.Event()
            threads = [threading.Thread(target=_send, args=(local, stop), daemon=True) for local, _ in pairs]
            threads += [threading.Thread(target=_receive, args=(remote, stop), daemon=True) for _, remote in pairs]
            for thread in threads:
                thread.start()
            rates = []
            for _ in range(windows):
                before, start_s = self._received(), time.monotonic()
                time.sleep(window_s)
                rates.append((self._received() - before) / (time.monotonic() - start_s))
            stop.set()
            for local, remote in pairs:
                for end in (local, remote):
                    with contextlib.suppress(OSError):
                        end.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join(5.0)
        return max(rates)

    def _received(self) -> int:
        """Bytes received by all storage NICs until now."""
        total = 0
        for host in self._hosts:
            with host.namespace.entered():
                total += received_bytes(None, STORAGE)
        return total


def _send(sock: socket.socket, stop: threading.Event) -> None:
    data = bytes(1 << 18)
    with contextlib.suppress(OSError):
        while not stop.is_set():
            sock.sendall(data)


def _receive(sock: socket.socket, stop: threading.Event) -> None:
    into = bytearray(1 << 18)
    with contextlib.suppress(OSError):
        while not stop.is_set():
            sock.recv_into(into)


class NicLoads:
    """Bytes received by each NIC over time."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self._times: list[float] = []
        self._counts: list[list[int]] = []

    def add(self, now: float, counts: list[int]) -> None:
        """Record the counters of all NICs, in bytes, at `now`."""
        self._times.append(now)
        self._counts.append(counts)

    def _at(self, at: float) -> np.ndarray:
        counts = np.asarray(self._counts, dtype=float)
        return np.array([np.interp(at, self._times, counts[:, i]) for i in range(counts.shape[1])])

    def between(self, start_s: float, end_s: float) -> list[float]:
        """Bytes of each NIC."""
        return [float(x) for x in self._at(end_s) - self._at(start_s)]

    def max_over_mean(self, start_s: float, end_s: float, window_s: float) -> float:
        """Bytes of the busiest NIC over the mean, averaged over windows of time, weighted by load."""
        top = total = 0.0
        at = start_s
        while at + window_s <= end_s:
            loads = self.between(at, at + window_s)
            top += max(loads)
            total += sum(loads) / len(loads)
            at += window_s
        return top / total if total else 1.0
