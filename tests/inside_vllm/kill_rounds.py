"""kill -9 of the processes of a cluster of stock vLLMs under load: no client gets a wrong or doubled token.

By hand: `python -m tests.inside_vllm.kill_rounds 24 --seed 2` kills 24 times and prints the counts; `--out FOLDER`
keeps what the processes said. Killed are the pool node, the router, each engine's agent, and one process of each
engine's vLLM, in an order that the seed gives. With `--ranks 2` the prefill vLLM has two tensor parallel ranks, which
takes longer to start.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import httpx
import psutil

from penstock.cluster.deploy.supervisor import Child, Supervisor
from tests.cluster.kill_rounds import Counts, Load, Question, RoundsFailed, alive, conclude, running, until_up
from tests.inside_vllm.cluster_rig import ENVIRONMENT, VLLM_FLAGS, wait_gone
from tests.inside_vllm.vllm_rig import BLOCK, build_model, prompt_of, wait_until

TOKENS = 64
BACK_S = 600.0  # an engine's vLLM starts anew, perhaps on two busy cores
ENDS_S = 180.0  # an agent whose vLLM was killed, and a vLLM whose agent was
ENGINES = ("prefill agent", "prefill vllm", "decode agent", "decode vllm")
DECK = (*["pool"] * 3, *["router"] * 3, *ENGINES)  # what starts quickly comes more often
CLUSTER = """
model = "model"
[router]
port = {{port}}
lease_s = 3.0
[[pool]]
memory = ["128MiB"]
[[engine]]
role = "prefill"
engine = "vllm"
name = "prefill"
node = "a"
port = 0
staging = "48MiB"
vllm = [{prefill}]
[[engine]]
role = "decode"
engine = "vllm"
name = "decode"
node = "b"
port = 0
staging = "48MiB"
buffer = "8MiB"
vllm = [{decode}]
"""


def described(prefill_ranks: int) -> str:
    """The file of the cluster, but for its port."""
    words = [*VLLM_FLAGS, "--tp-independent"]
    of_role = {"prefill": [*words, "--tensor-parallel-size", str(prefill_ranks)], "decode": words}
    return CLUSTER.format(**{role: json.dumps(given)[1:-1] for role, given in of_role.items()})


def asked() -> list[Question]:
    """Three prefixes of four blocks with four tails each: greedy, with a seed, and one that vLLM's own API answers."""
    kinds: list[Question] = [
        {"temperature": 0},
        {"temperature": 0},
        {"temperature": 0.8, "seed": 7},
        {"temperature": 0, "logprobs": 1},
    ]
    return [
        {"prompt": [*prompt_of(prefix, 4 * BLOCK), *prompt_of(90 + tail, 20 + 15 * tail)], "max_tokens": TOKENS} | kind
        for prefix in range(3)
        for tail, kind in enumerate(kinds)
    ]


VLLM_ENVIRONMENT = ENVIRONMENT | {  # of all that this process starts
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


@contextlib.contextmanager
def vllms(folder: Path, prefill_ranks: int = 1) -> Iterator[tuple[Supervisor, list[list[int]]]]:
    """A cluster of vLLMs in `folder`, and the answers it gives undisturbed; VLLM_ENVIRONMENT is to be set."""
    if not (folder / "model").exists():
        build_model("llama", folder / "model")
    with running(folder, described(prefill_ranks), asked(), BACK_S) as found:
        yield found


class Rounds:
    """Kills in a running cluster."""

    def __init__(self, supervisor: Supervisor, seed: int) -> None:
        self._supervisor = supervisor
        self._draws = random.Random(seed)
        self._deck: list[str] = []

    def next_victim(self) -> str:
        """Each of DECK comes once before any comes again."""
        if not self._deck:
            self._deck = self._draws.sample(DECK, len(DECK))
        return self._deck.pop()

    def pause(self) -> None:
        """A random while, in which the load goes on."""
        until_s = time.monotonic() + self._draws.uniform(0.1, 3.0)
        while time.monotonic() < until_s:
            self._supervisor.watch()
            time.sleep(0.02)

    def kill(self, victim: str, counts: Counts) -> None:
        """kill -9, until everything is up again, and nothing is left of what depended on it."""
        name, _, part = victim.partition(" ")
        child = next(c for c in self._supervisor.children.values() if name in (c.spec.kind, c.spec.name))
        tree = [psutil.Process(child.pid), *psutil.Process(child.pid).children(recursive=True)]
        one = tree[0] if part != "vllm" else self._draws.choice(_of_vllm(tree))
        counts.kills[victim] += 1
        child.ready.clear()
        one.send_signal(signal.SIGKILL)
        if part == "vllm":
            self._wait_ended(child, child.pid)
        until_up(self._supervisor, BACK_S)
        wait_gone(tree, ENDS_S)

    def _wait_ended(self, child: Child, pid: int) -> None:
        end_s = time.monotonic() + ENDS_S
        while child.pid == pid and alive(child):
            if time.monotonic() > end_s:
                raise RoundsFailed(f"{child.spec.name} did not end within {ENDS_S:g} s of its vLLM")
            time.sleep(0.05)

    def wait_settled(self) -> None:
        """Nothing of the requests is left in an engine: neither in vLLM nor in its connector."""
        for child in self._supervisor.children.values():
            if child.spec.kind == "engine":
                wait_until(partial(_is_idle, child.address), f"{child.spec.name} is idle", look_every_s=0.2)


def _of_vllm(tree: Sequence[psutil.Process]) -> list[psutil.Process]:
    """The API server, the engine core and its workers."""
    return [one for one in tree[1:] if "resource_tracker" not in " ".join(one.cmdline())]


def _is_idle(url: str) -> bool:
    figures = dict(
        line.rsplit(" ", 1) for line in httpx.get(f"{url}/metrics").text.splitlines() if not line.startswith("#")
    )
    free, total = (float(figures[f"penstock_engine_l1_pages_{name}"]) for name in ("available", "total"))
    return float(figures["penstock_engine_requests_in_vllm"]) == 0 and free >= total - 1  # one of vLLM's is never free


def kill_rounds(
    supervisor: Supervisor, reference: list[list[int]], victims: Sequence[str] | int, seed: int = 1, show: bool = False
) -> Counts:
    """Kill these victims, or so many of DECK, while clients ask. Raises RoundsFailed or AssertionError."""
    rounds = Rounds(supervisor, seed)
    load = Load(supervisor.url, reference, seed * 1000, asked(), 2 * BACK_S)
    try:
        for number in range(victims if isinstance(victims, int) else len(victims)):
            rounds.pause()
            victim = rounds.next_victim() if isinstance(victims, int) else victims[number]
            begin_s = time.monotonic()
            rounds.kill(victim, load.counts)
            if show:
                now = load.counts
                print(f"{number + 1}: {victim}, up again after {time.monotonic() - begin_s:.1f} s; {now.answers} "
                      f"answers, {now.retried} retried, {len(now.wrong)} wrong, {len(now.failed)} failed",
                      flush=True)  # fmt: skip
    finally:
        counts = load.stop()
    rounds.wait_settled()
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rounds", type=int, nargs="?", default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        begin = time.monotonic()
        os.environ.update(VLLM_ENVIRONMENT)
        with vllms(given.out or Path(temporary), given.ranks) as (started, answers):
            result = kill_rounds(started, answers, given.rounds, given.seed, show=True)
        conclude(result, time.monotonic() - begin)
