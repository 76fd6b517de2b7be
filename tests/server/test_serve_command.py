"""`penstock serve`: flags and files that are refused in one line, and the real command with the real engine."""

from __future__ import annotations

import inspect
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import typer
from openai import OpenAI
from typer.testing import CliRunner

from penstock.cluster.engine.serve_command import serve
from penstock.cluster.engine.serve_flags import ServeFlags, engine_config, read_flags, server_settings
from penstock.core.config import ConfigError
from penstock.core.settings import settings_of
from penstock.engine.config import EngineConfig
from penstock.testing.tiny_models import build_tiny
from tests.server.certificates import make_certificate
from tests.server.raw_http import head_of
from tests.waiting import wait_until

APP = typer.Typer(pretty_exceptions_enable=False)
APP.command()(serve)
MODELLED = ["--executor", "modelled", "--bytes-divisor", "1024", "--kv-memory", "64KiB", "--staging", "1MiB"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny("llama", tmp_path_factory.mktemp("model"))


def test_flags_config_and_help_agree() -> None:
    former = {one.setting.formerly for one in settings_of(ServeFlags).values()}  # refused, and not shown
    in_help = set(inspect.signature(serve).parameters) - {"config"} - former
    assert in_help == set(settings_of(ServeFlags))
    assert {one.field.name for one in settings_of(ServeFlags).values()} == {one.name for one in fields(ServeFlags)}
    missing = set(settings_of(EngineConfig)) - in_help
    assert not missing and len(settings_of(EngineConfig)) == len(fields(EngineConfig))


def test_help_shows_every_flag() -> None:
    text = CliRunner().invoke(APP, ["--help"]).output
    for name in ("--port", "--policy", "--slab", "--api-key-file", "--max-context"):
        assert name in text


def test_defaults_are_the_engine_s() -> None:
    flags = read_flags({"model": "m"}, None)
    assert engine_config(flags) == EngineConfig(model="m")
    assert server_settings(flags).model_name == "m"


def test_command_line_goes_before_the_file(tmp_path: Path) -> None:
    file = tmp_path / "serve.toml"
    file.write_text('model = "m"\nport = 1\npolicy = "srpt"\nmemory = ["1MiB", "2MiB"]\nkv-memory = "3MiB"\n')
    flags = read_flags({"port": 2, "slab": ["/a:b:1KiB"], "api_key": None}, file)
    config = engine_config(flags)
    assert (flags.port, config.policy, config.memory, config.kv_memory_bytes) == (2, "srpt", (2**20, 2**21), 3 * 2**20)
    assert config.slab == (("/a:b", 1024),)


def test_key_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("secret\n")
    file.chmod(0o600)
    assert server_settings(read_flags({"model": "m", "api_key_file": str(file)}, None)).api_key == "secret"
    file.chmod(0o644)
    with pytest.raises(ConfigError, match=r"api_key_file .* cannot be read: others have access to it \(mode 644\)"):
        server_settings(read_flags({"model": "m", "api_key_file": str(file)}, None))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("policy = 'best'", "policy is 'best'; allowed: fcfs"),
        ("port = 70000", "port is 70000; allowed: 0 to 65535"),
        ("port = '80'", "port is '80'; allowed: int"),
        ("memory = 3", "memory is 3; allowed: str | array"),
        ("memory = [3]", r"memory is \[3\]; allowed: str"),
        ("colour = 1", "has 'colour'; allowed: model"),
        ("kv_memory = '3 apples'", "kv_memory: size '3 apples'"),
        ("slab = '/tmp/x'", "slab is '/tmp/x'; allowed: PATH:SIZE"),
        ("log_level = 'loud'", "log_level is 'loud'; allowed: debug"),
        ("request_timeout_s = 0", "request_timeout_s is 0"),
        ("api_key = ''", "api_key is empty"),
        ("api_key = 'a'\napi_key_file = 'b'", "one of them"),
        ("api_key_file = '/no/such'", "api_key_file /no/such cannot be read"),
        ("no_pool = true\nmemory = '1MiB'", "no_pool is set together"),
        ("= 1", "is not TOML"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "serve.toml"
    file.write_text("model = 'm'\n" + text)
    with pytest.raises(ConfigError, match=message):
        flags = read_flags({}, file)
        engine_config(flags)
        server_settings(flags)


def refusal(*arguments: str) -> str:
    """The one line that the command prints before it ends with status 2."""
    result = CliRunner().invoke(APP, list(arguments))
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return result.stderr


@pytest.mark.slow
def test_what_cannot_be_served_is_one_line(tmp_path: Path, checkpoint: Path) -> None:
    assert refusal() == (
        "penstock serve: error: model is empty; allowed: a checkpoint folder or a hub id (or executor 'modelled')\n"
    )
    assert "neither an existing folder nor a hub id" in refusal("/no/such/model", "--port", "0")
    assert "no config.json" in refusal(str(tmp_path), "--port", "0")
    assert "policy is 'best'" in refusal(str(checkpoint), "--policy", "best")
    assert "profile is 'none'" in refusal("--executor", "modelled", "--profile", "none", "--port", "0")
    assert "cannot be read" in refusal(str(checkpoint), "--config", "/no/such.toml")
    assert "host" in refusal(str(checkpoint), "--host", "999.1.1.1", "--port", "0")
    assert "Invalid value" in refusal(str(checkpoint), "--port", "many")
    assert "No such option" in refusal(str(checkpoint), "--nope")
    assert refusal(str(checkpoint), "--port", "0", "--kv-memory", "1KiB").count("\n") == 1
    assert "127.0.0.1:9" in refusal(str(checkpoint), "--port", "0", "--pool", "127.0.0.1:9")
    key = tmp_path / "pool.key"
    key.write_text("k" * 40)
    key.chmod(0o640)
    said = refusal(str(checkpoint), "--port", "0", "--pool-key-file", str(key))
    assert "mode 640" in said and "kkk" not in said and said.count("\n") == 1


def test_broken_tokenizer_is_one_line(tmp_path: Path, checkpoint: Path) -> None:
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "the tokenizer in" in refusal(str(tmp_path), "--port", "0")


def test_a_taken_port_is_one_line(checkpoint: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert f"port {port} on 127.0.0.1 is taken" in refusal(str(checkpoint), "--port", str(port))


@pytest.fixture(scope="module")
def served(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The real command with the real engine over an embedded pool."""
    slab = tmp_path_factory.mktemp("pool") / "kv.slab"
    command = [sys.executable, "-m", "penstock", "serve", str(checkpoint), "--port", "0", "--served-model-name", "tiny"]
    command += ["--memory", "16MiB", "--slab", f"{slab}:16MiB", "--kv-memory", "4MiB", "--staging", "2MiB"]
    command += ["--block-tokens", "16", "--drain-timeout-s", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        found = re.search(r"listening on (http://\S+)", process.stdout.readline())
        assert found, process.communicate(timeout=10)
        yield found[1], process
    finally:
        process.kill()
        process.communicate(timeout=10)


@pytest.mark.slow
def test_sigterm_ends_the_command_while_chats_render_for_ever(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text("{% if messages[0]['content'] == 'loop' %}" + loops + "{% endif %}")
    command = [sys.executable, "-m", "penstock", "serve", str(tmp_path), "--port", "0", *MODELLED]
    process = subprocess.Popen([*command, "--drain-timeout-s", "0.5"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        found = re.search(r"listening on http://(\S+):(\d+)", process.stdout.readline())
        assert found
        (renderer,) = psutil.Process(process.pid).children()
        body = b'{"messages": [{"role": "user", "content": "loop"}]}'
        head = head_of("POST", "/v1/chat/completions", len(body))
        before_s = renderer.cpu_times().user
        with socket.create_connection((found[1], int(found[2]))) as client:
            client.sendall(head + body)
            wait_until(
                lambda: not renderer.is_running() or renderer.cpu_times().user >= before_s + 0.2, "the chat is rendered"
            )
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        psutil.wait_procs([renderer], timeout=30)
        assert not renderer.is_running()
    finally:
        process.kill()
        process.communicate(timeout=30)


@pytest.mark.slow
def test_the_real_engine_serves_and_reuses(served: tuple[str, subprocess.Popen[str]]) -> None:
    client = OpenAI(base_url=f"{served[0]}/v1", api_key="none", max_retries=0, timeout=30)
    prompt = "The quick brown fox jumps over the lazy dog. " * 8
    extra = {"return_timing": True, "return_token_ids": True}
    asked: dict[str, Any] = {"model": "tiny", "prompt": prompt, "max_tokens": 12, "temperature": 0, "extra_body": extra}
    first, second = (client.completions.create(**asked) for _ in range(2))
    assert first.choices[0].text == second.choices[0].text
    assert second.usage.prompt_tokens_details.cached_tokens > 64
    assert second.model_extra["penstock"]["report"]["cached_tokens"] == second.usage.prompt_tokens_details.cached_tokens
    streamed = "".join(
        chunk.choices[0].text for chunk in client.completions.create(**asked, stream=True) if chunk.choices
    )
    assert streamed == first.choices[0].text
    message: Any = {"role": "user", "content": "Hello"}
    chat = client.chat.completions.create(model="tiny", messages=[message], max_tokens=5, temperature=0)
    assert chat.usage.completion_tokens == 5 or chat.choices[0].finish_reason == "stop"


def test_sigterm_ends_the_command_in_order(served: tuple[str, subprocess.Popen[str]]) -> None:
    url, process = served
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30)
    stream = client.completions.create(
        model="tiny", prompt="x", max_tokens=1500, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    stream.close()
    assert process.stderr is not None and "Traceback" not in process.stderr.read()


@pytest.mark.slow
def test_keys_and_certificates_are_read_again_on_sighup(checkpoint: Path, tmp_path: Path) -> None:
    """The real command over TLS; without files to read again, SIGHUP ends it as ever."""
    cert, key = make_certificate(tmp_path / "tls")
    keys = tmp_path / "keys"
    keys.write_text("key-a alice\n")
    keys.chmod(0o600)
    command = [sys.executable, "-m", "penstock", "serve", str(checkpoint), "--port", "0", *MODELLED]
    command += ["--tls-cert", str(cert), "--tls-key", str(key), "--api-keys", str(keys), "--drain-timeout-s", "0.5"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        found = re.search(r"penstock: (\S+) listening on (https://\S+)", line)
        assert found, process.communicate(timeout=10)
        assert found[1] == checkpoint.name
        with httpx.Client(verify=ssl.create_default_context(cafile=str(cert)), timeout=60) as client:
            models = f"{found[2]}/v1/models"
            assert client.get(models, headers={"authorization": "Bearer key-a"}).status_code == 200
            keys.write_text("key-b alice\n")
            process.send_signal(signal.SIGHUP)
            wait_until(
                lambda: client.get(models, headers={"authorization": "Bearer key-b"}).status_code == 200,
                "the new key is valid",
                60.0,
                0.05,
            )
            assert client.get(models, headers={"authorization": "Bearer key-a"}).status_code == 401
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 0 and "read again" in said and "key-" not in said
    finally:
        process.kill()
        process.communicate(timeout=10)
