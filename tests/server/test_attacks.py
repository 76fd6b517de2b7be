"""Hostile clients beside honest ones: time between tokens, memory, threads, files. `attacks.py` prints the figures."""

from __future__ import annotations

import json
from collections.abc import Iterator

import psutil
import pytest

from tests.server.attack_kinds import ATTACKS, Target
from tests.server.attacks import Measured, attacked, gaps_of, measure, running_server, send_bad_ones, settled
from tests.server.served import Start

SECONDS = 1.0
FLOOR_S = 0.1  # what a busy machine alone may make of 10 ms
TRIES = 3
IN_CI = (
    "idle_with_a_stray_line",
    "unfinished_chunks",
    "unfinished_bodies_at_a_refused_route",
    "tiny_chunks",
    "pipelined",
    "endless_trailers",
    "tiny_messages_within_bounds",
    "connection_storm",
)
Running = tuple[Target, psutil.Process, Measured]


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with running_server() as (target, server):
        gaps_of(target, 0.5)
        yield target, server, measure("alone", target, server, SECONDS)


def test_every_attack_that_ci_runs_is_known() -> None:
    assert set(IN_CI) <= set(ATTACKS)


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize("name", IN_CI)
def test_tokens_go_on_beside_an_attack(running: Running, name: str) -> None:
    target, server, alone = running
    seen: list[Measured] = []
    for _ in range(TRIES):
        with attacked(name, target):
            seen.append(measure(name, target, server, SECONDS))
        if seen[-1].p99_s <= 3 * max(alone.p99_s, FLOOR_S):
            return
        alone = measure("alone", target, server, SECONDS)
    raise AssertionError(f"{alone}: {seen}")


@pytest.mark.slow
@pytest.mark.alone
def test_bad_requests_and_cut_connections_leave_nothing_behind(running: Running) -> None:
    """As many as fit in some seconds; `attacks.py --flat` sends 10^5 and 10^4."""
    target, server, _ = running
    with settled(server, server.num_fds()):
        send_bad_ones(target, 1000, 300, 6)
    threads, files, memory = server.num_threads(), server.num_fds(), server.memory_info().rss
    with settled(server, files):
        assert send_bad_ones(target, 20_000, 2000, 12) >= 1000
    assert server.num_fds() <= files and server.num_threads() <= threads
    assert server.memory_info().rss - memory < 16 * 2**20


ODD = {
    "a large number": b'{"prompt": [70], "seed": ' + b"9" * 60_000 + b"}",
    "a large token": b'{"prompt": [' + b"9" * 60_000 + b"]}",
    "a small token": b'{"prompt": [-' + b"9" * 60_000 + b"]}",
    "a token beyond 64 bits": b'{"prompt": [18446744073709551617]}',
    "a token beyond the vocabulary": b'{"prompt": [9223372036854775807]}',
    "a large exponent": b'{"prompt": [70], "temperature": 1e' + b"9" * 4000 + b"}",
    "half a surrogate pair": b'{"prompt": "\\ud800\\udc00\\udfff"}',
    "half a pair as a salt": b'{"prompt": [70], "cache_salt": "\\ud800"}',
    "depth": b'{"prompt":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "depth in a field that is not looked at": b'{"prompt": [70], "tools": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "depth of objects": b'{"prompt": [70], "logit_bias": ' + b'{"a":' * 900 + b"1" + b"}" * 900 + b"}",
    "depth in an unknown field": b'{"prompt": [70], "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "an unfinished text": b'{"prompt": "' + b"a" * 60_000,
    "no JSON": b"\xff\xfe" * 1000,
    "NaN": b'{"prompt": [70], "temperature": NaN}',
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_json_is_a_400(start: Start, kind: str) -> None:
    answer = start().http.post("/v1/completions", content=ODD[kind], headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text[:300]
    assert len(answer.content) < 2000


def test_of_two_keys_of_one_name_the_last_counts(start: Start) -> None:
    body = b'{"prompt": [70], "max_tokens": 9, ' + b'"n": 99999, ' * 5000 + b'"n": 1, "max_tokens": 2}'
    served = start()
    answer = served.http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 2


def test_odd_chats_are_a_400(start: Start) -> None:
    served = start()
    deep: object = "a"
    for _ in range(500):
        deep = [deep]
    for body in (
        {"messages": [{"role": "user", "content": "a", "tool_calls": [{"a": deep}]}], "chat_template_kwargs": {"a": 1}},
        {"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"a": deep}},
        {"messages": [{"role": "\0" * 1000, "content": None}], "n": 0},
    ):
        assert served.http.post("/v1/chat/completions", content=json.dumps(body), headers={
            "content-type": "application/json"}).status_code == 400  # fmt: skip
