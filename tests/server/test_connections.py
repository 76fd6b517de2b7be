"""Connections: upgrades that are not taken, heads and idle time with bounds, keep-alive that says how long."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import socket
import time
from typing import Any

import pytest

from tests.server.echo_engine import EchoEngine
from tests.server.raw_http import connect, connect_address, ended, head_of, read_answer
from tests.server.served import Start
from tests.waiting import wait_until

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
        b"GET /" + b"a" * 2_000_000 + b" HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: " + b"a" * 2_000_000 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: localhost\r\n" + b"a: b\r\n" * 100_000 + b"\r\n",
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
        with pytest.raises(OSError):
            for _ in range(3000):
                client.sendall(head_of("GET", "/"))
                time.sleep(0.01)


def test_files_are_raised_to_the_hard_limit(start: Start) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(min(soft, hard) - 1, 256), hard))
    start()
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == hard


def stream(client: Any, tokens: int = 50) -> bytes:
    """Ask for a stream, and wait for its first bytes."""
    body = json.dumps({"prompt": [70, 71], "max_tokens": tokens, "stream": True}).encode()
    client.sendall(head_of("POST", "/v1/completions", len(body)) + body)
    return bytes(client.recv(2**16))


def test_idle_connections_make_room_and_busy_ones_stay(start: Start, monkeypatch: Any, caplog: Any) -> None:
    """With more connections than files the event loop resets new ones, and `serve` is closed for good."""
    monkeypatch.setattr("penstock.server.run.raise_file_limit", lambda: 8)
    served = start(EchoEngine(hold_after=2))
    assert "may have 8 files open: at most 4 connections are kept" in caplog.text
    with contextlib.ExitStack() as stack:
        busy = []
        for _ in range(3):
            busy.append(stack.enter_context(connect(served)))
            assert stream(busy[-1]).startswith(b"HTTP/1.1 200")
        for _ in range(50):  # each takes the place of the one before, which waits for its client
            client = stack.enter_context(connect(served))
            client.sendall(FINE + b"\r\n")
            assert read_answer(client)[0] == 200
        busy.append(stack.enter_context(connect(served)))
        assert stream(busy[-1]).startswith(b"HTTP/1.1 200")
        refused = stack.enter_context(connect(served))
        assert read_answer(refused)[0] == 503 and ended(refused)
        served.engine.release()
        for client in busy:
            data = b""
            while b"[DONE]" not in data:
                data += client.recv(2**16)
        last = stack.enter_context(connect(served))
        last.sendall(FINE)
        assert read_answer(last)[0] == 200


def test_one_address_has_a_share_of_the_connections_that_wait(start: Start, monkeypatch: Any) -> None:
    monkeypatch.setattr("penstock.server.run.raise_file_limit", lambda: 80)  # 40 connections, 10 for an address
    served = start()
    with contextlib.ExitStack() as stack:
        honest = stack.enter_context(socket.socket())
        honest.bind(("127.0.0.2", 0))
        honest.settimeout(30)
        honest.connect(connect_address(served))
        honest.sendall(FINE)
        assert read_answer(honest)[0] == 200
        for then in (b"", b"\r\n", b"GET", REFUSED, head_of("POST", "/v1/completions", 1000)):
            for _ in range(30):
                stranger = stack.enter_context(connect(served))
                with contextlib.suppress(ConnectionError):  # it may have made room already
                    stranger.sendall(then)
        honest.sendall(FINE)
        assert read_answer(honest)[0] == 200
        budget = served.server.servers[0].budget
        wait_until(lambda: budget.waiting <= 11, "ten connections of the address of strangers, and the honest one")
        budget.check_integrity()


def test_without_descriptors_an_idle_connection_goes_and_the_server_goes_on(start: Start, monkeypatch: Any) -> None:
    """Whatever uses them up: the next connection is taken when one is free again."""
    served = start()
    acceptor = served.server.servers[0]
    failing = iter([errno.EMFILE, errno.ENFILE, errno.EMFILE])

    class Listener:
        def accept(self) -> Any:
            number = next(failing, None)
            if number is not None:
                raise OSError(number, os.strerror(number))
            return listener.accept()

        def fileno(self) -> int:
            return int(listener.fileno())

    with connect(served) as idle:
        idle.sendall(FINE)
        read_answer(idle)
        listener = acceptor._listener  # noqa: SLF001 (a fault is put in here)
        acceptor._listener = Listener()  # type: ignore[assignment]  # noqa: SLF001 (a fault is put in here)
        with connect(served) as client:
            client.sendall(FINE)
            assert read_answer(client)[0] == 200
        assert ended(idle)
        acceptor._listener = listener  # noqa: SLF001 (a fault is put in here)


@pytest.mark.slow
def test_pipelined_requests_wait_unparsed_for_the_answer_before_theirs(start: Start) -> None:
    served = start(EchoEngine(hold_after=1))
    with connect(served) as client:
        client.sendall(head_of("POST", "/v1/completions", len(BODY)) + BODY + FINE * 3000)
        assert served.engine.wait(lambda engine: engine.open_requests() == 1)
        assert served.http.get("/health").status_code == 200
        (connection,) = [one for one in served.server.server_state.connections if one.cycle.scope["method"] == "POST"]
        assert not connection.pipeline
        served.engine.release()
        data = b""
        while data.count(b"HTTP/1.1 200") < 3001:
            data += client.recv(2**16)
        assert data.index(b'"total_tokens"') < data.index(b'{"status":"ok"}')


def test_thousands_of_requests_behind_chunks_are_not_kept(start: Start) -> None:
    """Where chunks end is known to the parser only, so that a slice has more than one request in it."""
    chunked = head_of("POST", "/v1/completions", None, "transfer-encoding: chunked")
    chunked += b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
    with connect(start(EchoEngine(hold_after=1))) as client:
        client.sendall(chunked + b"GET / HTTP/1.1\r\n\r\n" * 180)
        with contextlib.suppress(OSError):
            client.sendall(FINE * 10_000)
        assert ended(client)


def test_a_client_that_leaves_behind_a_pipelined_request_cancels_what_runs(start: Start) -> None:
    """The request that is answered is not the newest one of its connection."""
    served = start(EchoEngine(hold_after=1))
    with connect(served) as client:
        stream(client)
        client.sendall(FINE)
        wait_until(
            lambda: served.app.metrics.registry.get_sample_value("penstock_http_open_requests") == 1,
            "only the stream is open",
        )
    assert served.engine.wait(lambda engine: engine.open_requests() == 0)


def test_a_thousand_requests_at_once_from_one_address_are_all_served(start: Start, monkeypatch: Any) -> None:
    """Nobody who has sent his request loses his place to those who come behind him."""
    monkeypatch.setattr("penstock.server.run.raise_file_limit", lambda: 1024)  # 768 connections, 192 for an address
    served = start()
    with contextlib.ExitStack() as stack:
        clients = [socket.socket() for _ in range(700)]
        for client in clients:
            stack.enter_context(client)
            client.settimeout(60)
            client.connect(connect_address(served))
            client.sendall(head_of("GET", "/health", None, "connection: close"))
        assert [read_answer(client)[0] for client in clients] == [200] * 700


SMUGGLED = [
    ("content-length: 5", "transfer-encoding: chunked"),
    ("transfer-encoding: chunked", "content-length: 5"),
    ("content-length: 5", "content-length: 6"),
    ("content-length: +5",),
    ("content-length: -5",),
    ("content-length: 99999999999999999999999",),
    ("transfer-encoding: xchunked",),
    ("transfer-encoding : chunked",),
    ("bad name: a",),
    ("a: b\0c",),
]


@pytest.mark.parametrize("lines", SMUGGLED)
def test_what_two_servers_may_read_differently_is_refused(start: Start, lines: tuple[str, ...]) -> None:
    with connect(start()) as client:
        client.sendall(head_of("POST", "/v1/completions", None, *lines) + b"0\r\n\r\n" + FINE)
        assert read_answer(client)[0] == 400 and ended(client)


@pytest.mark.parametrize(
    "rest",
    [
        b"5;" + b"a" * 500_000,  # an extension without an end
        b"00000000000000000000000000000005\r\nhello" * 50_000,
        b"0\r\n" + b"a:b\r\n" * 100_000,
        b"fffffffffffffffffffff\r\n",
        b"5\r\nhellogoodbye\r\n",
    ],
)
def test_endless_framing_of_chunks_ends(start: Start, rest: bytes) -> None:
    served = start()
    with connect(served) as client:
        with contextlib.suppress(OSError):
            client.sendall(head_of("POST", "/v1/completions", None, "transfer-encoding: chunked") + rest)
        assert ended(client)
    assert served.http.get("/health").status_code == 200


def test_trailers_are_no_headers(start: Start) -> None:
    with connect(start()) as client:
        head = head_of("POST", "/v1/completions", None, "transfer-encoding: chunked")
        body = b"%x\r\n%s\r\n0\r\nx-slo-ttft-ms: no number\r\n\r\n" % (len(BODY), BODY)
        client.sendall(head)
        client.sendall(body)
        assert read_answer(client)[0] == 200


def test_ten_thousand_small_headers_are_refused(start: Start) -> None:
    with connect(start()) as client:
        client.sendall(head_of("GET", "/health", None, *["a:"] * 10_000))
        assert read_answer(client)[0] == 431 and ended(client)


def test_a_body_is_asked_for_where_it_is_wanted(start: Start) -> None:
    served = start()
    with connect(served) as client:
        client.sendall(head_of("POST", "/v1/completions", len(BODY), "expect: 100-continue"))
        assert client.recv(2**16).startswith(b"HTTP/1.1 100 ")
        client.sendall(BODY)
        assert read_answer(client)[0] == 200
    with connect(served) as client:
        client.sendall(head_of("POST", "/nothing", len(BODY), "expect: 100-continue"))
        assert read_answer(client)[0] == 404


def test_a_client_that_half_closes_is_one_that_leaves(start: Start) -> None:
    served = start(EchoEngine(hold_after=1))
    with connect(served) as client:
        stream(client)
        client.shutdown(socket.SHUT_WR)
        assert ended(client)
    assert served.engine.wait(lambda engine: engine.open_requests() == 0)
