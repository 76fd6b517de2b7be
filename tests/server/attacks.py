"""How an honest client fares while hostile ones are at work: its time between tokens, alone and beside each attack.

    python -m tests.server.attacks [--seconds 5] [--only NAME] [--json FILE] [--files 1024]
    python -m tests.server.attacks --flat

The server, the attackers and the honest client are processes of their own; the attackers have the lowest priority, as
they stand for other machines. The engine gives a token of each request every 10 ms, and everything before it is real:
sockets, HTTP, JSON, templates, tokens. A line is printed for each attack, with the ratio to the client alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import resource
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.flood import write_rows
from tests.server.attack_kinds import ATTACKS, Target, bad_requests_of, cut_connections_of
from tests.server.echo_engine import EchoEngine

PACE_S = 0.01
WARM_UP_S = 0.7  # of each attack, before the client is measured
_SPAWN = multiprocessing.get_context("spawn")


@dataclass
class Measured:
    """Of one attack; seconds between tokens, and the server after it."""

    attack: str
    tokens: int
    p50_s: float
    p99_s: float
    max_s: float
    connect_s: float
    rss_mb: int
    threads: int
    files: int


def serve(pipe: Any, files: int | None) -> None:
    """The server's process: sends its address, ends when the pipe does."""
    from penstock.process.startup_objects import freeze_startup_objects
    from penstock.server.app import ServerApp
    from penstock.server.run import HttpServer, bind
    from penstock.server.settings import ServerSettings
    from penstock.server.text import TextCodec
    from penstock.testing.tiny_models import TINY_VOCABULARY, build_tokenizer

    if files is not None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    codec = TextCodec(build_tokenizer(TINY_VOCABULARY))
    codec.start()
    engine = EchoEngine(max_context_tokens=8192, pace_s=PACE_S)
    listener = bind("127.0.0.1", 0)
    app = ServerApp(engine, codec, ServerSettings("tiny", drain_timeout_s=0.5))
    server = HttpServer(app, listener, lambda: pipe.send(listener.getsockname()))

    def wait_for_the_end() -> None:
        with contextlib.suppress(EOFError, OSError):
            pipe.recv()
        server.stop()

    threading.Thread(target=wait_for_the_end, daemon=True).start()
    freeze_startup_objects()  # as `penstock serve` does
    server.serve_forever()
    codec.close()
    engine.close(5)


def attack(name: str, address: tuple[str, int], stop: Any) -> None:
    """An attacker's process."""
    os.nice(19)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    ended = threading.Event()
    threading.Thread(target=lambda: (stop.wait(), ended.set()), daemon=True).start()
    ATTACKS[name](Target(*address), ended)


@contextlib.contextmanager
def running_server(files: int | None = None) -> Iterator[tuple[Target, psutil.Process]]:
    """A server in a process of its own, which may have so many files open."""
    ours, theirs = _SPAWN.Pipe()
    process = _SPAWN.Process(target=serve, args=(theirs, files))
    process.start()
    theirs.close()
    try:
        yield Target(*ours.recv()), psutil.Process(process.pid)
    finally:
        ours.close()
        process.join(30)
        if process.is_alive():
            process.kill()


@contextlib.contextmanager
def attacked(name: str, target: Target) -> Iterator[None]:
    stop = _SPAWN.Event()
    process = _SPAWN.Process(target=attack, args=(name, target.address, stop))
    process.start()
    try:
        time.sleep(WARM_UP_S)
        yield
    finally:
        stop.set()
        process.join(20)
        if process.is_alive():
            process.kill()


def gaps_of(target: Target, seconds: float) -> tuple[list[float], float]:
    """Seconds between the tokens of streams that an honest client reads for so long, and until its first connection was
    answered. It comes over an address of its own, as it would from another machine."""
    body = {"prompt": [70, 71, 72], "max_tokens": 8000, "stream": True, "ignore_eos": True}
    with socket.socket() as client:
        client.bind(("127.0.0.9", 0))
        client.settimeout(60)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        begin_s = time.monotonic()
        client.connect(target.address)
        client.sendall(target.post(json.dumps(body).encode()))
        gaps: list[float] = []
        connect_s, last_s = 0.0, 0.0
        while time.monotonic() < begin_s + seconds + connect_s:
            data = client.recv(2**16)
            if not data:
                raise ConnectionError("the honest client's stream ended")
            now_s = time.monotonic()
            if not last_s:
                assert data.startswith(b"HTTP/1.1 200"), data[:200]
                connect_s = now_s - begin_s
            else:
                gaps.append(now_s - last_s)
            last_s = now_s
    return gaps, connect_s


def measure(name: str, target: Target, server: psutil.Process, seconds: float) -> Measured:
    """The honest client beside an attack that goes on already."""
    gaps, connect_s = gaps_of(target, seconds)
    gaps.sort()
    quantile = {share: gaps[min(int(share * len(gaps)), len(gaps) - 1)] for share in (0.5, 0.99)}
    memory = server.memory_info().rss // 2**20
    return Measured(
        name,
        len(gaps),
        quantile[0.5],
        quantile[0.99],
        gaps[-1],
        connect_s,
        memory,
        server.num_threads(),
        server.num_fds(),
    )


def measure_all(names: list[str], seconds: float, files: int | None) -> Iterator[Measured]:
    """Alone first, then beside each attack."""
    with running_server(files) as (target, server):
        gaps_of(target, 0.5)
        yield measure("alone", target, server, seconds)
        for name in names:
            with attacked(name, target):
                found = measure(name, target, server, seconds)
            yield found
        time.sleep(0.5)
        yield measure("alone again", target, server, seconds)


@contextlib.contextmanager
def settled(server: psutil.Process, files: int) -> Iterator[None]:
    """After the block, wait until the server has no more files open than this."""
    yield
    end_s = time.monotonic() + 60
    while server.num_fds() > files and time.monotonic() < end_s:
        time.sleep(0.1)


def send_bad_ones(target: Target, requests: int, connections: int, seconds: float) -> int:
    """Requests that are refused, for at most so long, then connections that are cut. Returns the requests answered."""
    stop = threading.Event()
    timer = threading.Timer(seconds, stop.set)
    timer.start()
    sent = max(bad_requests_of(target, requests, stop), default=0)
    timer.cancel()
    cut_connections_of(target, connections)
    return sent


def print_flatness() -> None:
    """Memory, threads and files over 10^5 bad requests and 10^4 cut connections."""
    print(f"{'bad requests':>12} {'cut':>6} {'rss KiB':>8} {'threads':>7} {'files':>5}")
    with running_server() as (target, server):
        gaps_of(target, 0.5)
        files, sent = server.num_fds(), 0
        for step in range(11):
            if step:
                with settled(server, files):
                    sent += send_bad_ones(target, 10_000, 1000, 3600.0)
            memory = server.memory_info().rss // 1024
            print(f"{sent:12} {step * 1000:6} {memory:8} {server.num_threads():7} {server.num_fds():5}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=5.0, help="for how long the client is measured each time")
    parser.add_argument("--only", action="append", choices=sorted(ATTACKS), help="this attack; may be repeated")
    parser.add_argument("--files", type=int, help="open files that the server may have, for example 1024")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--flat", action="store_true", help="instead, send 10^5 bad requests and cut 10^4 connections")
    given = parser.parse_args()
    if given.flat:
        print_flatness()
        return
    columns = ("attack", "tokens", "p50 ms", "p99 ms", "ratio", "max ms", "first s", "MB", "threads", "files")
    print("{:37} {:>6} {:>7} {:>7} {:>6} {:>7} {:>7} {:>5} {:>7} {:>5}".format(*columns))
    rows: list[Measured] = []
    for one in measure_all(given.only or list(ATTACKS), given.seconds, given.files):
        rows.append(one)
        ratio, after = one.p99_s / rows[0].p99_s, f"{one.connect_s:7.2f} {one.rss_mb:5} {one.threads:7} {one.files:5}"
        p50, p99, longest = (seconds * 1e3 for seconds in (one.p50_s, one.p99_s, one.max_s))
        print(f"{one.attack:37} {one.tokens:6} {p50:7.1f} {p99:7.1f} {ratio:6.2f} {longest:7.1f} {after}", flush=True)
    if given.json is not None:
        write_rows(given.json, rows)


if __name__ == "__main__":
    main()
