"""How an honest peer fares while hostile hosts are at work: how long its reads of blocks take, or the router's answers
to its heartbeats, alone and beside each attack.

    python -m tests.pool.net.attacks [--seconds 3] [--port pool] [--only NAME] [--rounds 1] [--json FILE]

The port's process, the attackers and the honest peer are processes of their own; the attackers run where nobody else
would, as they stand for other machines. The honest peer asks every 5 ms: a pool node and a relay for 256 KiB, of
memory and of a drive in turn, the router with a heartbeat. A line is printed for each attack, with the ratio of its
99th percentile to the peer's alone. `first s` is how long a peer took that came in the middle of it. Where others use
the machine too, `--rounds` measures each that often, and takes the round with the lowest 99th percentile.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import resource
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from penstock.pool.checksum import block_checksum
from penstock.pool.net import wire
from penstock.pool.net.remote import RemotePool
from penstock.units import parse_address
from tests.flood import flooded, percentile, write_rows
from tests.flooded import ATTACKED_BLOCK_BYTES, ATTACKED_KEYS
from tests.pool.helpers import block_bytes, key_of, write
from tests.pool.net.peer_attacks import (
    ATTACKS,
    EVERY_ATTACK,
    LARGE_BYTES,
    LARGE_KEYS,
    Kind,
    Lane,
    Port,
    RegisteredEngine,
    parse_attack_flags,
)

HONEST = "127.0.0.9"
EVERY_S = 0.005
WARM_UP_S = 0.7  # of each attack, before the peer is measured
_SPAWN = multiprocessing.get_context("spawn")


@dataclass
class Measured:
    """Of one attack; the times of the honest peer's questions, and the port's process after it."""

    port: str
    attack: str
    answers: int
    p50_s: float
    p99_s: float
    max_s: float
    connect_s: float
    rss_mb: int
    threads: int
    files: int


def attack(name: str, port: Port, stop: Any) -> None:
    """An attacker's process."""
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    os.setsid()  # Linux shares the CPU among sessions first
    with contextlib.suppress(OSError):
        Path("/proc/self/autogroup").write_text("19")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    ended = threading.Event()
    threading.Thread(target=lambda: (stop.wait(), ended.set()), daemon=True).start()
    ATTACKS[port.kind][name](port, ended)


@contextlib.contextmanager
def attacked(name: str, port: Port) -> Iterator[None]:
    stop = _SPAWN.Event()
    process = _SPAWN.Process(target=attack, args=(name, port, stop), daemon=True)
    process.start()
    try:
        time.sleep(WARM_UP_S)
        yield
        assert process.is_alive(), f"{name} ended by itself"
    finally:
        stop.set()
        process.join(5)
        if process.is_alive():
            process.kill()


def fill(port: Port) -> list[wire.Read]:
    """Put the honest peer's blocks there, and those that attackers read; returns what it asks for, in turn."""
    if port.kind == "relay":
        made, keys = port.lane("write", HONEST), ATTACKED_KEYS[:2]
        for key in keys:
            data = block_bytes(key, ATTACKED_BLOCK_BYTES)
            message = wire.Write(1, key, bytes(16), len(data), 0, b"", 0.0, block_checksum(key, memoryview(data)), 60.0)
            made.sock.sendall(wire.frame(message, len(data)) + data)
            assert isinstance(made.reply(), wire.Written)
        made.sock.close()
        return [wire.Read(1, key, ATTACKED_BLOCK_BYTES, 60.0) for key in keys]
    client = RemotePool(*port.address, secret=port.secret)
    for key in LARGE_KEYS:
        assert write(client, key, size_bytes=LARGE_BYTES) == "ok"
    of_member: dict[str, bytes] = {}
    for number in range(64):
        key = key_of(("honest", number))
        assert write(client, key, size_bytes=ATTACKED_BLOCK_BYTES) == "ok"
        [found] = client.lookup([key], 5.0)
        assert found is not None
        of_member.setdefault(found.route[0].partition("@")[0], key)
    client.close(5.0)
    assert len(of_member) == 2, of_member
    return [wire.Read(1, key, ATTACKED_BLOCK_BYTES, 60.0) for key in of_member.values()]


def question(port: Port, reads: list[wire.Read]) -> Callable[[int], None]:
    """Connects as the honest peer; returns what asks once and waits for the answer."""
    if port.kind == "router":
        engine: RegisteredEngine = port.engine("honest", HONEST)

        def beat(number: int) -> None:
            engine.send(engine.heartbeat(number))
            engine.receive()

        return beat
    lane: Lane = port.lane("read", HONEST)

    def read(number: int) -> None:
        lane.send(reads[number % len(reads)])
        reply = lane.reply()
        assert isinstance(reply, wire.Block), reply

    return read


def honest(port: Port, reads: list[wire.Read], seconds: float, pipe: Any) -> None:
    """The honest peer's process: sends how long each question took, and how long its connection."""
    begin_s = time.monotonic()
    ask = question(port, reads)
    connect_s = time.monotonic() - begin_s
    times: list[float] = []
    end_s = time.monotonic() + seconds
    while (now_s := time.monotonic()) < end_s:
        ask(len(times))
        times.append(time.monotonic() - now_s)
        time.sleep(max(0.0, now_s + EVERY_S - time.monotonic()))
    pipe.send((times, connect_s))


def measure(name: str, port: Port, reads: list[wire.Read], server: psutil.Process, seconds: float) -> Measured:
    """The honest peer beside an attack that goes on already."""
    ours, theirs = _SPAWN.Pipe()
    process = _SPAWN.Process(target=honest, args=(port, reads, seconds, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        if not ours.poll(seconds + 60.0):
            raise TimeoutError(f"the honest peer did not end beside {name}")
        times, connect_s = ours.recv()
    finally:
        process.kill()
        process.join()
    memory = server.memory_info().rss >> 20
    p50_s, p99_s = percentile(times, 0.5), percentile(times, 0.99)
    state = memory, server.num_threads(), server.num_fds()
    return Measured(port.kind, name, len(times), p50_s, p99_s, max(times), connect_s, *state)


def measure_port(kind: Kind, names: list[str], seconds: float, rounds: int) -> Iterator[Measured]:
    """Alone first, then beside each attack."""

    def quietest(name: str) -> Measured:
        return min((measure(name, port, reads, server, seconds) for _ in range(rounds)), key=lambda one: one.p99_s)

    with (
        tempfile.TemporaryDirectory(prefix="penstock-attacks-") as folder,
        flooded(*(["router"] if kind == "router" else [f"attacked-{kind}", folder])) as (pid, place),
    ):
        port, server = Port(kind, parse_address(place)), psutil.Process(pid)
        reads = [] if kind == "router" else fill(port)
        measure("warm-up", port, reads, server, 0.5)
        yield quietest("alone")
        for name in names:
            with attacked(name, port):
                found = quietest(name)
            yield found
            time.sleep(0.5)
        yield quietest("alone again")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=3.0, help="for how long the peer is measured each time")
    given = parse_attack_flags(parser)
    columns = ("port", "attack", "answers", "p50 ms", "p99 ms", "ratio", "max ms", "first s", "MB", "threads", "files")
    print("{:6} {:27} {:>7} {:>7} {:>7} {:>6} {:>7} {:>7} {:>5} {:>7} {:>5}".format(*columns))
    rows: list[Measured] = []
    for kind in given.port or ATTACKS:
        alone: Measured | None = None
        names = [name for name in given.only or EVERY_ATTACK if name in ATTACKS[kind]]
        for one in measure_port(kind, names, given.seconds, given.rounds):
            rows.append(one)
            alone = alone or one
            after = f"{one.connect_s:7.2f} {one.rss_mb:5} {one.threads:7} {one.files:5}"
            p50, p99, longest = (seconds * 1e3 for seconds in (one.p50_s, one.p99_s, one.max_s))
            times = f"{p50:7.2f} {p99:7.2f} {one.p99_s / alone.p99_s:6.2f} {longest:7.1f}"
            print(f"{kind:6} {one.attack:27} {one.answers:7} {times} {after}", flush=True)
    if given.json is not None:
        write_rows(given.json, rows)


if __name__ == "__main__":
    main()
