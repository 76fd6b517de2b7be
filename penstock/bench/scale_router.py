"""The measurements of `penstock bench scale` of the router: CPU time of its process per heartbeat of an engine, and per
request with a long prompt. HTTP, templates, and how a prompt becomes packed tokens are left out."""

from __future__ import annotations

import contextlib
import os
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from penstock.bench.processes import ProcessFailed
from penstock.bench.scale_bare_beats import bare_beat_cpu_s
from penstock.bench.scale_engines import engines_process, heartbeat_bytes
from penstock.cluster.router.engine_registry import BEATS_PER_LEASE
from penstock.cluster.router.router import ClusterEngine, RouterSettings
from penstock.cluster.settings import RouterTimes
from penstock.core.packed_tokens import pack_tokens
from penstock.engine.api import GenerationRequest, TokenEvent
from penstock.engine.runner import SamplingParams
from penstock.pool.net.secret import Secret
from penstock.private_file import make_private
from penstock.process.file_limit import raise_file_limit
from penstock.process.startup_objects import freeze_startup_objects
from penstock.report import Report
from penstock.server.run import bind

BEATING, PLACED_ON = 1024, 256  # engines
PROMPT_TOKENS = 32_768
PROMPTS = 16  # different ones: most requests hit
OPEN = 256
TIMEOUT_S = 120.0
LEASE_S, CLOSE_S = 4 * TIMEOUT_S, 30.0
BEAT_S = RouterTimes().lease_s / BEATS_PER_LEASE  # as engines do where nothing is set
BEFORE = {  # measured when a heartbeat cost O(engines) and prompts were lists everywhere
    "router_heartbeats_core_share": 1.5,
    "router_placed_per_s": 58.0,
}
GOALS = {"router_heartbeats_core_share": 0.1, "router_placed_per_s": 1500.0}
Step = Callable[[str], None]


def measure_router(report: Report, quick: bool, step: Step) -> None:
    """Add each figure with its goal and what it was before. Raises OSError, ProcessFailed, TimeoutError."""
    beating, placed_on = (32, 16) if quick else (BEATING, PLACED_ON)
    step(f"{beating} engines send heartbeats to a router")
    spent_s = heartbeat_cpu_s(beating, 256 if quick else 8192)
    report.figure("router_us_per_heartbeat", 1e6 * spent_s)
    _figure(report, "router_heartbeats_core_share", spent_s * beating / BEAT_S)
    bare_s = bare_beat_cpu_s(beating, BEAT_S, heartbeat_bytes(), 256 if quick else 8192)
    report.figure("bare_us_per_heartbeat", 1e6 * bare_s)
    report.notes.append("bare_us_per_heartbeat: the bytes of heartbeats to an asyncio loop that only answers them")
    step(f"requests are placed on {placed_on} engines")
    _figure(report, "router_placed_per_s", 1.0 / request_cpu_s(placed_on, 64 if quick else 4096))


def _figure(report: Report, name: str, value: float) -> None:
    report.figure(name, value, GOALS[name])
    report.figure(f"{name}_before", BEFORE[name])


def heartbeat_cpu_s(engines: int, beats: int) -> float:
    """CPU seconds of the router per heartbeat, of `beats` of them at least."""
    with _router(engines, BEAT_S) as router:
        begin, begin_s, end_s = _beats(router), time.process_time(), time.monotonic() + TIMEOUT_S
        while (came := _beats(router) - begin) < beats:
            if time.monotonic() > end_s:
                raise TimeoutError(f"{came} of {beats} heartbeats came within {TIMEOUT_S:g} s")
            time.sleep(0.1)
        return (time.process_time() - begin_s) / came


def _beats(router: ClusterEngine) -> float:
    """Heartbeats so far: these engines report as many preemptions."""
    return router.port.counts.preemptions


def request_cpu_s(engines: int, requests: int) -> float:
    """CPU seconds of the router per request of PROMPT_TOKENS, from `submit` to its end; heartbeats are rare."""
    dice = random.Random(1)
    tokens = [[dice.randrange(128_000) for _ in range(PROMPT_TOKENS)] for _ in range(PROMPTS)]
    prompts = [(one, pack_tokens(one)) for one in tokens]
    with _router(engines, LEASE_S / 2) as router:
        _ask(router, prompts, len(prompts))  # each for the first time
        begin_s = time.process_time()
        _ask(router, prompts, requests)
        return (time.process_time() - begin_s) / requests


def _ask(router: ClusterEngine, prompts: list[tuple[list[int], bytes]], requests: int) -> None:
    """Have OPEN requests under way until all have ended. Raises ProcessFailed for one that fails."""
    free, failed = threading.Semaphore(OPEN), list[TokenEvent]()

    def on_event(event: TokenEvent) -> None:
        if event.finish_reason is None:
            return
        if event.finish_reason != "length":
            failed.append(event)
        free.release()

    sampling = SamplingParams(max_tokens=2, temperature=0.0)
    for number in range(requests + OPEN):
        if not free.acquire(timeout=TIMEOUT_S):
            raise TimeoutError(f"no request ended within {TIMEOUT_S:g} s")
        if number < requests:
            tokens, packed = prompts[number % len(prompts)]
            name = f"scale-{id(free)}-{number}"
            router.submit(GenerationRequest(name, tokens, sampling, packed=packed), on_event)
    if failed:
        raise ProcessFailed(f"{len(failed)} requests ended as {failed[0].finish_reason}: {failed[0].error}")


@contextlib.contextmanager
def _router(engines: int, beat_s: float) -> Iterator[ClusterEngine]:
    """A router with so many engines, which send a heartbeat every `beat_s`; none is fenced on a busy machine."""
    raise_file_limit()
    with contextlib.ExitStack() as undo:
        secret_file = Path(undo.enter_context(tempfile.TemporaryDirectory())) / "secret"
        with open(make_private(secret_file), "wb") as file:
            file.write(os.urandom(32).hex().encode())
        sock = undo.enter_context(bind("127.0.0.1", 0))
        router = ClusterEngine(sock, Secret.read(secret_file), RouterSettings(lease_s=LEASE_S))
        processes = engines_process(sock.getsockname()[:2], secret_file, engines, beat_s)
        undo.callback(processes.stop)
        undo.callback(router.close, CLOSE_S)  # before the engines end, so that none is lost
        freeze_startup_objects()  # as `penstock router` does
        processes.start()
        processes.await_ready()
        yield router
