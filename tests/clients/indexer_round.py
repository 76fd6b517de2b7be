"""Dynamo's KV indexer beside `penstock serve`, in a network namespace of their own: what it has learned, as JSON.

The indexer listens on every address and has no key, so it gets a network that nobody else is in."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from typing import Any

from tests.clients.client_rig import WAIT_S, Server, serve

BLOCK, PROMPT_BLOCKS, POOL_BLOCKS, PROMPTS = 16, 5, 16, 25
INDEXER = "http://127.0.0.1:8090"
EVENTS, REPLAY = "tcp://127.0.0.1:5557", "tcp://127.0.0.1:5558"
SERVE = ["-m", "penstock", "serve", "--executor", "modelled", "--bytes-divisor", "1024", "--time-factor", "0.01"]
SERVE += ["--kv-memory", "1MiB", "--staging", "1MiB", "--memory", "64KiB", "--block-tokens", str(BLOCK), "--port", "0"]
SERVE += ["--served-model-name", "m", "--kv-events", EVENTS, "--kv-events-replay", REPLAY]


def ask(url: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=WAIT_S) as answer:
        text = answer.read().decode()
    return json.loads(text) if text.startswith(("{", "[")) else text


def prompt(number: int) -> list[int]:
    """The first two have several blocks. The others have one: of a longer one that is being saved a leaf may leave
    before its child is there, and what the pool holds behind it is no prefix."""
    blocks = PROMPT_BLOCKS if number < 3 else 1
    return list(range(1000 * number, 1000 * number + blocks * BLOCK))


def matched(number: int) -> int:
    """Tokens of a prompt that the indexer believes host memory of instance 1 to hold."""
    found = ask(f"{INDEXER}/query", {"token_ids": prompt(number), "model_name": "m"})
    return int(found["instances"].get("1", {}).get("cpu", 0))


def blocks_of(server: Server) -> int:
    return int(server.metric("penstock_engine_pool_member_blocks"))


def until(wanted: int, *numbers: int) -> int:
    """What is matched of prompts in the end: `wanted`, or something else after a quarter of WAIT_S."""
    deadline_s = time.monotonic() + WAIT_S / 4
    while (found := sum(map(matched, numbers))) != wanted and time.monotonic() < deadline_s:
        time.sleep(0.05)
    return found


def main() -> None:
    indexer = subprocess.Popen([sys.executable, "-m", "dynamo.indexer", "--port", "8090"], stdout=sys.stderr)
    try:
        with serve(SERVE, "m") as server:
            complete(server.url, 1)  # before the indexer listens: it asks for it again
            wait_for_indexer()
            worker = {"instance_id": 1, "endpoint": EVENTS, "replay_endpoint": REPLAY, "model_name": "m"}
            ask(f"{INDEXER}/register", worker | {"block_size": BLOCK})
            complete(server.url, 2)
            whole = PROMPT_BLOCKS * BLOCK
            learned = {"live": until(whole, 2), "replayed": until(whole, 1), "unknown": matched(3)}
            for number in range(3, PROMPTS):  # more than the pool holds
                complete(server.url, number)
            held = BLOCK * POOL_BLOCKS  # it evicts leaves, so what it holds are prefixes
            learned |= {"known": until(held, *range(1, PROMPTS)), "held": BLOCK * blocks_of(server)}
            learned["dropped"] = int(server.metric("penstock_engine_kv_events_dropped_total"))
    finally:
        indexer.terminate()
        indexer.wait(WAIT_S)
    print(json.dumps(learned))


def wait_for_indexer() -> None:
    deadline_s = time.monotonic() + WAIT_S
    while True:
        try:
            ask(f"{INDEXER}/health")
            return
        except (urllib.error.URLError, ConnectionError):
            assert time.monotonic() < deadline_s, "the indexer did not start"
            time.sleep(0.05)


def complete(url: str, number: int) -> None:
    ask(f"{url}/v1/completions", {"model": "m", "prompt": prompt(number), "max_tokens": 2})


if __name__ == "__main__":
    main()
