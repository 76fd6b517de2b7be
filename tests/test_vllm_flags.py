"""`penstock vllm`: which `vllm serve` command it becomes, and which flags it refuses. vLLM itself is not needed."""

from __future__ import annotations

import json
import shlex
from typing import Any

import pytest
from typer.testing import CliRunner

from penstock.cli import app
from penstock.vllm.flags import CONNECTOR, SCHEDULER, FlagError, connector_config, serve_arguments, value_of


def command_of(*arguments: str) -> list[str]:
    result = CliRunner().invoke(app, ["vllm", *arguments, "--print-command"])
    assert result.exit_code == 0, result.output
    words = shlex.split(result.stdout)
    assert words[:2] == ["vllm", "serve"]
    return words[2:]


def refused(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["vllm", *arguments])
    assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1 and not result.stdout
    return result.stderr


def transfer_of(arguments: list[str]) -> dict[str, Any]:
    given = value_of(arguments, "--kv-transfer-config")
    assert given is not None
    found: dict[str, Any] = json.loads(given)
    return found


def test_flags_of_vllm_are_passed_through_in_their_order_and_penstocks_go_into_the_connector() -> None:
    words = command_of(
        *["-tp", "2", "MODEL", "--pool", "a:1", "--port=8000", "--pool=b:2", "-O3", "--enforce-eager"],
        *["--staging", "1GiB", "--hf-overrides", '{"a b": 1}', "--fetch-timeout-s", "2.5", "--policy", "lstf"],
    )
    assert words[:8] == ["-tp", "2", "MODEL", "--port=8000", "-O3", "--enforce-eager", "--hf-overrides", '{"a b": 1}']
    extra = {"pool": ["a:1", "b:2"], "staging": "1GiB", "policy": "lstf", "fetch_timeout_s": 2.5}
    assert transfer_of(words) == connector_config(extra)
    assert transfer_of(words)["kv_load_failure_policy"] == "recompute"
    assert value_of(words, "--scheduler-cls") == SCHEDULER and len(words) == 12


def test_a_switch_goes_into_the_connector_only_when_it_is_given() -> None:
    extra = transfer_of(command_of("M", "--pool", "a:1", "--load-always"))["kv_connector_extra_config"]
    assert extra == {"pool": ["a:1"], "load_always": True}


def test_the_pool_key_is_named_and_never_shown() -> None:
    extra = transfer_of(command_of("M", "--pool", "a:1", "--pool-key-file", "/k"))["kv_connector_extra_config"]
    assert extra == {"pool": ["a:1"], "pool_key_file": "/k"}


def test_a_scheduler_of_the_users_stays() -> None:
    assert value_of(command_of("M", "--scheduler_cls", "mine.Scheduler"), "--scheduler-cls") == "mine.Scheduler"
    assert value_of(command_of("M", "--stock-scheduler"), "--scheduler-cls") is None
    assert "--stock-scheduler" in refused("M", "--stock-scheduler", "--scheduler-cls", "mine.Scheduler")


def test_without_a_pool_it_is_some_memory_of_this_process() -> None:
    assert transfer_of(command_of("M"))["kv_connector_extra_config"] == {"memory": ["1GiB"]}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--pool", "7070"], "pool is '7070'; address '7070' is not understood"),
        (["--policy", "best"], "policy is 'best'; allowed: fcfs"),
        (["--slab", "/a"], "slab is "),
        (["--staging", "much"], "staging is 'much'"),
        (["--pool", "a:1", "--pool-config", "p.toml"], "pool_config is set together with pool"),
        (["--fetch-timeout-s", "0"], "fetch_timeout_s is 0"),
    ],
)
def test_a_wrong_setting_is_refused_before_vllm_starts(arguments: list[str], words: str) -> None:
    assert words in refused("M", *arguments)


def test_a_transfer_config_that_names_penstock_is_completed() -> None:
    own = {"kv_connector": CONNECTOR, "kv_role": "kv_producer", "kv_connector_extra_config": {"policy": "edf"}}
    config = transfer_of(command_of("M", f"--kv-transfer-config={json.dumps(own)}", "--pool", "a:1"))
    assert config["kv_role"] == "kv_producer" and config["kv_connector_module_path"] == "penstock.vllm.connector"
    assert config["kv_connector_extra_config"] == {"policy": "edf", "pool": ["a:1"]}
    assert "policy is given as a flag and in" in refused(
        "M", "--kv-transfer-config", json.dumps(own), "--policy", "sjf"
    )


def test_a_multi_connector_is_left_as_it_is() -> None:
    inner = [{"kv_connector": "NixlConnector"}, connector_config({"pool": "a:1"})]
    text = json.dumps(
        {"kv_connector": "MultiConnector", "kv_role": "kv_both", "kv_connector_extra_config": {"connectors": inner}}
    )
    assert value_of(serve_arguments(["M", "--kv-transfer-config", text], {}), "--kv-transfer-config") == text
    assert "--pool is given together with a MultiConnector" in refused(
        "M", "--kv-transfer-config", text, "--pool", "b:1"
    )
    without_penstock = text.replace(CONNECTOR, "OtherConnector")
    assert "MultiConnector without PenstockConnector" in refused("M", "--kv-transfer-config", without_penstock)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--kv-transfer-config", "{"], "not JSON"),
        (["--kv-transfer-config", "[1]"], "a JSON object"),
        (["--kv-transfer-config", '{"kv_connector": "LMCacheConnectorV1"}'], "names LMCacheConnectorV1"),
        (["--kv-transfer-config.kv_connector", "X"], "all of it as JSON"),
        (["--kv-transfer-config", '{"kv_connector_extra_config": 3}'], "kv_connector_extra_config is 3"),
    ],
)
def test_what_contradicts_penstock_is_refused_in_one_line(arguments: list[str], words: str) -> None:
    assert words in refused("M", *arguments)
    with pytest.raises(FlagError):
        serve_arguments(arguments, {})


def test_without_vllm_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'penstock[vllm]'" in refused("M")
