"""`penstock pool` as a user runs it: the ready line, signals, and one clear line for everything that is wrong."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from typer.testing import CliRunner

from penstock.pool.api import PoolError
from penstock.pool.net.connect import connect_pool
from penstock.pool.setup import pool_command as command
from penstock.pool.setup.config import config_of_flags
from penstock.pool.setup.pool_command import parse_slab, pool_app
from penstock.units import format_bytes, parse_bytes, parse_rate
from tests.pool.helpers import chain, read, write

COMMAND = [sys.executable, "-m", "penstock", "pool"]


def refused(*arguments: str) -> str:
    """Run a command that must fail with exit code 2 and one line on stderr; returns the line."""
    ended = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=30.0)
    lines = ended.stderr.splitlines()
    assert ended.returncode == 2 and len(lines) == 1 and not ended.stdout, ended
    return lines[0]


def start(*arguments: str) -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("pool node pool ready on 127.0.0.1:"), process.communicate()[1]
    return process, line.split()[5].removesuffix(":")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_node_starts_serves_and_ends_with_its_blocks_on_the_slab(tmp_path: Path, number: signal.Signals) -> None:
    arguments = ["--listen", "127.0.0.1:0", "--slab", f"{tmp_path}/kv.slab:8MiB"]
    for round_ in range(2 if number == signal.SIGTERM else 1):
        process, address = start(*arguments)
        client = connect_pool(address)
        for key, parent in chain("a", 20):
            assert (read(client, key) if round_ else write(client, key, parent)) == "ok"
        process.send_signal(number)
        assert process.wait(15.0) == 0
        assert process.communicate()[1] == ""
        client.close(5.0)


@pytest.mark.slow
def test_what_is_in_use_or_impossible_is_refused_in_one_line(tmp_path: Path) -> None:
    slab = f"{tmp_path}/kv.slab:8MiB"
    process, address = start("--listen", "127.0.0.1:0", "--slab", slab)
    assert "in use" in refused("--listen", address, "--memory", "1MiB")
    assert "already locked" in refused("--listen", "127.0.0.1:0", "--slab", slab)
    process.terminate()
    process.wait(15.0)
    process.communicate()


def test_bad_input_is_refused_in_one_line(tmp_path: Path) -> None:
    def refused(*arguments: str) -> str:
        result = CliRunner().invoke(pool_app, arguments)
        assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1 and not result.stdout
        return str(result.stderr)

    assert "space" in refused("--slab", f"{tmp_path}/huge.slab:900TiB")
    assert not (tmp_path / "huge.slab").exists()
    assert "does not exist" in refused("--slab", f"{tmp_path}/nowhere/kv.slab:1MiB")
    assert "no member" in refused()
    assert "HOST:PORT" in refused("--listen", "7070", "--memory", "1MiB")
    (tmp_path / "pool.toml").write_text('[[member]]\nkind = "memory"\ncapacity = "1MiB"\n')
    for flag, value in (("--memory", "1MiB"), ("--slab", "/a:1MiB"), ("--weight", "1")):
        assert f"together with {flag}" in refused("--config", f"{tmp_path}/pool.toml", flag, value)
    assert "cannot be read" in refused("--config", f"{tmp_path}/absent.toml")
    assert "size '1 XB'" in refused("--staging", "1 XB", "--memory", "1MiB")
    assert "log-level" in refused("--log-level", "loud", "--memory", "1MiB")


def test_sizes_and_rates_are_read_as_written() -> None:
    assert parse_bytes("2GiB") == 2 << 30 and parse_bytes("1.5 MB") == 1_500_000 and parse_bytes("4096") == 4096
    assert parse_rate("200MB/s") == 200e6 and parse_rate("10Gbit/s") == 1.25e9
    assert parse_slab("/a:b/c:1KiB") == (Path("/a:b/c"), 1024)
    assert format_bytes(1536) == "1.5 KiB" and format_bytes(12) == "12 B" and format_bytes(5 << 40) == "5 TiB"


@pytest.mark.slow
def test_staging_of_the_command_line_and_of_the_file_bounds_the_blocks(tmp_path: Path) -> None:
    (tmp_path / "pool.toml").write_text('staging = "2MiB"\n[[member]]\nkind = "memory"\ncapacity = "16MiB"\n')
    for more, at_most in ((["--config", f"{tmp_path}/pool.toml"], 2 << 20), (["--memory", "16MiB"], 16 << 20)):
        process, address = start("--listen", "127.0.0.1:0", *more)
        client = connect_pool(address)
        assert client.block_bytes_max == at_most
        client.close(5.0)
        process.terminate()
        process.communicate()
    process, address = start("--listen", "127.0.0.1:0", "--config", f"{tmp_path}/pool.toml", "--staging", "1MiB")
    client = connect_pool(address)
    assert client.block_bytes_max == 1 << 20
    client.close(5.0)
    process.terminate()
    process.communicate()


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "0", "1 XB", "1e9", "9999999TiB"])
def test_malformed_sizes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="size"):
        parse_bytes(text)
    with pytest.raises(ValueError, match="rate"):
        parse_rate(f"{text}/s")


@pytest.mark.parametrize("text", ["/a", ":1GiB", "/a:", "/a:1XB"])
def test_malformed_slabs_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"slab|size"):
        parse_slab(text)


def test_connections_of_the_command_line_bound_them_and_the_open_files_are_raised() -> None:
    flags = ("--connections", "6", "--connections-per-address", "3", "--memory", "1MiB")
    process, address = start("--listen", "127.0.0.1:0", *flags)
    try:
        limits = Path(f"/proc/{process.pid}/limits").read_text()
        line = next(line for line in limits.splitlines() if line.startswith("Max open files"))
        assert line.split()[3] == line.split()[4], "the soft limit is the hard one"
        client = connect_pool(address)
        with pytest.raises(PoolError, match=f"node {address} has 3 connections of address 127.0.0.1, the limit"):
            connect_pool(address)
        client.close(5.0)
    finally:
        process.kill()
        process.communicate()


def test_a_node_does_not_look_at_its_modules_while_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full collection took 40 ms of a node, again and again in a storm of connections. Once it is closed, it leaves
    the process as it was: a thread of others that ended then would have ended the process."""
    frozen: list[int] = []
    before, hooks = threading.excepthook, list[object]()

    def wait(*_: object) -> None:
        frozen.append(gc.get_freeze_count())
        hooks.append(threading.excepthook)

    monkeypatch.setattr(command, "_wait", wait)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    config = config_of_flags([1 << 20], [], None, listen="127.0.0.1:0")
    gc.unfreeze()
    try:
        command._serve(config, lambda *_: config)  # noqa: SLF001 (what the command does once its flags are read)
        assert frozen[0] > len(gc.get_objects())
        assert hooks[0] is not before and threading.excepthook is before
    finally:
        gc.unfreeze()
        for number, handler in handlers.items():
            signal.signal(number, handler)
