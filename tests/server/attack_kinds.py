"""What hostile clients do to an HTTP port. Each attack goes on until `stop` is set, and survives being refused."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator

Attack = Callable[["Target", threading.Event], None]
HELD = 1008  # sockets: the files of a process by default, less what it needs itself
MB = 10**6


class Target:
    """Where a server listens, and requests written by hand."""

    def __init__(self, host: str, port: int) -> None:
        self.address = (host, port)

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, timeout=5)

    def head(self, method: str, path: str, *lines: str) -> bytes:
        first = (f"{method} {path} HTTP/1.1", "host: localhost", "content-type: application/json")
        return "\r\n".join([*first, *lines, "", ""]).encode()

    def post(self, body: bytes, path: str = "/v1/completions") -> bytes:
        return self.head("POST", path, f"content-length: {len(body)}") + body

    def send(self, *parts: bytes, stop: threading.Event) -> None:
        """Over a connection of its own; then read what comes until it ends."""
        with contextlib.suppress(OSError), self.connect() as client:
            for part in parts:
                for at in range(0, len(part), 2**16):
                    if stop.is_set():
                        return
                    client.sendall(part[at : at + 2**16])
            client.settimeout(1.0)
            while not stop.is_set() and client.recv(2**16):
                pass


def held(target: Target, stop: threading.Event, sent: bytes, then: bytes = b"", count: int = HELD) -> None:
    """Keep `count` connections open that sent this and no more; those that are closed are opened again."""
    clients: list[socket.socket | None] = [None] * count
    while not stop.is_set():
        for at, client in enumerate(clients):
            if stop.is_set():
                break
            with contextlib.suppress(OSError):
                if client is not None and not _closed(client):
                    continue
                if client is not None:
                    client.close()
                clients[at] = None
                found = clients[at] = target.connect()
                if sent:
                    found.sendall(sent)
                if then:
                    found.recv(2**16)
                    found.sendall(then)
                found.setblocking(False)
        stop.wait(0.2)
    for client in clients:
        if client is not None:
            client.close()


def _closed(client: socket.socket) -> bool:
    try:
        while client.recv(2**16):
            pass
    except BlockingIOError:
        return False
    return True


def repeated(target: Target, stop: threading.Event, *parts: bytes, threads: int = 4) -> None:
    """Send this again and again over new connections."""

    def go_on() -> None:
        while not stop.is_set():
            target.send(*parts, stop=stop)

    running = [threading.Thread(target=go_on) for _ in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()


def idle_with_a_stray_line(target: Target, stop: threading.Event) -> None:
    held(target, stop, target.head("GET", "/health"), b"\r\n")


def unfinished_heads(target: Target, stop: threading.Event) -> None:
    held(target, stop, b"GET /health HTTP/1.1\r\nhost: localhost\r\n")


def unfinished_bodies_at_a_refused_route(target: Target, stop: threading.Event) -> None:
    held(target, stop, target.head("POST", "/health", "content-length: 1000000") + b"a")


def unfinished_chunks(target: Target, stop: threading.Event) -> None:
    held(target, stop, target.head("POST", "/v1/completions", "transfer-encoding: chunked") + b"5\r\nhello\r\n")


def unfinished_large_bodies(target: Target, stop: threading.Event) -> None:
    sent = target.head("POST", "/v1/completions", "content-length: 4000000") + b"[" * 3_000_000
    held(target, stop, sent, count=48)


def pipelined(target: Target, stop: threading.Event) -> None:
    repeated(target, stop, target.head("GET", "/health") * 5000)


def pipelined_within_bounds(target: Target, stop: threading.Event) -> None:
    repeated(target, stop, target.head("GET", "/v1/models") * 60, threads=8)


def url_of_60_mb(target: Target, stop: threading.Event) -> None:
    repeated(target, stop, b"GET /", *[b"a" * MB] * 60, b" HTTP/1.1\r\n\r\n")


def headers_of_200_mb(target: Target, stop: threading.Event) -> None:
    repeated(target, stop, b"GET /health HTTP/1.1\r\n", *[b"x: " + b"a" * MB + b"\r\n"] * 200)


def ten_thousand_header_lines(target: Target, stop: threading.Event) -> None:
    repeated(target, stop, b"GET /health HTTP/1.1\r\nhost: localhost\r\n" + b"a:\r\n" * 10_000 + b"\r\n")


def tiny_chunks(target: Target, stop: threading.Event) -> None:
    head = target.head("POST", "/v1/completions", "transfer-encoding: chunked")
    repeated(target, stop, head, *[b"1\r\n[\r\n" * 20_000] * 20, threads=8)


def endless_chunk_extensions(target: Target, stop: threading.Event) -> None:
    head = target.head("POST", "/v1/completions", "transfer-encoding: chunked")
    repeated(target, stop, head, b"5;", *[b"a" * MB] * 20)


def endless_trailers(target: Target, stop: threading.Event) -> None:
    head = target.head("POST", "/v1/completions", "transfer-encoding: chunked")
    repeated(target, stop, head, b"1\r\n{\r\n0\r\n", *[b"a:b\r\n" * 10_000] * 20)


def deep_json(target: Target, stop: threading.Event) -> None:
    repeated(target, stop, target.post(b'{"prompt":' + b"[" * 100_000 + b"]" * 100_000 + b"}"))


def tiny_messages_of_32_mb(target: Target, stop: threading.Event) -> None:
    body = b'{"messages":[' + b'{"role":"a"},' * (32 * 2**20 // 13 - 10) + b'{"role":"a"}]}'
    repeated(target, stop, target.post(body, "/v1/chat/completions"), threads=2)


def tiny_messages_within_bounds(target: Target, stop: threading.Event) -> None:
    body = b'{"messages":[' + b'{"role":"a"},' * 4000 + b'{"role":"a"}]}'
    repeated(target, stop, target.post(body, "/v1/chat/completions"), threads=4)


def odd_json(target: Target, stop: threading.Event) -> None:
    bodies = (
        b'{"prompt": [70], "seed": ' + b"9" * 60_000 + b"}",
        b'{"prompt": [' + b"9" * 60_000 + b"]}",
        b'{"prompt": [70], "temperature": 1e' + b"9" * 4000 + b"}",
        b'{"prompt": "\\ud800\\udfff\\udc00", "cache_salt": "\\ud800"}',
        b'{"prompt": [70], ' + b'"n": 1, ' * 8000 + b'"n": 1}',
        b'{"prompt": "' + b"\\u0000" * 9000 + b'"}',
        b"\xff\xfe" * 1000,
    )
    repeated(target, stop, *[target.post(body) for body in bodies])


def texts_over_the_context(target: Target, stop: threading.Event) -> None:
    repeated(target, stop, target.post(b'{"prompt": "' + b"hello world " * 33_000 + b'"}'), threads=2)


def templates_of_the_client(target: Target, stop: threading.Event) -> None:
    template = "{% for i in range(6000) %}{% for j in range(10000) %}{% endfor %}{% endfor %}a"
    body = {"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"chat_template": template}}
    repeated(target, stop, target.post(json.dumps(body).encode(), "/v1/chat/completions"))


def connection_storm(target: Target, stop: threading.Event) -> None:
    def go_on() -> None:
        while not stop.is_set():
            with contextlib.suppress(OSError):
                target.connect().close()

    running = [threading.Thread(target=go_on) for _ in range(4)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()


def streams_that_nobody_reads(target: Target, stop: threading.Event) -> None:
    body = json.dumps({"prompt": [70, 71], "max_tokens": 4000, "stream": True, "ignore_eos": True}).encode()
    held(target, stop, target.post(body), count=32)


def streams_that_half_close(target: Target, stop: threading.Event) -> None:
    body = json.dumps({"prompt": [70, 71], "max_tokens": 4000, "stream": True}).encode()
    while not stop.is_set():
        with contextlib.suppress(OSError), target.connect() as client:
            client.sendall(target.post(body))
            client.recv(2**16)
            client.shutdown(socket.SHUT_WR)
            client.recv(2**16)


def expected_bodies_that_never_come(target: Target, stop: threading.Event) -> None:
    held(target, stop, target.head("POST", "/v1/completions", "content-length: 1000", "expect: 100-continue"))


def bad_requests(target: Target, stop: threading.Event) -> None:
    with contextlib.suppress(OSError):
        for _ in bad_requests_of(target, 10**9, stop):
            pass


def bad_requests_of(target: Target, count: int, stop: threading.Event) -> Iterator[int]:
    """Requests that are refused, some hundred over each connection; yields how many were answered."""
    kinds = [
        target.post(b"{"),
        target.post(b'{"prompt": 5}'),
        target.post(b'{"prompt": [70], "n": 1000}'),
        target.post(b'{"prompt": [70], "tools": [1]}'),
        target.head("GET", "/nothing"),
        target.head("DELETE", "/v1/completions"),
        target.head("GET", "/health").replace(b"localhost", b"evil.example"),
        target.post(b"a=b").replace(b"application/json", b"text/plain"),
    ]
    sent = 0
    while sent < count and not stop.is_set():
        with target.connect() as client:
            client.settimeout(60)
            for _ in range(25):
                client.sendall(b"".join(kinds))
                data = b""
                while data.count(b"HTTP/1.1 4") < len(kinds):
                    more = client.recv(2**16)
                    if not more:
                        raise ConnectionError(f"the connection ended: {data[-300:]!r}")
                    data += more
                sent += len(kinds)
                yield sent
                if sent >= count or stop.is_set():
                    break


def cut_connections_of(target: Target, count: int) -> None:
    """Connections that end in the middle: of a head, of a body, of an answer."""
    body = json.dumps({"prompt": [70, 71], "max_tokens": 100, "stream": True}).encode()
    kinds = [
        b"",
        b"GET /hea",
        target.head("POST", "/v1/completions", "content-length: 1000") + b"{",
        target.head("POST", "/v1/completions", "transfer-encoding: chunked") + b"5\r\nhel",
        target.post(body),
    ]
    for number in range(count):
        with target.connect() as client:
            client.sendall(kinds[number % len(kinds)])
            if number % 2:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        if number % 100 == 0:
            time.sleep(0.001)


ATTACKS: dict[str, Attack] = {
    one.__name__: one
    for one in (
        idle_with_a_stray_line,
        unfinished_heads,
        unfinished_bodies_at_a_refused_route,
        unfinished_chunks,
        unfinished_large_bodies,
        expected_bodies_that_never_come,
        pipelined,
        pipelined_within_bounds,
        url_of_60_mb,
        headers_of_200_mb,
        ten_thousand_header_lines,
        tiny_chunks,
        endless_chunk_extensions,
        endless_trailers,
        deep_json,
        tiny_messages_of_32_mb,
        tiny_messages_within_bounds,
        odd_json,
        texts_over_the_context,
        templates_of_the_client,
        connection_storm,
        streams_that_nobody_reads,
        streams_that_half_close,
        bad_requests,
    )
}
