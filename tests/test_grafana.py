"""Every query of the Grafana board finds something in a real Prometheus that scrapes a server and a pool node."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.asking import wait_until
from tests.children import with_tests

BOARD = Path(__file__).parent.parent / "deploy" / "grafana" / "penstock.json"
WAIT_S = 120.0
COMMAND = [sys.executable, "-P", "-m", "penstock"]
PANELS: list[dict[str, Any]] = json.loads(BOARD.read_text())["panels"]
QUERIES = {
    f"{panel['title']} {target['refId']}": target["expr"].replace("$__rate_interval", "30s").replace("$job", ".*")
    for panel in PANELS
    for target in panel["targets"]
}
CONFIG = """
global: {{scrape_interval: 250ms, scrape_timeout: 250ms}}
scrape_configs:
- {{job_name: engines, static_configs: [{{targets: ["{engine}"]}}]}}
- {{job_name: pool, static_configs: [{{targets: ["{node}"]}}]}}
"""


def test_panels_have_places_and_titles_of_their_own() -> None:
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in PANELS]
    assert (
        len(set(places)) == len({panel["title"] for panel in PANELS}) == len({p["id"] for p in PANELS}) == len(PANELS)
    )
    assert len(QUERIES) >= 20 and all("$" not in query for query in QUERIES.values())


def started(arguments: list[str], *patterns: str) -> tuple[subprocess.Popen[str], list[str]]:
    """A command, and what its lines say by each pattern."""
    process = subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, text=True, env=with_tests())
    assert process.stdout is not None
    found = []
    for pattern in patterns:
        said = re.search(pattern, process.stdout.readline())
        assert said is not None, process.wait(WAIT_S)
        found.append(said[1])
    return process, found


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[str]:
    """The URL of one that scrapes a server, which answered requests of two tenants, and its pool node."""
    processes = list[subprocess.Popen[str]]()
    try:
        pool = ["pool", "--memory", "256KiB", "--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0"]
        process, (node, address) = started(pool, r" on (127\.\S+)$", r" on (127\.\S+): ")
        processes.append(process)
        serve = ["serve", "--executor", "modelled", "--bytes-divisor", "1024", "--time-factor", "0.01", "--port", "0"]
        serve += ["--pool", address, "--kv-memory", "64KiB", "--staging", "1MiB", "--block-tokens", "16"]
        process, (engine,) = started([*serve, "--served-model-name", "m"], r"listening on http://(\S+)")
        processes.append(process)
        (tmp_path / "prometheus.yml").write_text(CONFIG.format(engine=engine, node=node))
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        command = ["prometheus", f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data"]
        command += [f"--web.listen-address=127.0.0.1:{port}", "--log.level=error"]
        processes.append(subprocess.Popen(command, cwd=tmp_path, text=True))
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: is_ready(url), "Prometheus is ready", WAIT_S)
        wait_until(lambda: value(url, "sum(up)") == 2, "both are scraped", WAIT_S)
        for number in range(24):
            body = {"model": "m", "prompt": list(range(100 * (number % 8), 100 * (number % 8) + 80)), "max_tokens": 2}
            body |= {"cache_salt": f"tenant-{number % 2}", "slo_ttft_ms": 60_000}
            assert httpx.post(f"http://{engine}/v1/completions", json=body, timeout=WAIT_S).status_code == 200
        yield url
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(WAIT_S)


def is_ready(url: str) -> bool:
    """Whether it answers queries: it listens before it does, and then answers 503 in plain text."""
    try:
        return httpx.get(f"{url}/-/ready", timeout=WAIT_S).status_code == 200
    except httpx.HTTPError:  # it does not listen yet
        return False


def samples(url: str, query: str) -> list[Any]:
    """What a query finds; it has to be one that Prometheus understands."""
    answer = httpx.post(f"{url}/api/v1/query", data={"query": query}, timeout=WAIT_S).json()
    assert answer["status"] == "success", (query, answer)
    found: list[Any] = answer["data"]["result"]
    return found


def value(url: str, query: str) -> float:
    found = samples(url, query)
    return float(found[0]["value"][1]) if found else 0.0


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("prometheus") is None, reason="there is no prometheus here (package prometheus)")
def test_every_query_finds_something_and_is_drawn(prometheus: str, tmp_path: Path) -> None:
    def missing() -> list[str]:
        return [name for name, query in QUERIES.items() if not samples(prometheus, query)]

    wait_until(lambda: missing() == [], "every query of the board finds something", WAIT_S)
    whole = "sum(rate(penstock_request_stage_seconds_total[30s]))"
    assert value(prometheus, whole) > 0 and value(prometheus, "sum(penstock_pool_member_used_bytes)") > 0
    assert value(prometheus, "count(penstock_pool_tenant_bytes > 0)") == 2
    script = [sys.executable, str(BOARD.parents[2] / "examples" / "draw_board.py"), prometheus]
    drawn = subprocess.run([*script, str(tmp_path / "board.svg"), "--minutes", "1"], timeout=WAIT_S, env=with_tests())
    assert drawn.returncode == 0
    picture = (tmp_path / "board.svg").read_text()
    assert picture.count("<!-- p99 -->") == 1 and all(f"<!-- {panel['title']}" in picture for panel in PANELS)
