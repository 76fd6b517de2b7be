"""How a client fares while hostile hosts are at work at the ports where Penstock's processes meet: its time between
tokens, alone and beside each attack of `tests.pool.net.peer_attacks`.

    python -m tests.cluster.attacks [--seconds 5] [--port pool] [--only NAME] [--rounds 1] [--json FILE]

The cluster is one of `penstock up`: a pool node with memory and a drive, the router, a prefill and a decode engine with
a tiny model, processes of their own. The client streams one answer after the other through the router. Half of each
prompt is new and half lies in the pool; the KV goes over the decode engine's relay between the first two tokens. A line
is printed for each attack, with the ratio of its 99th percentile to the client's alone. The attackers run where nobody
else would, as they stand for other machines; the hosts that are attacked share this one with the client's engines.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import socket
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penstock.pool.net.secret import Secret
from tests.cluster.kill_rounds import free_port, running
from tests.flood import percentile, write_rows
from tests.pool.net.attacks import HONEST, attacked, fill
from tests.pool.net.peer_attacks import ATTACKS, Kind, Port, parse_attack_flags
from tests.server.attack_kinds import Target

TOKENS = 64
PROMPT_TOKENS = 256  # half of them shared with other prompts
CLUSTER = """
model = "model"
[router]
port = {{port}}
cluster_listen = "127.0.0.1:{router}"
[[pool]]
memory = ["256MiB"]
slab = ["{folder}/kv.slab:256MiB"]
weight = [1.0, 1.0]
listen = "127.0.0.1:{pool}"
[serve]
kv_memory = "16MiB"
staging = "8MiB"
block_tokens = 16
[[engine]]
role = "prefill"
node = "a"
[[engine]]
role = "decode"
node = "b"
buffer = "16MiB"
relay_listen = "127.0.0.1:{relay}"
"""


@dataclass
class Measured:
    """Of one attack; seconds between the client's tokens, and until the first ones."""

    port: str
    attack: str
    answers: int
    tokens: int
    p50_s: float
    p99_s: float
    max_s: float
    first_p50_s: float
    first_max_s: float


class Client:
    """Over one connection, from an address of its own."""

    def __init__(self, url: str) -> None:
        host, _, port = url.removeprefix("http://").rpartition(":")
        self._target = Target(host, int(port))
        self._sock = socket.create_connection(self._target.address, 60.0, (HONEST, 0))
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._draw = random.Random(1)
        self._shared = [self._tokens() for _ in range(8)]

    def _tokens(self) -> list[int]:
        return [self._draw.randrange(6, 370) for _ in range(PROMPT_TOKENS // 2)]

    def answer(self) -> list[float]:
        """When each part of one answer came, first when it was asked for."""
        prompt = self._draw.choice(self._shared) + self._tokens()
        body: dict[str, Any] = {"prompt": prompt, "max_tokens": TOKENS, "stream": True, "ignore_eos": True}
        times, said = [time.monotonic()], b""
        self._sock.sendall(self._target.post(json.dumps(body | {"temperature": 0}).encode()))
        while not said.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
            part = self._sock.recv(1 << 16)
            assert part, "the stream ended"
            said += part
            if b"data: {" in part:
                times.append(time.monotonic())
        assert said.startswith(b"HTTP/1.1 200") and b'"error"' not in said, said[:300]
        return times


def measure(kind: str, name: str, client: Client, seconds: float) -> Measured:
    """The client beside an attack that goes on already."""
    gaps: list[float] = []
    first: list[float] = []
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s:
        asked_s, *times = client.answer()
        first.append(times[0] - asked_s)
        gaps += [after - before for before, after in itertools.pairwise(times)]
    p50_s, p99_s = percentile(gaps, 0.5), percentile(gaps, 0.99)
    return Measured(kind, name, len(first), len(gaps), p50_s, p99_s, max(gaps), percentile(first, 0.5), max(first))


def measure_all(kinds: list[Kind], only: list[str], seconds: float, rounds: int) -> Iterator[Measured]:
    """Of each port: alone first, then beside each attack, then alone again."""

    def quietest(kind: str, name: str) -> Measured:
        return min((measure(kind, name, client, seconds) for _ in range(rounds)), key=lambda one: one.p99_s)

    places = {kind: free_port() for kind in ATTACKS}
    with (
        tempfile.TemporaryDirectory(prefix="penstock-attacks-") as folder,
        running(Path(folder), CLUSTER.format(folder=folder, **places)) as (supervisor, _),
    ):
        secret = Secret.read(Path(folder) / "secret")
        ports = {kind: Port(kind, ("127.0.0.1", places[kind]), secret) for kind in ATTACKS}
        fill(ports["pool"])
        client = Client(supervisor.url)
        measure("", "warm-up", client, 2.0)
        for kind in kinds:
            yield quietest(kind, "alone")
            for name in [name for name in only or ATTACKS[kind] if name in ATTACKS[kind]]:
                with attacked(name, ports[kind]):
                    found = quietest(kind, name)
                yield found
                time.sleep(0.5)
            yield quietest(kind, "alone again")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=5.0, help="for how long the client is measured each time")
    given = parse_attack_flags(parser)
    columns = ("port", "attack", "answers", "tokens", "p50 ms", "p99 ms", "ratio", "max ms", "first ms", "max")
    print("{:6} {:27} {:>7} {:>6} {:>7} {:>7} {:>6} {:>7} {:>8} {:>7}".format(*columns))
    rows: list[Measured] = []
    alone_s = 0.0
    for one in measure_all(given.port or list(ATTACKS), given.only or [], given.seconds, given.rounds):
        rows.append(one)
        alone_s = one.p99_s if one.attack == "alone" else alone_s
        p50, p99, longest = (seconds * 1e3 for seconds in (one.p50_s, one.p99_s, one.max_s))
        times = f"{p50:7.2f} {p99:7.2f} {one.p99_s / alone_s:6.2f} {longest:7.1f}"
        first = f"{one.first_p50_s * 1e3:8.1f} {one.first_max_s * 1e3:7.1f}"
        print(f"{one.port:6} {one.attack:27} {one.answers:7} {one.tokens:6} {times} {first}", flush=True)
    if given.json is not None:
        write_rows(given.json, rows)


if __name__ == "__main__":
    main()
