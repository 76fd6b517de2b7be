"""Hosts of `benchmarks dualpath --engine vllm`: as `testbed`, with a stock `vllm serve` and its agent on each."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.dualpath import vllm_reference
from benchmarks.dualpath.agents import BLOCK_TOKENS, Agent
from benchmarks.dualpath.testbed import POOL_PORT, ROUTER_ADDRESS, ROUTER_PORT, Scale, Testbed, Topology
from benchmarks.dualpath.vllm_reference import ANSWERS, Asked
from penstock.bench.processes import SERVE_READY, ProcessFailed, ReadyProcess
from penstock.core.config import Mode
from penstock.process.child_python import child_environment, python_command

VLLM_BLOCK_TOKENS = 32
KV_BYTES = 96 << 20
CONTEXT_TOKENS_MAX = 2048
START_S_MAX = 400.0
REFERENCE_S_MAX = 400.0
BUFFER_BYTES = 160 << 20
FETCH_WINDOW = "2MiB"  # eight of the small model's blocks, as the default has of Llama-3.1-8B's
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # instances would share the one core that vLLM chooses for each
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
FLAGS = {
    "dtype": "float32",
    "block_size": VLLM_BLOCK_TOKENS,
    "kv_cache_memory_bytes": KV_BYTES,
    "max_model_len": CONTEXT_TOKENS_MAX,
    "enforce_eager": True,
}


def vllm_scale(storage_bytes_per_s: float) -> Scale:
    """NICs of this speed; nothing but them is modelled."""
    return Scale(bytes_divisor=1, time_factor=1.0, storage_bytes_per_s=storage_bytes_per_s, pool_bytes=1 << 30)


class VllmBed(Testbed):
    """The pool gets its content from `reference`, before the engines run."""

    def __init__(
        self,
        topology: Topology,
        scale: Scale,
        checkpoint: Path,
        flags: Mapping[str, Any] | None = None,
        buffer_bytes: int = BUFFER_BYTES,
    ) -> None:
        """`flags` are vLLM's, beside FLAGS; `buffer_bytes` are a decode host's."""
        super().__init__(topology, scale, checkpoint)
        self._flags = FLAGS | dict(flags or {})
        self._buffer_bytes = buffer_bytes

    def reference(self, prompts: Sequence[tuple[str, list[int]]], answer_tokens: int) -> list[list[int]]:
        """What one vLLM answers to (tenant, tokens), each prompt computed; the pool has their KV then. Raises
        ProcessFailed."""
        address = f"127.0.0.1:{POOL_PORT}"
        secret, asked_for = str(self.secret_file), list(prompts)
        asked = Asked(str(self.model), address, secret, self._flags, asked_for, answer_tokens, BLOCK_TOKENS)
        with (
            self.pool_host.entered(),
            subprocess.Popen(
                python_command(vllm_reference.__file__),  # a checkout's folder is not on the module path
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
                env=child_environment() | ENVIRONMENT,
            ) as process,
        ):
            try:
                output, errors = process.communicate(msgspec.json.encode(asked), REFERENCE_S_MAX)
            except subprocess.TimeoutExpired:
                raise ProcessFailed(f"one vLLM did not answer within {REFERENCE_S_MAX:g} s") from None
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # processes of vLLM outlive the one that started them
        if process.returncode:
            raise ProcessFailed(f"one vLLM ended with status {process.returncode}:\n{errors.decode()[-4000:]}")
        lines = [line for line in output.decode().splitlines() if line.startswith(ANSWERS)]
        if not lines:
            raise ProcessFailed(f"one vLLM ended without answers:\n{errors.decode()[-4000:]}")
        found: list[list[int]] = json.loads(lines[-1].removeprefix(ANSWERS))
        return found

    @contextlib.contextmanager
    def engines(self, mode: Mode = "penstock") -> Iterator[None]:
        """One vLLM with its agent on each host, all started at once. Raises ProcessFailed."""
        with contextlib.ExitStack() as stack:
            started = []
            for number, host in enumerate(self._hosts):
                command = python_command("-m", "penstock", "vllm-engine", *self._agent(number, host.name, host.role))
                process = ReadyProcess(command, SERVE_READY, ready_s=START_S_MAX, stop_s=40.0, environment=ENVIRONMENT)
                with host.namespace.entered():
                    process.start()
                stack.callback(process.stop)
                started.append((host, process))
            for host, process in started:
                process.await_ready()
                host.process = process
            try:
                yield
            finally:
                for host in self._hosts:
                    host.process = None

    def _agent(self, number: int, name: str, role: str) -> list[str]:
        words = [str(self.model), "--port", "0", "--log-level", "warning", "--engine-name", name, "--node", name]
        words += ["--router", f"{ROUTER_ADDRESS}:{ROUTER_PORT}", "--role", role, "--secret-file", str(self.secret_file)]
        words += ["--pool", f"10.1.{number}.1:{POOL_PORT}", "--staging", "48MiB"]
        words += ["--fetch-window", FETCH_WINDOW]
        if role == "decode":
            words += ["--relay-listen", f"10.2.0.{number + 2}:0", "--buffer", f"{self._buffer_bytes}B"]
        for flag, value in self._flags.items():
            words += [f"--{flag.replace('_', '-')}", *([] if value is True else [str(value)])]
        return words

    def fill(self, agents: Sequence[Agent], tenant: str) -> None:
        """Do nothing: `reference` filled the pool."""


def why_no_vllm() -> str | None:
    """Why vLLM cannot be measured here; None if it can."""
    import importlib.util

    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed here (make venv-vllm)"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None if memory > 8 << 30 else f"two vLLMs need 8 GiB of memory; this machine has {memory >> 30} GiB"
