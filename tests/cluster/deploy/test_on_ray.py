"""A cluster on Ray: two raylets on this machine, processes placed by their resources, started again when they die."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from penstock.cluster.deploy.cluster_config import ProcessSpec, read_cluster_config
from penstock.cluster.deploy.up_command import _make_secret
from penstock.process.supervised import StartFailed

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'penstock[ray]'")

WAIT_S = 240.0
CLUSTER = """
model = "{model}"
[router]
port = 0
[[pool]]
memory = ["16MiB"]
[serve]
kv_memory = "4MiB"
staging = "2MiB"
block_tokens = 16
[[engine]]
role = "prefill"
node = "a"
python = "{python}"
ray = {{ num_cpus = 1, resources = {{ host_a = 1 }} }}
[[engine]]
role = "decode"
node = "b"
buffer = "4MiB"
ray = {{ num_cpus = 1, resources = {{ host_b = 1 }} }}
"""


@pytest.fixture
def raylets(tmp_path: Path) -> Iterator[str]:
    """The address of a Ray cluster of two raylets in local mode."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 2, "resources": {"host_a": 2}, "object_store_memory": 80 << 20,
                        "include_dashboard": False},
    )  # fmt: skip
    try:
        cluster.add_node(num_cpus=2, resources={"host_b": 2}, object_store_memory=80 << 20)
        cluster.wait_for_nodes()
        yield cluster.address
    finally:
        ray.shutdown()
        cluster.shutdown()


def answer(url: str) -> list[int]:
    body = {"prompt": list(range(6, 60)), "max_tokens": 8, "temperature": 0, "return_token_ids": True}
    response = httpx.post(f"{url}/v1/completions", json=body, timeout=60.0)
    assert response.status_code == 200, response.text
    tokens: list[int] = response.json()["choices"][0]["token_ids"]
    return tokens


@pytest.mark.slow
def test_two_raylets_serve_and_start_again_what_dies(
    raylets: str, tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder with a file that has the name of a module: neither actors nor their processes execute it."""
    from penstock.cluster.deploy.on_ray import RaySupervisor

    (tmp_path / "xxhash.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'a').write('x')\n")
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "cluster.toml"
    python = tmp_path / "python"  # as that of another environment, which has vLLM and no Ray
    python.write_text(f'#!/bin/sh\necho started >> {tmp_path}/started\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    file.write_text(CLUSTER.format(model=llama, python=python))
    config = read_cluster_config(file)
    assert config.secret_file is not None
    _make_secret(config.secret_file)
    lines: list[str] = []
    supervisor = RaySupervisor(config.processes, lambda name, line: lines.append(f"{name} | {line}"), raylets)

    def until_serving() -> None:
        end = time.monotonic() + WAIT_S
        while True:
            supervisor.watch()
            if all(one.ready for one in supervisor.known.values()):
                health = httpx.get(f"{supervisor.url}/health", timeout=10.0)
                if health.status_code == 200:
                    return
            assert time.monotonic() < end, "\n".join(lines[-30:])
            time.sleep(0.2)

    try:
        supervisor.start(WAIT_S)
        until_serving()
        first = answer(supervisor.url)
        decode = supervisor.known["decode-1"]
        before = decode.pid
        os.kill(before, signal.SIGKILL)  # the process: its actor starts it again
        end = time.monotonic() + WAIT_S
        while decode.pid == before or not decode.ready:
            assert time.monotonic() < end, "\n".join(lines[-30:])
            supervisor.watch()
            time.sleep(0.1)
        until_serving()
        assert answer(supervisor.url) == first and decode.restarts == 1
        prefill = supervisor.known["prefill-0"]
        before = prefill.pid
        ray.kill(prefill.actor, no_restart=False)  # the actor: Ray starts it again, and its process died with it
        end = time.monotonic() + WAIT_S
        while prefill.pid == before or not prefill.ready:
            assert time.monotonic() < end, "\n".join(lines[-30:])
            supervisor.watch()
            time.sleep(0.1)
        until_serving()
        assert answer(supervisor.url) == first
        prefill.actor.start.remote({"router": ["127.0.0.1:9"], "pool": ["127.0.0.1:9"]})  # as before these moved
        end = time.monotonic() + WAIT_S
        while not any("has moved" in line for line in lines):
            assert time.monotonic() < end, "\n".join(lines[-30:])
            supervisor.watch()
            time.sleep(0.1)
        until_serving()
        assert answer(supervisor.url) == first
        assert not (tmp_path / "executed").exists()
        started = (tmp_path / "started").read_text()  # by each of the prefill engine's actors, and for other addresses
        assert started in ("started\n" * 3, "started\n" * 4)  # with the first of these it may have had no time
    finally:
        supervisor.stop()


WITH_VLLM = """
model = "{model}"
[router]
port = 0
[[pool]]
memory = ["16MiB"]
[[engine]]
engine = "vllm"
python = "{python}"
ray = {{ num_cpus = 1, resources = {{ host_b = 1 }} }}
"""


@pytest.mark.slow
def test_what_is_missing_on_a_machine_is_said_at_once(raylets: str, tmp_path: Path, llama: Path) -> None:
    """With the process, the machine and the reason, long before everything had to be ready."""
    from penstock.cluster.deploy.on_ray import RaySupervisor

    file = tmp_path / "cluster.toml"
    missing = tmp_path / "no" / "python"
    cases = [(missing, rf"cannot be started: .*{missing}")]
    if importlib.util.find_spec("vllm") is None:
        cases.append((Path(sys.executable), r"ended with status 1: .*vLLM is not installed here"))
    for python, why in cases:
        file.write_text(WITH_VLLM.format(model=llama, python=python))
        config = read_cluster_config(file)
        assert config.secret_file is not None
        _make_secret(config.secret_file)
        supervisor = RaySupervisor(config.processes, lambda name, line: None, raylets)
        with pytest.raises(StartFailed, match=rf"^mixed-0 on [\d.]+ {why}"):
            supervisor.start(WAIT_S)
    broken = ProcessSpec("pool-0", "pool", ("pool",), None)  # type: ignore[arg-type]
    with pytest.raises(StartFailed, match=r"^pool-0 cannot be started: TypeError"):  # as without Penstock there
        RaySupervisor([broken], lambda name, line: None, raylets).start(WAIT_S)
