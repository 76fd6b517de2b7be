"""Prefill and decode by stock vLLMs on a Ray node: Ray in one environment, vLLM in another, as `python` names it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.inside_vllm.cluster_rig import BLOCK_BYTES, ENVIRONMENT, VLLM_FLAGS, client_of, free_port
from tests.inside_vllm.vllm_rig import BLOCK, START_S, prompt_of, wait_until

RAY = Path(__file__).parents[2] / ".venv" / "bin"  # the environment of `make test`
TOKENS = 6 * BLOCK + 9
NEW = 12
CLUSTER = """
model = "{model}"
[router]
port = 0
served_model_name = "tiny"
lease_s = 15.0
[[pool]]
memory = ["64MiB"]
{engines}
"""
ENGINE = """
[[engine]]
engine = "vllm"
name = "{role}"
role = "{role}"
node = "host-{role}"
python = "{python}"
staging = "48MiB"
{buffer}
vllm = [{flags}]
ray = {{ resources = {{ host = 1 }} }}
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (RAY / "ray").exists(), reason="Ray is not installed here (make venv)"),
    pytest.mark.timeout(1500),
]


@pytest.fixture
def raylet() -> Iterator[str]:
    """The address of a Ray node on loopback, of this machine alone."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # Ray's sockets lie in it, with long names
        command = [
            str(RAY / "ray"),
            "start",
            "--head",
            "--block",
            "--node-ip-address",
            "127.0.0.1",
            "--port",
            str(port),
        ]
        command += ["--num-cpus", "4", "--resources", '{"host": 2}', "--object-store-memory", str(80 << 20)]
        command += ["--include-dashboard", "false", "--disable-usage-stats", "--temp-dir", folder]
        with (Path(folder) / "start.log").open("w+") as log:
            ray = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | ENVIRONMENT)
        try:
            text = Path(log.name)
            wait_until(lambda: "Ray runtime started" in text.read_text(), "a Ray node", START_S, look_every_s=0.1)
            yield f"127.0.0.1:{port}"
        finally:
            _end(ray)


class Up:
    """`penstock up --on ray` of a prefill and a decode engine."""

    def __init__(self, model: Path, address: str, folder: Path) -> None:
        self._log = folder / "up.log"
        flags = ", ".join(f'"{word}"' for word in VLLM_FLAGS)
        engines = [
            ENGINE.format(role=role, python=sys.executable, flags=flags, buffer=buffer)
            for role, buffer in (("prefill", ""), ("decode", f'buffer = "{20 * BLOCK_BYTES}B"'))
        ]
        file = folder / "cluster.toml"
        file.write_text(CLUSTER.format(model=model, engines="".join(engines)))
        command = [
            str(RAY / "python"),
            "-P",
            "-m",
            "penstock",
            "up",
            str(file),
            "--on",
            "ray",
            "--ray-address",
            address,
        ]
        with self._log.open("w") as log:
            self.process = subprocess.Popen([*command, "--ready-s", str(START_S)], stdout=log, stderr=log)

    def wait_ready(self) -> str:
        """Returns the URL of the router's API."""

        def ready() -> bool:
            assert self.process.poll() is None, self.log()[-4000:]
            return " is up: " in self.log()

        wait_until(ready, "the cluster is up", START_S, look_every_s=0.2)
        found = re.search(r" is up: (http://\S+)", self.log())
        assert found is not None
        return found[1]

    def log(self) -> str:
        return self._log.read_text()

    def agent(self, role: str) -> psutil.Process:
        """The newest process of an engine of this cluster."""
        folder = str(self._log.parent)
        found = []
        for one in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                words = one.cmdline()
                if "vllm-engine" in words and role in words and any(folder in word for word in words):
                    found.append(one)
        return max(found, key=lambda one: one.create_time())


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(90.0)
    process.kill()
    process.wait(10.0)


def test_two_vllms_on_a_ray_node_answer_as_one_and_come_back_with_their_actor(
    llama: Path, computed: Callable[..., list[list[int]]], raylet: str, tmp_path: Path
) -> None:
    prompts = [prompt_of(seed, TOKENS) for seed in range(31, 35)]
    expected = computed("llama", prompts, NEW)
    up = Up(llama, raylet, tmp_path)
    try:
        client = httpx.Client(base_url=up.wait_ready(), timeout=120.0)

        def ask(prompt: list[int]) -> list[int]:
            body = {"model": "tiny", "prompt": prompt, "max_tokens": NEW, "temperature": 0, "ignore_eos": True}
            answer = client.post("/v1/completions", json=body | {"return_token_ids": True})
            assert answer.status_code == 200, answer.text
            tokens: list[int] = answer.json()["choices"][0]["token_ids"]
            return tokens

        wait_until(lambda: client.get("/health").status_code == 200, "the router has its engines")
        assert [ask(prompt) for prompt in prompts[:2]] == expected[:2]
        with client_of(up.agent("decode").children()[0]) as vllm:
            loaded = re.search(r"^vllm:external_prefix_cache_hits_total\S* (\S+)$", vllm.get("/metrics").text, re.M)
        assert loaded is not None and float(loaded[1]) == 2 * 6 * BLOCK, "prefill handed every full block over"
        before = up.agent("prefill")
        actor = before.parent()
        assert actor is not None and "ProcessActor" in " ".join(actor.cmdline())
        below = before.children(recursive=True)
        actor.kill()  # its engine ends with it; Ray starts the actor again, and that the engine
        _, left = psutil.wait_procs([before, *below], timeout=60.0)
        assert not left
        serves = "engine prefill (prefill) listening on"
        wait_until(lambda: up.log().count(serves) == 2, "the engine is back", START_S, look_every_s=0.2)
        wait_until(lambda: client.get("/health").status_code == 200, "the router has its engines again")
        assert up.agent("prefill").pid != before.pid
        assert [ask(prompt) for prompt in prompts[2:]] == expected[2:]
        assert "its actor is gone, Ray starts it again" in up.log()
    finally:
        _end(up.process)
    assert up.process.returncode == 0, up.log()[-4000:]
