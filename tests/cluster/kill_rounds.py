"""kill -9 of the processes of a real cluster at random times under load: no client gets a wrong or doubled token.

By hand: `python -m tests.cluster.kill_rounds 100` kills 100 times and prints the counts; `20 --seed 2` are 20 rounds of
other times and victims, `--out FOLDER` keeps what the processes said, `--fronts 2` gives the router front processes,
which are killed, too. The tests run a few rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import httpx

from penstock.cluster.deploy.cluster_config import read_cluster_config
from penstock.cluster.deploy.supervisor import Child, Supervisor
from penstock.cluster.deploy.up_command import _make_secret
from penstock.testing.tiny_models import build_tiny

Question = dict[str, Any]  # the fields of a body, beside those that each has

TOKENS = 24
PROMPTS = 12
CLIENTS = 3
PAUSE_S = 0.05  # of a client between two requests: processes that start again need the processors too
REQUEST_S = 60.0
TRIES_S = 120.0
BACK_S = 120.0
CLUSTER = """
model = "model"
[router]
port = {port}
lease_s = 3.0
fronts = 1
[[pool]]
memory = ["32MiB"]
[serve]
kv_memory = "4MiB"
staging = "2MiB"
block_tokens = 16
[[engine]]
role = "prefill"
node = "a"
[[engine]]
role = "decode"
node = "b"
count = 2
buffer = "4MiB"
hand_off_timeout_s = 20.0
"""


def prompts() -> list[list[int]]:
    """Several prefixes, shared by some of them."""
    generator = random.Random(7)
    heads = [[generator.randrange(6, 370) for _ in range(64)] for _ in range(3)]
    tails = [[generator.randrange(6, 370) for _ in range(8 + number)] for number in range(PROMPTS)]
    return [heads[number % 3] + tail for number, tail in enumerate(tails)]


def questions() -> list[Question]:
    """What clients ask, greedily."""
    return [{"prompt": prompt, "temperature": 0} for prompt in prompts()]


@dataclass
class Counts:
    """What clients saw; `wrong` are answers that differ from the reference."""

    answers: int = 0
    retried: int = 0
    wrong: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    kills: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0


class RoundsFailed(AssertionError):
    """The cluster did not come back."""


def ask(url: str, question: Question, request_id: str) -> list[int]:
    """One streamed answer's tokens. Raises httpx.HTTPError or ValueError when it did not come to its end."""
    body = {"max_tokens": TOKENS, "ignore_eos": True, "stream": True, "return_token_ids": True} | question
    found: list[int] = []
    done = False
    with httpx.stream(
        "POST", f"{url}/v1/completions", json=body, headers={"x-request-id": request_id}, timeout=REQUEST_S
    ) as response:
        if response.status_code != 200:
            response.read()
            raise ValueError(f"status {response.status_code}: {response.text[:200]}")
        for line in response.iter_lines():
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                done = True
                break
            event = json.loads(line[6:])
            if "error" in event:
                raise ValueError(str(event["error"])[:200])
            for choice in event["choices"]:
                found += choice.get("token_ids") or []
    if not done:
        raise ValueError("the stream ended early")
    return found


class Load:
    """Clients that ask one request after another, retry what failed under the same id, and compare with the
    reference."""

    def __init__(
        self, url: str, reference: list[list[int]], seed: int, asked: Sequence[Question] = (), tries_s: float = TRIES_S
    ) -> None:
        """They ask `asked`, else `questions()`, each for `tries_s`."""
        self.counts = Counts()
        self._url = url
        self._reference = reference
        self._questions = asked or questions()
        self._tries_s = tries_s
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(seed + i,), daemon=True) for i in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> Counts:
        self._stop.set()
        for thread in self._threads:
            thread.join(self._tries_s + REQUEST_S)
        return self.counts

    def _run(self, seed: int) -> None:
        generator = random.Random(seed)
        number = 0
        while not self._stop.is_set():
            number += 1
            self._one(generator.randrange(len(self._questions)), f"client-{seed}-{number}")
            self._stop.wait(PAUSE_S)

    def _one(self, which: int, request_id: str) -> None:
        begin_s, tries, why = time.monotonic(), 0, ""
        while time.monotonic() - begin_s < self._tries_s:
            tries += 1
            try:
                tokens = ask(self._url, self._questions[which], request_id)
            except (httpx.HTTPError, ValueError) as error:
                why = str(error)
                time.sleep(0.2)
                continue
            with self._lock:
                self.counts.answers += 1
                self.counts.retried += tries > 1
                self.counts.slowest_s = max(self.counts.slowest_s, time.monotonic() - begin_s)
                if tokens != self._reference[which]:
                    self.counts.wrong.append(f"{request_id}: {tokens} instead of {self._reference[which]}")
            return
        with self._lock:
            self.counts.failed.append(f"{request_id}: {why}")


def engines_up(supervisor: Supervisor) -> bool:
    """Whether every process lives and every engine is registered."""
    wanted = {child.spec.name for child in supervisor.children.values() if child.spec.kind == "engine"}
    if not all(child.ready.is_set() and alive(child) for child in supervisor.children.values()):
        return False
    try:
        hosts = httpx.get(f"{supervisor.url}/ui/data", timeout=5.0).json()["hosts"]
    except (httpx.HTTPError, ValueError, KeyError):
        return False
    return {engine["name"] for host in hosts for engine in host["engines"]} == wanted


def alive(child: Child) -> bool:
    try:
        return open(f"/proc/{child.pid}/stat").read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def until_up(supervisor: Supervisor, back_s: float = BACK_S) -> None:
    """Raises RoundsFailed."""
    end = time.monotonic() + back_s
    while not engines_up(supervisor):
        supervisor.watch()
        if time.monotonic() > end:
            raise RoundsFailed(f"the cluster did not come back within {back_s:g} s")
        time.sleep(0.05)


def free_port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


@contextlib.contextmanager
def running(
    folder: Path, described: str = CLUSTER, asked: Sequence[Question] = (), back_s: float = BACK_S
) -> Iterator[tuple[Supervisor, list[list[int]]]]:
    """A cluster in `folder`, and the answers it gives undisturbed to `asked`, else to `questions()`."""
    if not (folder / "model").exists():
        build_tiny("llama", folder / "model", seed=5)
    file = folder / "cluster.toml"
    file.write_text(described.format(port=free_port()))
    cluster = read_cluster_config(file)
    if cluster.secret_file is not None:
        _make_secret(cluster.secret_file)
    lines: list[str] = []
    supervisor = Supervisor(cluster.processes, lambda name, line: lines.append(f"{name} | {line}"))
    try:
        supervisor.start(back_s)
        until_up(supervisor, back_s)
        yield supervisor, [ask(supervisor.url, one, f"reference-{i}") for i, one in enumerate(asked or questions())]
    finally:
        supervisor.stop()
        (folder / "output.txt").write_text("\n".join(lines))


def kill_rounds(
    folder: Path, rounds: int, seed: int = 1, kinds: tuple[str, ...] = (), show: bool = False, fronts: int = 1
) -> Counts:
    """Start a cluster in `folder`, kill `rounds` times (of these kinds, in turn; at random when there are none given),
    end it. With several `fronts` each second victim is one of them."""
    generator = random.Random(seed)
    with running(folder, CLUSTER.replace("fronts = 1", f"fronts = {fronts}")) as (supervisor, reference):
        load = Load(supervisor.url, reference, seed * 1000)
        try:
            for number in range(rounds):
                until_s = time.monotonic() + generator.uniform(0.1, 2.0)
                while time.monotonic() < until_s:
                    supervisor.watch()
                    time.sleep(0.02)
                chosen = [
                    c for c in supervisor.children.values() if not kinds or c.spec.kind == kinds[number % len(kinds)]
                ]
                if fronts > 1 and number % 2 == 0:
                    kill_front(generator, supervisor, load.counts)
                else:
                    kill(generator.choice(chosen), supervisor, load.counts)
                if show:
                    now = load.counts
                    print(f"{number + 1}: {sum(now.kills.values())} kills; {now.answers} answers, {now.retried} "
                          f"retried, {len(now.wrong)} wrong, {len(now.failed)} failed", flush=True)  # fmt: skip
        finally:
            counts = load.stop()
        return counts


def kill(victim: Child, supervisor: Supervisor, counts: Counts) -> None:
    """kill -9, until everything is up again."""
    counts.kills[victim.spec.kind if victim.spec.kind != "engine" else victim.spec.name] += 1
    victim.ready.clear()
    os.kill(victim.pid, signal.SIGKILL)
    until_up(supervisor)


def kill_front(generator: random.Random, supervisor: Supervisor, counts: Counts) -> None:
    """kill -9 of a front process of the router, until another one answers."""
    router = supervisor.children["router"].pid
    fronts = Path(f"/proc/{router}/task/{router}/children").read_text().split()
    os.kill(int(generator.choice(fronts)), signal.SIGKILL)
    counts.kills["front"] += 1
    until_up(supervisor)


def conclude(result: Counts, seconds: float) -> NoReturn:
    """Print what the rounds came to; the exit status says whether an answer was wrong or lost."""
    print(f"{sum(result.kills.values())} kills {dict(result.kills)} in {seconds:.0f} s: "
          f"{result.answers} answers, {result.retried} after a retry, {len(result.wrong)} wrong, "
          f"{len(result.failed)} failed, the slowest after {result.slowest_s:.1f} s")  # fmt: skip
    for line in result.wrong + result.failed:
        print(line)
    sys.exit(bool(result.wrong or result.failed))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rounds", type=int, nargs="?", default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--fronts", type=int, default=1)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        begin = time.monotonic()
        result = kill_rounds(asked.out or Path(temporary), asked.rounds, asked.seed, show=True, fronts=asked.fronts)
        conclude(result, time.monotonic() - begin)
