"""What the pods of the chart's laptop run, as processes on loopback: pool node, router and engine answer a request."""

from __future__ import annotations

import json
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.children import announced, with_tests
from tests.deploy.test_chart import of_kind, pods, rendered, values_of

pytestmark = [pytest.mark.server, pytest.mark.slow]


@contextmanager
def running(arguments: list[str], changes: Mapping[str, str]) -> Iterator[str]:
    """The process of a container, its addresses and files replaced; gives the line in which it says that it serves."""
    for old, new in changes.items():
        arguments = [one.replace(old, new) for one in arguments]
    assert not any("$(" in one or "0.0.0.0" in one for one in arguments), arguments
    command = [sys.executable, "-P", "-m", "penstock", *arguments]
    with announced(command, with_tests()) as line:
        yield line


def until_ready(url: str) -> None:
    """A router is not healthy before an engine has registered: its readiness, and nothing that restarts it."""
    for _ in range(120):
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=60) as answer:
                assert answer.status == 200
                return
        except urllib.error.HTTPError as error:
            assert error.code == 503
            time.sleep(0.5)
    pytest.fail("no engine registered within a minute")


def post(url: str, record: Mapping[str, object]) -> dict[str, object]:
    request = urllib.request.Request(url, json.dumps(record).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        found: dict[str, object] = json.load(answer)
    return found


def test_the_laptops_pods_serve_a_request(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(f"{7:064x}\n")
    (tmp_path / "secret").chmod(0o600)
    manifests = rendered(values_of("laptop"))
    arguments = {
        kind: next(pods(of_kind(manifests, kind)))["spec"]["containers"][0]["args"]
        for kind in ("DaemonSet", "Deployment", "LeaderWorkerSet")
    }
    for flag in ("--port",):  # whichever is free
        for kind in ("Deployment", "LeaderWorkerSet"):
            arguments[kind][arguments[kind].index(flag) + 1] = "0"
    files = {"/etc/penstock/secrets": str(tmp_path), "$(NODE_NAME)": "laptop", "$(POD_NAME)": "kv-mixed-0"}
    with ExitStack() as stack:
        line = stack.enter_context(running(arguments["DaemonSet"], files | {"$(POD_IP):7070": "127.0.0.1:0"}))
        pool = ":".join(line.split(" ready on ")[1].split(":")[:2])
        here = files | {"0.0.0.0:7100": "127.0.0.1:0", "0.0.0.0": "127.0.0.1"}
        line = stack.enter_context(running(arguments["Deployment"], here))
        url, cluster = line.split("listening on ")[1].strip().split(", engines on ")
        line = stack.enter_context(
            running(arguments["LeaderWorkerSet"], here | {"kv-pool:7070": pool, "kv-router-cluster:7100": cluster})
        )
        assert "kv-mixed-0" in line
        until_ready(url)
        with urllib.request.urlopen(f"{url}/v1/models", timeout=60) as answer:
            (model,) = (one["id"] for one in json.load(answer)["data"])
        answered = post(f"{url}/v1/completions", {"model": model, "prompt": list(range(1, 200)), "max_tokens": 2})
        assert answered["usage"]["completion_tokens"] == 2  # type: ignore[index]
