"""Connections: upgrades that are not taken, heads and idle time with bounds, keep-alive that says how long."""

from __future__ import annotations

import contextlib
import json
import resource
import time
from typing import Any

import pytest
from raw_http import connect, ended, head_of, read_answer
from served import Start

BODY = json.dumps({"prompt": [70, 71], "max_tokens": 2}).encode()
H2C = ("connection: Upgrade, HTTP2-Settings", "http2-settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUA", "upgrade: h2c")


@pytest.mark.parametrize("split", [0, 20, None])
@pytest.mark.parametrize("upgrade", ["h2c", "websocket", "foo"])
def test_a_request_that_offers_an_upgrade_is_served(start: Start, split: int | None, upgrade: str) -> None:
    """The JDK's HttpClient offers h2c with its first request, and sends the body with the head or behind it."""
    more = [line.replace("h2c", upgrade) for line in H2C]
    head = head_of("POST", "/v1/completions", len(BODY), *more)
    with connect(start()) as client:
        for _ in range(2):  # and the connection serves another one
            if split is None:
                client.sendall(head + BODY)
            else:
                client.sendall(head[: len(head) - split])
                time.sleep(0.05)
                client.sendall(head[len(head) - split :] + BODY)
            status, _, body = read_answer(client)
            assert status == 200 and json.loads(body)["usage"]["completion_tokens"] == 2


def test_pipelined_requests_are_answered_in_order(start: Start) -> None:
    with connect(start()) as client:
        for size in (1, 7, 100, 10_000):
            whole = b"\r\n" + (head_of("POST", "/v1/completions", len(BODY)) + BODY) * 3
            for at in range(0, len(whole), size):
                client.sendall(whole[at : at + size])
            data = b""
            while data.count(b'"total_tokens"') < 3:
                data += client.recv(2**16)
            assert data.count(b"HTTP/1.1 200") == 3


@pytest.mark.parametrize(
    "head",
    [
        b"GET /" + b"a" * 2_000_000 + b" HTTP/1.1\r\nhost: a\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: a\r\nx: " + b"a" * 2_000_000 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: a\r\n" + b"a: b\r\n" * 100_000 + b"\r\n",
    ],
)
def test_large_heads_are_refused_early(start: Start, head: bytes) -> None:
    served = start()
    with connect(served) as client:
        sent = 0
        try:
            for at in range(0, len(head), 2**14):
                sent += client.send(head[at : at + 2**14])
                time.sleep(0.001)
        except OSError:
            pass
        assert sent < len(head) or ended(client)
    assert served.http.get("/health").status_code == 200
    with connect(served) as client:
        client.sendall(head[: 2**16 + 100])
        assert read_answer(client)[0] == 431 and ended(client)
        assert served.http.get("/health", headers={"x": "a" * 60_000}).status_code == 200


def test_trailers_are_bounded(start: Start) -> None:
    with connect(start()) as client:
        client.sendall(head_of("POST", "/v1/completions", None, "transfer-encoding: chunked") + b"1\r\n{\r\n0\r\n")
        with pytest.raises(OSError):
            for _ in range(1000):
                client.sendall(b"x: " + b"a" * 2**14 + b"\r\n")
                time.sleep(0.001)
            client.recv(1)


REFUSED = head_of("POST", "/health", 1_000_000)
NO_KEY = head_of("POST", "/v1/completions", 1_000_000)
CHUNKED = head_of("GET", "/health", None, "transfer-encoding: chunked")
FINE = head_of("GET", "/health")


@pytest.mark.parametrize(
    ("request_head", "then"),
    [
        (FINE, b""),
        (FINE, b"\r\n"),
        (FINE, b"G"),
        (REFUSED, b"a"),
        (NO_KEY, b"a"),
        (CHUNKED, b"5\r\nhello\r\n"),
        (head_of("GET", "/health", None, "upgrade: foo", "connection: upgrade"), b"zz"),
        (b"", b"\r\n"),
        (b"", b""),
        (b"", b"GET /health HTTP/1.1\r\n"),
    ],
)
def test_every_connection_that_waits_for_its_client_ends(start: Start, request_head: bytes, then: bytes) -> None:
    served = start(api_key="k", header_timeout_s=0.5, keep_alive_s=0.5)
    with connect(served) as client:
        if request_head:
            client.sendall(request_head)
            assert read_answer(client)[0] in (200, 401, 405)
        if then:
            client.sendall(then)
        assert ended(client)


def test_bytes_that_are_no_request_do_not_move_the_deadline(start: Start) -> None:
    served = start(header_timeout_s=0.5, keep_alive_s=0.5)
    with connect(served) as client:
        client.sendall(FINE)
        read_answer(client)
        with pytest.raises(OSError):
            for _ in range(2000):
                client.sendall(b"\r\n")
                time.sleep(0.02)


def test_an_idle_connection_is_kept_as_long_as_it_says(start: Start) -> None:
    served = start(header_timeout_s=0.1)  # which does not count between requests
    with connect(served) as client:
        for _ in range(2):
            client.sendall(FINE)
            _, headers, _ = read_answer(client)
            assert headers["keep-alive"] == "timeout=75"
            client.settimeout(0.7)
            with pytest.raises(TimeoutError):
                client.recv(1)
            client.settimeout(30)
    closing = served.http.get("/health", headers={"connection": "close"})
    assert "keep-alive" not in closing.headers and closing.headers["connection"] == "close"


def test_an_answer_that_nobody_reads_ends(start: Start, monkeypatch: Any) -> None:
    monkeypatch.setattr("penstock.server.gate.UNREAD_MARGIN_S", 0.1)
    served = start(send_timeout_s=0.1)
    with connect(served) as client:
        client.sendall(head_of("GET", "/") * 3000)
        time.sleep(0.1)
        with pytest.raises(OSError):
            for _ in range(3000):
                client.sendall(head_of("GET", "/"))
                time.sleep(0.01)


def test_files_are_raised_to_the_hard_limit(start: Start) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(min(soft, hard) - 1, 256), hard))
    start()
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == hard


def test_clients_beyond_the_open_files_get_a_503_and_the_operator_a_line(
    start: Start, monkeypatch: Any, caplog: Any
) -> None:
    """With more connections than files the event loop resets them, and nothing says why."""
    monkeypatch.setattr("penstock.server.run.raise_file_limit", lambda: 8)
    served = start()
    assert "may have 8 files open: requests get a 503 while 4 connections are" in caplog.text
    with contextlib.ExitStack() as stack:
        for status in (200, 200, 200, 503):
            client = stack.enter_context(connect(served))
            client.sendall(head_of("GET", "/health"))
            assert read_answer(client)[0] == status
