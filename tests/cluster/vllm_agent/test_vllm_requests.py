"""What an agent gives to vLLM: arguments, bodies, salts; and how it says why vLLM ended."""

from __future__ import annotations

import importlib.util
import json
import signal
from pathlib import Path
from typing import Any

import pytest

from penstock.cluster.vllm_agent.agent_flags import AgentFlags, child_arguments
from penstock.cluster.vllm_agent.child_vllm import ChildVllm
from penstock.cluster.vllm_agent.vllm_requests import api_body_of, body_of, root_of, salt_of
from penstock.core.config import ConfigError
from penstock.core.keys import root_key
from penstock.engine.api import ApiCall, GenerationRequest, InvalidRequest
from penstock.engine.runner import SamplingParams
from penstock.engine.shaping import Shaping
from penstock.vllm.command import arguments_of
from penstock.vllm.flags import connector_extra, value_of
from tests.waiting import wait_until

FLAGS: dict[str, Any] = {"router": "127.0.0.1:7100", "pool": ("127.0.0.1:7070", "127.0.0.1:7071")}
PRINTABLE = bytes(range(16))


def request(**more: Any) -> GenerationRequest:
    return GenerationRequest("r#1", [1, 2, 3], SamplingParams(max_tokens=5, temperature=0.5), **more)


def test_the_childs_arguments_are_those_of_penstock_vllm(tmp_path: Path) -> None:
    flags = AgentFlags(**FLAGS, secret_file=tmp_path / "secret", pool_key_file=tmp_path / "key", staging_bytes=1 << 24)
    words = child_arguments(flags, ["/m/tiny", "--dtype", "float32", "--policy", "fcfs"], 8123, tmp_path / "socket")
    serve = arguments_of(words)
    extra = connector_extra(serve)
    assert serve[0] == "/m/tiny" and extra is not None
    assert extra == {
        "agent": f"{tmp_path}/socket", "pool": list(FLAGS["pool"]), "secret_file": f"{tmp_path}/secret",
        "pool_key_file": f"{tmp_path}/key", "staging": "16777216B", "policy": "fcfs",
    }  # fmt: skip
    for flag, value in {"--host": "127.0.0.1", "--port": "8123", "--served-model-name": "tiny"}.items():
        assert value_of(serve, flag) == value
    assert "--enable-scale-out" in serve and value_of(serve, "--scheduler-cls") is not None


@pytest.mark.parametrize("word", ["--kv-transfer-config", "--data_parallel_size=2", "-dp", "--uds", "--ssl-keyfile"])
def test_what_an_agent_sets_or_cannot_serve_with_is_refused(word: str) -> None:
    with pytest.raises(ConfigError, match="allowed: leaving it out"):
        child_arguments(AgentFlags(**FLAGS), ["/m", word, "x"], 1, Path("/s"))


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"router": None}, "router is not given"),
        ({"router": "nowhere"}, "router: "),
        ({"pool": ()}, "no pool is named"),
        ({"pool_config": Path("x")}, "allowed: one of the two"),
        ({"relay_transport": "nixl"}, "allowed with vLLM: tcp"),
        ({"relay_listen": "x"}, "relay_listen: "),
        ({"role": "decode", "sidecars": True}, "allowed: with role prefill"),
        ({"role": "prefill", "sidecars": True}, "without secret_file"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(changed: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        AgentFlags(**(FLAGS | changed))


def test_a_tenant_is_a_salt_that_vllm_takes() -> None:
    assert (salt_of(""), salt_of("alice"), salt_of("a" * 128)) == ("", "alice", "a" * 128)
    odd = ["a\0b", "a@b", "a/b", "a\\b", "a" * 129]
    salts = {salt_of(one) for one in odd}
    assert len(salts) == len(odd) and all(len(one) <= 128 and not set("@/\\\0") & set(one) for one in salts)


def test_block_keys_begin_as_the_connectors_do() -> None:
    """As `penstock.vllm.compat.salt_of` writes a salt; tests/inside_vllm compares the keys themselves."""
    assert root_of(PRINTABLE, "") == root_key(PRINTABLE, "")
    assert root_of(PRINTABLE, 'a "b"') == root_key(PRINTABLE, '["a \\"b\\"",[]]')


def test_a_body_has_what_the_request_asks_for() -> None:
    shaping = Shaping(min_tokens=6, logit_bias=((4, 1.5),), stop_token_ids=(9,))
    sampling = SamplingParams(max_tokens=5, temperature=0.5, top_k=3, seed=7, ignore_eos=True, shaping=shaping)
    made = GenerationRequest("r#1", [1, 2, 3], sampling, 2.0, "alice", waited_s=0.5, first_index=2)
    body = body_of(made, {"penstock": {}})
    assert body["kv_transfer_params"] == {"penstock": {}, "slo_ttft_ms": 1500.0}
    assert (body["request_id"], body["token_ids"], body["cache_salt"], body["stream"]) == (
        "r#1",
        [1, 2, 3],
        "alice",
        True,
    )
    said = body["sampling_params"]
    assert (said["max_tokens"], said["temperature"], said["top_k"], said["seed"]) == (5, 0.5, 3, 7)
    assert (said["min_tokens"], said["logit_bias"], said["stop_token_ids"]) == (4, {"4": 1.5}, [9])
    assert (
        "kv_transfer_params" not in body_of(request(), {}) and "seed" not in body_of(request(), {})["sampling_params"]
    )


def test_a_clients_body_keeps_what_is_the_clients() -> None:
    given = {"prompt": "x", "tools": [1], "model": "m", "cache_salt": "mallory", "kv_transfer_params": {"a": 1}}
    call = ApiCall("/v1/completions", json.dumps(given | {"slo_ttft_ms": 5}).encode())
    body = api_body_of(request(api=call, tenant="alice"), {"penstock": {"token": "t"}})
    assert body == {
        "prompt": "x", "tools": [1], "cache_salt": "alice", "kv_transfer_params": {"penstock": {"token": "t"}},
    }  # fmt: skip
    with pytest.raises(InvalidRequest):
        api_body_of(request(api=ApiCall("/v1/completions", b"[1]")), {})


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is here: it would start")
def test_why_the_child_ended_is_one_line() -> None:
    lines: list[str] = []
    child = ChildVllm(["/no/model"], {}, lines.append)
    wait_until(lambda: child.ended() is not None, "it ends")
    assert str(child.ended()).startswith("vLLM ended with status 2: penstock vllm: error: vLLM is not installed here")
    assert lines and lines[-1].startswith("penstock vllm: error")
    child.stop(1.0)


def test_a_child_that_is_killed_is_said_to_be() -> None:
    child = ChildVllm(["--help"], {}, lambda line: None)
    with_signal = signal.Signals.SIGKILL
    child.stop(0.0)
    assert child.ended() in (f"vLLM was ended by {with_signal.name}", "vLLM was ended by SIGTERM")
