"""A real vLLM engine in this process, real pool nodes beside it, and what they count."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from penstock.pool.api import PoolStat
from penstock.vllm.flags import SCHEDULER, connector_config

WAIT_S = 60.0
BLOCK = 64  # tokens of a pool block: vLLM's of 32, twice
VLLM_BLOCK = 32
MIB = 1 << 20
KV_BYTES = 32 * MIB
MAX_TOKENS = 2048


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = WAIT_S, look_every_s: float = 0.01) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(look_every_s)


def prompt_of(seed: int, tokens: int) -> list[int]:
    """Token ids without a special one in them; two seeds share no first block."""
    return [(seed * 7919 + 31 * at * at + 17 * at + at // 7) % 350 + 10 for at in range(tokens)]


def build_model(architecture: str, folder: Path) -> Path:
    """A tiny random checkpoint that vLLM runs on CPU. "sliding": Gemma 3, every other layer with a window of 64."""
    from transformers import Gemma3TextConfig

    from penstock.testing import tiny_models

    if architecture != "sliding":
        return tiny_models.build_tiny(architecture, folder, head_dim=32, max_context_tokens=MAX_TOKENS)
    config = Gemma3TextConfig(
        **tiny_models.tiny_config(MAX_TOKENS, head_dim=32),
        sliding_window=64,
        layer_types=["sliding_attention", "full_attention"] * 2,
        query_pre_attn_scalar=32,
    )
    return tiny_models.save_random(config, folder)


@dataclass(frozen=True, slots=True)
class Counts:
    """What vLLM counts: tokens asked for and found in its own cache, and in the connector's."""

    queried: int
    local: int
    external: int
    preemptions: int

    def __sub__(self, other: Counts) -> Counts:
        return Counts(
            self.queried - other.queried,
            self.local - other.local,
            self.external - other.external,
            self.preemptions - other.preemptions,
        )


class VllmEngine:
    """`LLM()` with greedy sampling. `extra` None: stock vLLM without a connector."""

    def __init__(
        self,
        model: Path,
        extra: dict[str, Any] | None,
        scheduler: bool = True,
        role: str = "kv_both",
        **flags: Any,
    ) -> None:
        from vllm import LLM
        from vllm.config import KVTransferConfig
        from vllm.distributed.kv_transfer import has_kv_transfer_group

        assert not has_kv_transfer_group(), (
            "another engine runs in this process: vLLM would give its connector to this one"
        )
        settings: dict[str, Any] = {
            "dtype": "float32",
            "block_size": VLLM_BLOCK,
            "kv_cache_memory_bytes": KV_BYTES,
            "max_model_len": MAX_TOKENS,
            "max_num_seqs": 64,
            "enforce_eager": True,
            "disable_log_stats": False,
            "seed": 0,
        }
        if extra is not None:
            given = {"staging": "64MiB", "load_always": True} | extra
            settings["kv_transfer_config"] = KVTransferConfig(**connector_config(given) | {"kv_role": role})
            if scheduler:
                settings["scheduler_cls"] = SCHEDULER
        try:
            self.llm = LLM(model=str(model), **settings | flags)
        except BaseException:
            _clean_up()
            raise

    def ask(
        self, prompts: Sequence[Sequence[int]], new_tokens: int = 12, salt: str | None = None, **sampling: Any
    ) -> list[list[int]]:
        """The tokens that follow each prompt."""
        from vllm import SamplingParams

        parameters = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, **sampling)
        inputs: list[Any] = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        if salt is not None:
            inputs = [one | {"cache_salt": salt} for one in inputs]
        answers = self.llm.generate(inputs, parameters, use_tqdm=False)
        assert all(answer.outputs[0].finish_reason == "length" for answer in answers)
        return [list(answer.outputs[0].token_ids) for answer in answers]

    def counts(self) -> Counts:
        found = {metric.name: getattr(metric, "value", 0) for metric in self.llm.get_metrics()}
        names = ("prefix_cache_queries", "prefix_cache_hits", "external_prefix_cache_hits", "num_preemptions")
        return Counts(*(int(found[f"vllm:{name}"]) for name in names))

    def metrics(self) -> dict[str, float]:
        """Penstock's own metrics, by name; labels added up."""
        found: dict[str, float] = {}
        for metric in self.llm.get_metrics():
            if "penstock" in metric.name:
                found[metric.name] = found.get(metric.name, 0.0) + float(getattr(metric, "value", 0) or 0)
        return found

    def forget(self) -> None:
        """Empty vLLM's own cache. While blocks are kept for a save it refuses, so a request drives it on; the pool
        holds a block some time after vLLM had it back."""
        deadline = time.monotonic() + WAIT_S
        while not self.llm.reset_prefix_cache():
            assert time.monotonic() < deadline, "vLLM never gave its blocks back"
            self.ask([prompt_of(999, 5)], 1)
        if self.connector is not None and self.connector.side.host.fatal is None:
            ask = self.connector.side.host.ask
            wait_until(lambda: not ask(lambda scheduler: scheduler.gauges()["saves_queued"]), "the last saves are over")

    def again(self, prompts: Sequence[Sequence[int]], least_external: int, **more: Any) -> list[list[int]]:
        """Ask with vLLM's cache empty: at least so many tokens came from the pool, none from vLLM."""
        self.forget()
        before = self.counts()
        answers = self.ask(prompts, **more)
        seen = self.counts() - before
        assert seen.local == 0 and seen.external >= least_external, seen
        return answers

    @property
    def connector(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core.scheduler.connector

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        _clean_up()


def _clean_up() -> None:
    """What vLLM keeps for the whole process, also of an engine that did not start."""
    import gc

    from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    ensure_kv_transfer_shutdown()
    gc.collect()
    cleanup_dist_env_and_memory()


@contextlib.contextmanager
def running(model: Path, extra: dict[str, Any] | None, **flags: Any) -> Iterator[VllmEngine]:
    engine = VllmEngine(model, extra, **flags)
    try:
        yield engine
    finally:
        engine.close()


class PoolProcess:
    """A real `penstock pool`."""

    def __init__(self, *arguments: str, listen: str = "127.0.0.1:0") -> None:
        self.arguments = arguments
        self._process: subprocess.Popen[str] | None = None
        self.address = listen
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "penstock", "pool", "--listen", self.address, *self.arguments]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        found = re.search(r"ready on (127\.0\.0\.1:\d+):", line)
        assert found is not None, line
        self.address = found[1]

    def send(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(WAIT_S)
            self._process.communicate()
            self._process = None

    def stat(self) -> PoolStat:
        """What the node says of itself."""
        from penstock.pool.net.connect import connect_node

        node = connect_node(self.address)
        try:
            return node.stat(5.0)
        finally:
            node.close(1.0)

    def blocks(self) -> int:
        """How many blocks it holds."""
        return sum(member.blocks for member in self.stat().members)

    def read_bytes(self) -> int:
        """What was read from it so far."""
        return sum(member.read_bytes for member in self.stat().members)

    def checksum_errors(self) -> int:
        return self.stat().checksum_errors

    def wait_for_blocks(self, count: int) -> None:
        wait_until(lambda: self.blocks() >= count, f"{count} blocks in the pool")


START_S = 400.0  # two servers that start at once on two busy cores
SERVER_FLAGS = (
    *("--dtype", "float32", "--block-size", str(VLLM_BLOCK), "--kv-cache-memory-bytes", str(KV_BYTES)),
    *("--max-model-len", str(MAX_TOKENS), "--enforce-eager", "--served-model-name", "tiny", "--host", "127.0.0.1"),
)


class ServerProcess:
    """A real vLLM server: `command` up to the model, on a port of its own."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"}
        self._log = log
        self._client = httpx.Client(base_url=self.url, timeout=WAIT_S)
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [*command, *SERVER_FLAGS, "--port", str(self.port)],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    def log(self) -> str:
        return self._log.read_text()

    def wait_ready(self) -> None:
        def ready() -> bool:
            assert self.process.poll() is None, self.log()[-4000:]
            with contextlib.suppress(httpx.TransportError):
                return self._client.get("/health", timeout=5.0).status_code == 200
            return False

        wait_until(ready, f"the server is ready: {self.log()[-2000:]}", START_S, look_every_s=0.5)

    def complete(self, prompt: Sequence[int], new_tokens: int = 12, **more: Any) -> str:
        """The text that follows, over the OpenAI API."""
        body = {"model": "tiny", "prompt": list(prompt), "max_tokens": new_tokens, "temperature": 0, "ignore_eos": True}
        answer = self._client.post("/v1/completions", json=body | more)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["text"])

    def metrics(self) -> dict[str, float]:
        """The samples of /metrics by name, labels added up."""
        found: dict[str, float] = {}
        for line in self._client.get("/metrics").text.splitlines():
            if not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                name = name.partition("{")[0]
                found[name] = found.get(name, 0.0) + float(value)
        return found

    def external_hits(self) -> int:
        return int(self.metrics()["vllm:external_prefix_cache_hits_total"])

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """End it; whatever of its process group is left after a while is killed."""
        self._client.close()
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            self.process.wait(WAIT_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
