"""The measurement of `penstock bench scale` of a router with front processes: HTTP requests per second of CPU of the
process that places them, beside those of a router of one process in the same run. The engines are `scale_engines`."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

from penstock.bench.process_cpu import cpu_s
from penstock.bench.processes import ProcessFailed, ReadyProcess
from penstock.bench.scale_engines import engines_process
from penstock.bench.scale_router import LEASE_S, Step
from penstock.private_file import make_private
from penstock.process.child_python import python_command
from penstock.report import Report
from penstock.units import parse_address

ENGINES = 32
FRONTS = 2
CLIENTS = 8
PROMPT_TOKENS = 2048
TIMEOUT_S = 60.0
READY = re.compile(r"listening on (\S+, engines on \S+)")
BYTES = "penstock_engine_front_request_bytes_total"
GOAL = 100.0  # bytes of a request that the placer sees


def measure_fronts(report: Report, quick: bool, step: Step) -> None:
    """Add the figures. Raises OSError, ProcessFailed."""
    requests = 48 if quick else 2048
    step(f"{requests} HTTP requests to a router, alone and with {FRONTS} fronts")
    alone_s, _ = request_cpu_s(1, requests)
    placer_s, placer_bytes = request_cpu_s(FRONTS, requests)
    report.figure("router_http_per_s", 1.0 / alone_s)
    report.figure("router_http_per_s_at_the_placer", 1.0 / placer_s)
    report.figure("router_http_at_the_placer_over_alone", alone_s / placer_s)
    report.figure("router_bytes_per_request_at_the_placer", placer_bytes, GOAL)


def request_cpu_s(fronts: int, requests: int) -> tuple[float, float]:
    """CPU seconds per HTTP request of the process that clients (`fronts` 1) or only engines and fronts speak to, and
    bytes per request between it and the fronts."""
    with contextlib.ExitStack() as undo:
        secret = Path(undo.enter_context(tempfile.TemporaryDirectory())) / "secret"
        with open(make_private(secret), "wb") as file:
            file.write(os.urandom(32).hex().encode())
        listen = ("--port", "0", "--cluster-listen", "127.0.0.1:0", "--secret-file", str(secret))
        more = ("--fronts", str(fronts), "--lease-s", str(LEASE_S), "--log-level", "error")
        command = python_command("-m", "penstock", "router", *listen, *more)
        router = undo.enter_context(ReadyProcess(command, READY, ready_s=TIMEOUT_S))
        url, _, place = router.address.partition(", engines on ")
        undo.enter_context(engines_process(parse_address(place), secret, ENGINES, LEASE_S / 2))
        _ask(url, 2 * CLIENTS)
        begin_s, begin_bytes = cpu_s(router.pid), _front_bytes(url)
        _ask(url, requests)
        spent_s, spent_bytes = cpu_s(router.pid) - begin_s, _front_bytes(url) - begin_bytes
    return spent_s / requests, spent_bytes / requests


def _ask(url: str, requests: int) -> None:
    """So many requests, by CLIENTS at once. Raises ProcessFailed for one that is not answered."""
    body = json.dumps({"prompt": [7] * PROMPT_TOKENS, "max_tokens": 2, "temperature": 0, "ignore_eos": True})
    place = urlsplit(url).netloc

    def client(count: int) -> None:
        connection = http.client.HTTPConnection(place, timeout=TIMEOUT_S)
        for _ in range(count):
            connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
            answer = connection.getresponse()
            text = answer.read()
            if answer.status != 200:
                raise ProcessFailed(f"a request was answered with {answer.status}: {text[:300]!r}")
        connection.close()

    with ThreadPoolExecutor(CLIENTS) as threads:
        list(threads.map(client, [requests // CLIENTS] * CLIENTS))


def _front_bytes(url: str) -> float:
    """Bytes about requests between the placer and its fronts so far; 0 for a router without fronts."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=TIMEOUT_S)
    connection.request("GET", "/metrics")
    found = re.search(rf"^{BYTES} (\S+)$", connection.getresponse().read().decode(), re.MULTILINE)
    connection.close()
    return float(found[1]) if found else 0.0
