"""Beside vLLM's own NIXL connector in a MultiConnector, on CPUs: prefill and decode by NIXL, and what is in the pool by
Penstock."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from penstock.vllm.flags import SCHEDULER, connector_config
from tests.inside_vllm.vllm_rig import BLOCK, PoolProcess, ServerProcess, prompt_of

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("nixl") is None, reason="NIXL is not installed here"),
    pytest.mark.timeout(900),
]
TOKENS = 6 * BLOCK + 9
NEW = 12


@pytest.fixture(scope="module")
def servers(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, ...]]:
    folder = tmp_path_factory.mktemp("nixl")
    pool = PoolProcess("--memory", "64MiB")
    ours = connector_config({"pool": pool.address, "staging": "32MiB", "load_always": True})
    nixl = {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": "cpu"}
    config = {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"connectors": [ours, nixl]},
    }
    started = []
    try:
        with pytest.MonkeyPatch.context() as patch:
            for number, role in enumerate(("prefill", "decode")):
                patch.setenv("VLLM_NIXL_SIDE_CHANNEL_HOST", "127.0.0.1")
                patch.setenv("VLLM_NIXL_SIDE_CHANNEL_PORT", str(21_000 + os.getpid() % 5000 + 10 * number))
                command = [str(Path(sys.executable).parent / "vllm"), "serve", str(llama), "--scheduler-cls", SCHEDULER]
                command += ["--kv-transfer-config", json.dumps(config)]
                started.append(ServerProcess(command, folder / f"{role}.log"))
        for one in started:
            one.wait_ready()
        yield (*started, pool)
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


def test_nixl_pulls_what_is_handed_over_and_the_pool_serves_the_rest(servers: tuple[Any, ...]) -> None:
    prefill, decode, pool = servers
    for seed in (1, 2):
        prompt = prompt_of(seed, TOKENS)
        first, handed = ask(
            prefill,
            prompt,
            1,
            do_remote_decode=True,
            do_remote_prefill=False,
            remote_engine_id=None,
            remote_block_ids=None,
            remote_host=None,
            remote_port=None,
        )
        assert handed["do_remote_prefill"], handed
        pool.wait_for_blocks(6 * seed)
        hits = decode.external_hits()
        pulled, _ = ask(decode, prompt, NEW, **handed)
        assert pulled[:1] == first
        assert decode.external_hits() - hits >= TOKENS - 1 and pool.read_bytes() == 0, "NIXL pulled all of it"
        assert ask(prefill, prompt)[0] == pulled
    unknown = prompt_of(3, TOKENS)
    computed, _ = ask(prefill, unknown)
    pool.wait_for_blocks(18)
    hits = decode.external_hits()
    assert ask(decode, unknown)[0] == computed
    assert decode.external_hits() - hits == 6 * BLOCK and pool.read_bytes() > 0, "the pool had it"
