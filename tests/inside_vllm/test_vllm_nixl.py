"""Beside vLLM's own NIXL connector in a MultiConnector, on CPUs: prefill and decode by NIXL over UCX on loopback, and
what is in the pool by Penstock. NIXL is that of the environment of `make test`."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from penstock.vllm.flags import SCHEDULER, connector_config
from tests.inside_vllm.cluster_rig import free_port
from tests.inside_vllm.vllm_rig import BLOCK, PoolProcess, ServerProcess, prompt_of

BUILD = next(iter((Path(__file__).parents[2] / ".venv").glob("lib/python*/site-packages/nixl_cu12")), None)
TOKENS = 6 * BLOCK + 9
NEW = 12
PREFILLS = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
BACK = {"remote_engine_id": "d", "remote_request_id": "r", "remote_host": "127.0.0.1", "remote_port": 1}
FRONT = {
    "nixl/__init__.py": "from nixl_cu12 import _api, _bindings\n",
    "nixl/_api.py": "from nixl_cu12._api import *\nfrom nixl_cu12._api import nixl_agent, nixl_agent_config\n",
    "nixl/_bindings.py": "from nixl_cu12._bindings import *\nfrom nixl_cu12._bindings import nixlXferTelemetry\n",
}


@dataclass
class Pair:
    """A prefill and a decode instance, and the pool of both."""

    prefill: ServerProcess
    decode: ServerProcess
    pool: PoolProcess


def nixl_beside(folder: Path) -> str:
    """A module path with NIXL: its build, and the package `nixl` that chooses one."""
    assert BUILD is not None
    for name, text in FRONT.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    for part in BUILD.parent.glob("nixl_cu12*"):
        (folder / part.name).symlink_to(part)
    return os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])


@pytest.fixture
def pair(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    monkeypatch.setenv("PYTHONPATH", nixl_beside(tmp_path))
    monkeypatch.setenv("VLLM_NIXL_SIDE_CHANNEL_HOST", "127.0.0.1")
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", "LBHNC")  # as on a GPU
    monkeypatch.setenv("UCX_NET_DEVICES", "lo")
    pool = PoolProcess("--memory", "64MiB")
    ours = connector_config({"pool": pool.address, "staging": "32MiB", "load_always": True, "lookup_timeout_s": 200.0})
    nixl = {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": "cpu"}
    config = {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"connectors": [nixl, ours]},
    }
    started = []
    try:
        for role in ("prefill", "decode"):
            monkeypatch.setenv("VLLM_NIXL_SIDE_CHANNEL_PORT", str(free_port()))
            command = [str(Path(sys.executable).parent / "vllm"), "serve", str(llama), "--scheduler-cls", SCHEDULER]
            command += ["--kv-transfer-config", json.dumps(config)]
            started.append(ServerProcess(command, tmp_path / f"{role}.log"))
        for one in started:
            one.wait_ready()
        yield Pair(started[0], started[1], pool)
    finally:
        for one in started:
            one.stop()
        pool.stop()


def ask(server: ServerProcess, prompt: list[int], tokens: int = NEW, **params: Any) -> tuple[list[int], dict[str, Any]]:
    """The tokens that follow, and vLLM's `kv_transfer_params` of the answer."""
    body = {"model": "tiny", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    body |= {"return_token_ids": True} | ({"kv_transfer_params": params} if params else {})
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    return found["choices"][0]["token_ids"], found.get("kv_transfer_params") or {}


@pytest.mark.slow
@pytest.mark.skipif(BUILD is None, reason="NIXL is not installed here (make venv)")
@pytest.mark.timeout(900)
def test_nixl_pulls_what_is_handed_over_and_the_pool_serves_the_rest(pair: Pair) -> None:
    prefill, decode, pool = pair.prefill, pair.decode, pair.pool
    for seed in (1, 2):
        prompt = prompt_of(seed, TOKENS)
        first, handed = ask(prefill, prompt, 1, **PREFILLS)
        assert handed["do_remote_prefill"], handed
        pool.wait_for_blocks(6 * seed)
        before = decode.external_hits()
        if seed == 2:
            pool.send(signal.SIGSTOP)  # who asks it now waits for 200 s
        try:
            pulled, _ = ask(decode, prompt, NEW, **handed)
        finally:
            pool.send(signal.SIGCONT)
        assert pulled[:1] == first
        assert decode.external_hits() - before >= TOKENS - 1 and pool.read_bytes() == 0, "NIXL pulled all of it"
        assert ask(prefill, prompt)[0] == pulled
    lost = prompt_of(4, TOKENS)
    first, handed = ask(prefill, lost, 1, **PREFILLS)
    pool.wait_for_blocks(18)
    again, _ = ask(decode, lost, NEW, **handed | {"remote_engine_id": "gone", "remote_port": free_port()})
    assert again == ask(prefill, lost)[0] and again[:1] == first
    assert pool.read_bytes() > 0, "the prefill instance is gone, and the pool has it"
    unknown = prompt_of(3, TOKENS)
    computed, _ = ask(prefill, unknown)
    pool.wait_for_blocks(24)
    before = decode.external_hits()
    assert ask(decode, unknown)[0] == computed
    assert decode.external_hits() - before == 6 * BLOCK, "the pool had it"
    assert decode.metrics()["vllm:penstock_fetched_blocks_total"] == 2 * 6, "our statistics beside NIXL's"


@pytest.mark.parametrize(
    "params",
    [
        None,
        {},
        {"slo_ttft_ms": 500},
        PREFILLS,
        {"do_remote_prefill": True},
        {"do_remote_decode": True, "remote_block_ids": [[1, 2]], "remote_num_tokens": TOKENS, **BACK},
        {"do_remote_decode": False, "remote_block_ids": [[1, 2]], "remote_num_tokens": TOKENS, **BACK},
    ],
)
def test_what_nixl_pulls_is_what_is_left_to_it(params: dict[str, Any] | None) -> None:
    """By NIXL's own scheduler, of which this asks one method that needs nothing else."""
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_scheduler import NixlPullConnectorScheduler

    from penstock.vllm.compat import is_pulled_by_another

    class Nixl(NixlPullConnectorScheduler):  # type: ignore[misc]
        def __init__(self) -> None:
            self.kv_recompute_threshold = 64

        def _prefill_backoff(self) -> int:
            return 0

    prompt = prompt_of(1, TOKENS)
    request: Any = SimpleNamespace(
        request_id="one", kv_transfer_params=params, prompt_token_ids=prompt, num_prompt_tokens=TOKENS
    )
    tokens, _ = Nixl().get_num_new_matched_tokens(request, 0)
    assert is_pulled_by_another(request) is (tokens > 0)
