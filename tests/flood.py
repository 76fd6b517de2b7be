"""What a process holds, and floods of connections against its ports: for tests that it holds no more afterwards.

`usage(pid)` counts memory, threads and descriptors; `Flat` compares them before and after a flood, with the warm-up
that the caller gives. `cut_connections` opens connections and cuts them at random points of what it is given to say;
`said_and_ended` sends bytes over one connection and waits until the other end closes it. `flooded` is a process with a
port to flood. `write_rows` keeps what a program of attacks measured.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import random
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.children import with_tests

WAIT_S = 60.0
_LINGER_NONE = struct.pack("ii", 1, 0)

Connect = Callable[[], socket.socket]


@dataclass(frozen=True)
class Usage:
    """Of one process."""

    rss_bytes: int
    threads: int
    descriptors: int


def usage(pid: int | None = None) -> Usage:
    """Of that process; None: of this one."""
    folder = Path(f"/proc/{pid if pid is not None else 'self'}")
    lines = (folder / "status").read_text().splitlines()
    status = {name: value for name, _, value in (line.partition(":") for line in lines)}
    return Usage(int(status["VmRSS"].split()[0]) << 10, int(status["Threads"]), len(os.listdir(folder / "fd")))


class Flat:
    """Holds a process to what it holds now."""

    def __init__(self, pid: int | None = None) -> None:
        """Once its threads and descriptors stay the same for a moment: what ended just now is being put away."""
        self._pid = pid
        same, until_s = 0, time.monotonic() + WAIT_S
        self.before = usage(pid)
        while same < 5 and time.monotonic() < until_s:
            time.sleep(0.05)
            now = usage(pid)
            same = same + 1 if (now.threads, now.descriptors) == (self.before.threads, self.before.descriptors) else 0
            self.before = now

    def check(self, grown_bytes_max: int, wait_s: float = WAIT_S) -> str:
        """Wait until threads and descriptors are no more than before and memory has grown by `grown_bytes_max` at most;
        AssertionError with both figures when they do not become so. Returns one line with the figures."""
        until_s = time.monotonic() + wait_s
        while True:
            now, before = usage(self._pid), self.before
            told = f"before {before}, after {now}"
            flat = now.threads <= before.threads and now.descriptors <= before.descriptors
            if flat and now.rss_bytes <= before.rss_bytes + grown_bytes_max:
                return told
            assert time.monotonic() < until_s, f"not flat within {wait_s:g} s: {told}"
            time.sleep(0.05)


def connect_to(address: tuple[str, int], timeout_s: float = WAIT_S, source: str = "") -> Connect:
    """`source`: the address of this host that the connections come from."""
    return lambda: socket.create_connection(address, timeout_s, (source, 0) if source else None)


def reset(sock: socket.socket) -> None:
    """Close with a reset: the other end hears of it at once, and this host keeps no port in TIME_WAIT."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NONE)
    sock.close()


def cut_connections(connect: Connect, said: Sequence[bytes], count: int, open_at_once: int = 64, seed: int = 0) -> None:
    """`count` connections, each of which says a random beginning of one of `said` and is cut; half of them are reset.
    At most `open_at_once` are open. Where the other end closes first, or refuses, that is as good."""
    draw = random.Random(seed)
    opened: list[socket.socket] = []

    def cut_one() -> None:
        sock = opened.pop(draw.randrange(len(opened)))
        if draw.random() < 0.5:
            reset(sock)
        else:
            sock.close()

    for _ in range(count):
        if len(opened) >= open_at_once:
            cut_one()
        try:
            sock = connect()
        except OSError:
            continue
        whole = draw.choice(said)
        with contextlib.suppress(OSError):
            sock.sendall(whole[: draw.randrange(len(whole) + 1)])
        opened.append(sock)
    while opened:
        cut_one()


def said_and_ended(connect: Connect, data: bytes, timeout_s: float = WAIT_S) -> bytes:
    """Send `data` over a new connection and wait until the other end closes it; returns what it said. TimeoutError
    when it stays open."""
    with connect() as sock:
        sock.settimeout(timeout_s)
        said = bytearray()
        with contextlib.suppress(ConnectionError):
            sock.sendall(data)
        with contextlib.suppress(ConnectionError):
            while part := sock.recv(1 << 16):
                said += part
        return bytes(said)


def percentile(times_s: Sequence[float], share: float) -> float:
    """The time within which that share of them lies."""
    ordered = sorted(times_s)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


@contextlib.contextmanager
def flooded(*what: str) -> Iterator[tuple[int, str]]:
    """A process with that port (arguments of `tests.flooded`): its number, and where it listens."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "tests.flooded", *what], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True, env=with_tests(),
    )  # fmt: skip
    try:
        assert process.stdout is not None
        place = process.stdout.readline().strip()
        assert place, "it did not begin"
        yield process.pid, place
        assert process.poll() is None, "it ended"
    finally:
        process.kill()
        process.communicate()


def write_rows(path: Path, rows: Sequence[Any]) -> None:
    """What a program of attacks measured (dataclasses), with its command and this machine, as JSON."""
    machine = {"cores": os.cpu_count(), "python": platform.python_version(), "kernel": platform.release()}
    command = " ".join(["python", *sys.argv])
    path.write_text(json.dumps({"command": command, **machine, "rows": [asdict(one) for one in rows]}, indent=1))
