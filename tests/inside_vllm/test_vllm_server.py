"""The servers that users start: `penstock vllm`, and stock `vllm serve` with flags, with one pool node between them."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from penstock.vllm.flags import SCHEDULER
from tests.inside_vllm.vllm_rig import BLOCK, PoolProcess, ServerProcess, prompt_of

pytestmark = pytest.mark.timeout(900)  # three servers start in here

SYSTEM = "You answer questions about one long document. " * 12
PROMPT = prompt_of(300, 6 * BLOCK + 5)
LOADABLE = 6 * BLOCK


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PoolProcess]:
    one = PoolProcess("--slab", f"{tmp_path_factory.mktemp('slab')}/kv.slab:64MiB")
    yield one
    one.stop()


def penstock_vllm(model: Path, address: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "penstock",
        "vllm",
        str(model),
        "--pool",
        address,
        "--staging",
        "32MiB",
        "--load-always",
    ]


def vllm_serve(model: Path, address: str) -> list[str]:
    """As docs/how-to/share-a-pool-between-vllm.md shows it."""
    config = {
        "kv_connector": "PenstockConnector",
        "kv_connector_module_path": "penstock.vllm.connector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"pool": address, "staging": "32MiB", "load_always": True},
    }
    command = [str(Path(sys.executable).parent / "vllm"), "serve", str(model)]
    return [*command, "--scheduler-cls", SCHEDULER, "--kv-transfer-config", json.dumps(config)]


@pytest.fixture(scope="module")
def servers(
    llama: Path, pool: PoolProcess, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[ServerProcess, ServerProcess]]:
    logs = tmp_path_factory.mktemp("logs")
    started = [
        ServerProcess(penstock_vllm(llama, pool.address), logs / "penstock-vllm.log"),
        ServerProcess(vllm_serve(llama, pool.address), logs / "vllm-serve.log"),
    ]
    try:
        for one in started:
            one.wait_ready()
        yield started[0], started[1]
    finally:
        for one in started:
            one.stop()


def test_what_one_server_computed_the_other_loads(
    servers: tuple[ServerProcess, ServerProcess], pool: PoolProcess
) -> None:
    first, second = servers
    computed = first.complete(PROMPT)
    pool.wait_for_blocks(LOADABLE // BLOCK)
    assert first.external_hits() == second.external_hits() == 0
    assert second.complete(PROMPT) == computed
    assert second.external_hits() == LOADABLE
    assert second.metrics()["vllm:prefix_cache_hits_total"] == 0
    assert second.complete(PROMPT) == computed  # now its own cache has it
    assert second.external_hits() == LOADABLE and second.metrics()["vllm:prefix_cache_hits_total"] >= LOADABLE


def test_chat_streams_with_a_deadline_and_a_tenant(servers: tuple[ServerProcess, ServerProcess]) -> None:
    body = {
        "model": "tiny",
        "messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "What is a penstock?"}],
        "max_tokens": 8,
        "temperature": 0,
        "ignore_eos": True,
        "cache_salt": "tenant-a",
        "kv_transfer_params": {"slo_ttft_ms": 500},
    }
    texts = []
    for server in servers:
        with httpx.stream(
            "POST", f"{server.url}/v1/chat/completions", json=body | {"stream": True}, timeout=60
        ) as reply:
            assert reply.status_code == 200
            lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line.startswith("data: {")]
        texts.append("".join(json.loads(line)["choices"][0]["delta"].get("content") or "" for line in lines))
    assert texts[0] and texts[0] == texts[1]


def test_the_connectors_metrics_are_on_the_servers_page(servers: tuple[ServerProcess, ServerProcess]) -> None:
    found = {name: value for name, value in servers[1].metrics().items() if "penstock" in name}
    assert found, sorted(servers[1].metrics())
    assert any(value > 0 for value in found.values())


def test_a_server_that_was_killed_loads_what_it_had_saved(
    servers: tuple[ServerProcess, ServerProcess], pool: PoolProcess, llama: Path, tmp_path: Path
) -> None:
    """And the pool node was started again meanwhile: its slab has every block that it had."""
    prompts = [prompt_of(seed, LOADABLE + 5) for seed in range(310, 316)]
    had = pool.blocks()
    computed = [servers[1].complete(prompt) for prompt in prompts]
    pool.wait_for_blocks(had + len(prompts) * LOADABLE // BLOCK)
    servers[1].stop(signal.SIGKILL)
    pool.stop()
    pool.start()
    assert pool.blocks() >= len(prompts) * LOADABLE // BLOCK
    server = ServerProcess(vllm_serve(llama, pool.address), tmp_path / "again.log")
    try:
        server.wait_ready()
        assert [server.complete(prompt) for prompt in prompts] == computed
        assert server.external_hits() == len(prompts) * LOADABLE
        assert server.metrics()["vllm:prefix_cache_hits_total"] == 0
    finally:
        server.stop()
