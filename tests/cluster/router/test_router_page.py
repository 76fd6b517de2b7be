"""The router's live page: its data, and the page itself in a real browser."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from penstock.cluster.messages import LinkReport
from tests.asking import wait_until
from tests.browser import shown_in_browser
from tests.cluster.router_rig import Cluster, CountingHost, cluster, page_of

LINKS = [
    LinkReport(relay="d:1", direction="read", load_bytes_per_s=30e6, backlog_bytes=60_000_000, bytes_per_s=40e6),
    LinkReport(relay="d:1", direction="hand-off", load_bytes_per_s=1e6, backlog_bytes=0, bytes_per_s=0.0),
]


@contextmanager
def busy() -> Iterator[tuple[Cluster, str]]:
    """Requests in every stage on two hosts, and finished ones."""
    with cluster() as c:
        prefill = CountingHost()
        prefill.links = LINKS
        c.engine("p", "prefill", prefill)
        c.engine("d", "decode", CountingHost())
        for number in range(4):
            c.ask([number, 1], 6).wait()
        c.hosts["d"].hold_after = 3
        for number in range(3):
            c.ask([number, 2], 40)
        open_ones = c.router.requests
        wait_until(
            lambda: (
                len(open_ones) == 3
                and all(len(r.answer.tokens) == 3 and set(r.answer.parts) == {"d"} for r in list(open_ones.values()))
            ),
            "three tokens each",
        )
        prefill.hold_after = 0
        c.ask([1, 3], 9)
        wait_until(lambda: prefill.running == 1, "a request in prefill")
        with page_of(c) as url:
            yield c, url


def test_the_data_names_hosts_engines_links_queues_and_requests() -> None:
    with busy() as (_, url):
        data = httpx.get(f"{url}/ui/data", timeout=20.0).json()
        assert data["healthy"] and data["open"] == 4
        assert {host["name"] for host in data["hosts"]} == {"host-p", "host-d"}
        assert all(host["storage"]["up"] for host in data["hosts"])
        read, handed = data["links"]
        assert (read["from"], read["to"], read["what"]) == ("d", "p", "read")
        assert (handed["from"], handed["to"], handed["what"]) == ("p", "d", "hand-off")
        assert read["load_bytes_per_s"] == 30e6 and read["backlog_s"] == 1.5
        assert handed["bytes_per_s"] is None and handed["backlog_s"] is None
        assert data["queues"] == {"wait_router": 0, "prefill": 1, "hand-off": 0, "decode": 3}
        assert {request["stage"] for request in data["requests"]} == {"prefill", "decode"}
        assert all(request["spans"] for request in data["requests"]) and len(data["recent"]) == 4
        metrics = httpx.get(f"{url}/metrics", timeout=20.0).text
        assert 'penstock_engine_engine_unfinished{name="d"}' in metrics
        assert re.search(r'^vllm:num_requests_running{engine="0",model_name=".*"} 4.0$', metrics, re.M)
        assert re.search(r'^vllm:num_requests_waiting{engine="0",model_name=".*"} 0.0$', metrics, re.M)
        assert re.search(r'^vllm:kv_cache_usage_perc{engine="0",model_name=".*"} 0', metrics, re.M)
        assert re.search(r'^vllm:num_preemptions_total{engine="0",model_name=".*"} 0.0$', metrics, re.M)
        assert re.search(
            r'^vllm:cache_config_info{block_size="\d+",engine="0",num_gpu_blocks="\d+"} 1.0$', metrics, re.M
        )


def test_the_page_in_a_headless_browser(tmp_path: Path) -> None:
    with busy() as (_, url):
        shown = shown_in_browser(f"{url}/ui", tmp_path)
    assert "healthy" in shown and "no answer" not in shown, shown[-3000:]
    for text in (
        "host-p",
        "host-d",
        "storage NIC",
        "hand-off",
        "29 MiB/s",
        "57 MiB",
        "1.50 s",
        "prefill · 0 tokens",
        "decode · 3 tokens · d",
    ):
        assert text in shown
    assert len(re.findall('class="row"', shown)) == 8  # four open requests and four finished ones
