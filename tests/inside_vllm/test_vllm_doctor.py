"""`penstock doctor --vllm` against real configurations, good ones and each misconfiguration it is there for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

from penstock.doctor import vllm_checks
from penstock.doctor.check import Check
from penstock.doctor.vllm_checks import examine_vllm
from penstock.vllm.flags import SCHEDULER, connector_config
from tests.inside_vllm.vllm_rig import PoolProcess

FLAGS = ["--dtype", "float32", "--block-size", "32", "--max-model-len", "512"]


@pytest.fixture(scope="module", autouse=True)
def the_log_level_stays() -> Any:
    import logging

    level = logging.getLogger("vllm").level
    yield
    logging.getLogger("vllm").setLevel(level)


def serve(model: Path, config: dict[str, Any] | None, *more: str, scheduler: bool = True) -> list[str]:
    words = ["vllm", "serve", str(model), *FLAGS, *more]
    if config is not None:
        words += ["--kv-transfer-config", json.dumps(config)]
    return [*words, "--scheduler-cls", SCHEDULER] if scheduler else words


def found(words: list[str]) -> dict[str, Check]:
    return {check.name: check for check in examine_vllm(words)}


def test_a_good_configuration_has_no_problem(llama: Path, pool_process: Callable[..., PoolProcess]) -> None:
    pool = pool_process("--memory", "16MiB")
    checks = found(serve(llama, connector_config({"pool": pool.address})))
    assert all(check.status == "ok" for check in checks.values()), checks
    assert "1 members" in checks[f"pool {pool.address}"].found and "blocks of 64 tokens" in checks["settings"].found
    assert found(["penstock", "vllm", str(llama), *FLAGS, "--pool", pool.address]) == checks


@pytest.mark.parametrize(
    ("change", "name", "words"),
    [
        ({"kv_connector": "LMCacheConnectorV1"}, "connector in use", "does nothing on a CPU"),
        ({"kv_connector": "ExampleConnector"}, "connector in use", "without PenstockConnector"),
        ({"kv_connector_extra_config": {}}, "settings", "no pool is named"),
        ({"kv_connector_extra_config": {"memory": "1GiB", "fetch_timeout": 3}}, "settings", "'fetch_timeout'"),
        ({"kv_connector_extra_config": {"memory": "1GiB", "block_tokens": 48}}, "settings", "a multiple of"),
        ({"kv_connector_extra_config": {"memory": "1GiB", "staging": "1MiB"}}, "settings", "staging for 8"),
        ({"kv_connector_extra_config": {"pool": "127.0.0.1:9"}}, "pool 127.0.0.1:9", "127.0.0.1:9"),
    ],
    ids=["lmcache-on-cpu", "other-connector", "no-pool", "wrong-key", "block-size", "staging", "nobody-there"],
)
def test_a_connector_that_would_not_do(change: dict[str, Any], name: str, words: str, llama: Path) -> None:
    config = connector_config({"memory": "1GiB"}) | change
    if "Penstock" not in config["kv_connector"]:
        del config["kv_connector_module_path"]
    check = found(serve(llama, config))[name]
    assert check.status == "problem" and words in check.found and check.advice, check


@pytest.mark.parametrize(
    ("flags", "name", "status", "words"),
    [
        (["--no-enable-prefix-caching"], "prefix caching", "problem", "off"),
        (["--disable-hybrid-kv-cache-manager"], "hybrid allocator", "problem", "sliding window of 64"),
        (["--no-such-flag"], "configuration", "problem", "--no-such-flag"),
        (["--max-model-len", "1000000"], "configuration", "problem", "max_model_len"),
    ],
    ids=lambda value: value[0].removeprefix("--") if isinstance(value, list) else "",
)
def test_flags_that_take_the_cache_away(
    flags: list[str], name: str, status: str, words: str, model: Callable[[str], Path]
) -> None:
    check = found(serve(model("sliding"), connector_config({"memory": "1GiB"}), *flags))[name]
    assert check.status == status and words in check.found and check.advice, check


def test_no_connector_and_vllms_own_scheduler(llama: Path) -> None:
    checks = found(serve(llama, None, scheduler=False))
    assert checks["connector in use"].status == "problem" and "without the pool" in checks["connector in use"].found
    assert checks["scheduler"].status == "note" and SCHEDULER in checks["scheduler"].advice


def test_a_multi_connector_must_recompute_by_itself(llama: Path) -> None:
    config = {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"connectors": [connector_config({"memory": "1GiB"})]},
    }
    checks = found(serve(llama, config))
    assert checks["connector in use"].status == "ok" and checks["settings"].status == "ok"
    assert checks["load failures"].status == "problem" and "ends its request" in checks["load failures"].found
    assert found(serve(llama, config | {"kv_load_failure_policy": "recompute"}))["load failures"].status == "ok"


def test_an_outer_connector_that_only_produces_is_a_problem_where_steps_overlap(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.config import VllmConfig

    config = {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_producer",
        "kv_connector_extra_config": {"connectors": [connector_config({"memory": "1GiB"})]},
    }
    assert found(serve(llama, config))["connector in use"].status == "note"
    monkeypatch.setattr(VllmConfig, "max_concurrent_batches", property(lambda config: 2))
    check = found(serve(llama, config))["connector in use"]
    assert check.status == "problem" and "kv_both" in check.advice


def test_connectors_that_want_different_layouts_need_a_choice(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, beside NIXL: vLLM would refuse to start."""
    from penstock.vllm import compat

    nixl = {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": "cpu"}
    config = {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"connectors": [nixl, connector_config({"memory": "1GiB"})]},
    }
    assert found(serve(llama, config))["cache layout"].found == "LBHNC", "on a CPU Penstock asks for none"
    monkeypatch.setattr(compat, "wanted_layout", lambda: "BLHNC")
    check = found(serve(llama, config))["cache layout"]
    assert check.status == "problem" and "mismatch" in check.found and "VLLM_KV_CACHE_LAYOUT" in check.advice
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", "LBHNC")
    assert found(serve(llama, config))["cache layout"].status == "ok"


def test_memory_alone_is_worth_a_note(llama: Path) -> None:
    assert found(serve(llama, connector_config({"memory": "1GiB"})))["pool"].status == "note"


def test_a_node_that_hangs(
    llama: Path, pool_process: Callable[..., PoolProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_checks, "POOL_TIMEOUT_S", 0.5)
    pool = pool_process("--memory", "16MiB")
    pool.send(signal.SIGSTOP)
    try:
        check = found(serve(llama, connector_config({"pool": pool.address})))[f"pool {pool.address}"]
        assert check.status == "problem" and "penstock pool" in check.advice
    finally:
        pool.send(signal.SIGCONT)


def test_other_versions_and_companions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.version.__version__", "0.99.0")
    installed = vllm_checks.check_installed()
    assert installed.status == "problem" and "0.99.0 is untested" in installed.found
    versions = {"torch": "2.13.0+cpu", "torchvision": "0.28.0"}

    def version(name: str) -> str:
        if name not in versions:
            raise PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(vllm_checks, "version", version)
    check = vllm_checks.check_companions()
    assert check.status == "problem" and "torchvision 0.28.0" in check.found and "pip uninstall" in check.advice
    assert vllm_checks.check_command().status == "problem" and "LLM() does" in vllm_checks.check_command().found


def test_the_command_ends_with_a_status(llama: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "penstock", "doctor", "--vllm", "--json", str(tmp_path / "found.json")]
    environment = os.environ | {"COLUMNS": "200"}
    good = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert good.returncode == 0 and "problems: none" in good.stdout, good
    words = serve(llama, connector_config({"pool": "127.0.0.1:9"}))
    bad = subprocess.run([*command, "--", *words], capture_output=True, text=True, timeout=300, env=environment)
    assert bad.returncode == 1 and "problems: pool 127.0.0.1:9" in bad.stdout, bad
    record = json.loads((tmp_path / "found.json").read_text())
    assert record["usable"] is False and record["checks"][-1]["name"] == "pool 127.0.0.1:9"
