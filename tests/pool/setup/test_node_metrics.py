"""`/metrics` and `/health` of a pool node: its own members, behind its key; strangers shut nobody out."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from penstock.pool.net.connect import connect_pool
from penstock.process import metrics_port
from penstock.process.metrics_port import MetricsPort
from tests.pool.helpers import chain, write
from tests.pool.setup.test_pool_live import MEMORY, WAIT_S, Node


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    (tmp_path / "key").write_text("sesame\n")
    (tmp_path / "key").chmod(0o600)
    (tmp_path / "pool.toml").write_text('metrics_listen = "127.0.0.1:0"\nmetrics_key_file = "key"\n' + MEMORY)
    node = Node(tmp_path / "pool.toml")
    yield node
    node.end()


def test_a_node_has_metrics_and_health_behind_a_key(node: Node) -> None:
    url = f"http://{node.ready.split(' on ')[1]}"
    node.address = node.out.get(timeout=WAIT_S).split(" on ")[1].split()[0].removesuffix(":")
    client = connect_pool(node.address)
    assert [write(client, key, parent) for key, parent in chain("m", 3)] == ["ok"] * 3
    assert httpx.get(f"{url}/health").text == "ok\n"
    for headers in ({}, {"authorization": "Bearer open"}, {"authorization": "Basic sesame"}):
        assert httpx.get(f"{url}/metrics", headers=headers).status_code == 401
    key = {"authorization": "Bearer sesame"}
    answer = httpx.get(f"{url}/metrics", headers=key)
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = {
        (sample.name, tuple(label for _, label in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }
    assert found["penstock_pool_member_blocks", ("memory", "memory:0")] == 3
    assert found["penstock_pool_member_capacity_bytes", ("memory", "memory:0")] == 1 << 20
    assert found["penstock_pool_member_written_bytes_total", ("memory", "memory:0")] > 0
    assert found["penstock_pool_member_state", ("memory:0", "ok")] == 1
    assert found["penstock_pool_evictions_total", ()] == 0 and found["penstock_node_connections", ()] >= 1
    assert httpx.get(f"{url}/pool", headers=key).status_code == 404
    assert httpx.post(f"{url}/metrics", headers=key).status_code == 405
    client.close(WAIT_S)


@contextlib.contextmanager
def port_of(key: bytes | None = None, ailing: str | None = None) -> Iterator[tuple[str, tuple[str, int]]]:
    port = MetricsPort("127.0.0.1", 0, lambda: b"a 1\n", lambda: ailing, key)
    try:
        yield "http://{}:{}".format(*port.address), port.address
    finally:
        port.close()


def test_what_ails_the_node_and_who_asks_by_another_name() -> None:
    with port_of(ailing="out of threads") as (url, _):
        answer = httpx.get(f"{url}/health")
        assert (answer.status_code, answer.text) == (503, "out of threads\n")
        assert httpx.get(f"{url}/metrics", headers={"host": "evil.example"}).status_code == 403
        assert httpx.get(f"{url}/metrics", headers={"host": "localhost:1"}).text == "a 1\n"


def test_strangers_shut_nobody_out() -> None:
    """Twice as many connections that say nothing as may be open, heads that never end, and no request at all."""
    with port_of() as (url, address):
        silent = [socket.create_connection(address) for _ in range(2 * metrics_port.STRANGERS_MAX)]
        assert httpx.get(f"{url}/metrics").text == "a 1\n"
        gone = 0
        for one in silent[: metrics_port.STRANGERS_MAX]:
            one.settimeout(WAIT_S)
            with contextlib.suppress(ConnectionResetError):
                assert one.recv(1) == b""
            gone += 1
        assert gone == metrics_port.STRANGERS_MAX
        for bad in (b"x" * (metrics_port.HEAD_BYTES_MAX + 2), b"\x16\x03\x01\r\n\r\n"):
            with socket.create_connection(address) as one:
                one.settimeout(WAIT_S)
                with contextlib.suppress(OSError):
                    one.sendall(bad)
                    assert not one.recv(1000).startswith(b"HTTP/1.1 200")
        assert httpx.get(f"{url}/metrics").text == "a 1\n"
        for one in silent:
            one.close()


def test_a_render_that_fails_is_a_503() -> None:
    def render() -> bytes:
        raise OSError("no")

    port = MetricsPort("127.0.0.1", 0, render, lambda: None, None)
    try:
        answer = httpx.get("http://{}:{}/metrics".format(*port.address))
        assert answer.status_code == 503 and "OSError" in answer.text
    finally:
        port.close()


@pytest.mark.parametrize("content", ["", " \n"])
def test_an_empty_key_is_refused(tmp_path: Path, content: str) -> None:
    import subprocess

    from tests.pool.setup.test_pool_live import COMMAND

    (tmp_path / "key").write_text(content)
    (tmp_path / "key").chmod(0o600)
    command = [*COMMAND, "pool", "--memory", "1MiB", "--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0"]
    done = subprocess.run([*command, "--metrics-key-file", str(tmp_path / "key")], capture_output=True, text=True)
    assert done.returncode == 2 and "metrics_key_file is empty" in done.stderr
