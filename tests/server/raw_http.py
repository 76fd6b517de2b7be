"""HTTP by hand, for what clients do not do."""

from __future__ import annotations

import socket

from tests.server.served import Served

JSON_TYPE = {"content-type": "application/json"}


def connect_address(served: Served) -> tuple[str, int]:
    host, port = served.url.removeprefix("http://").split(":")
    return host, int(port)


def connect(served: Served, timeout_s: float = 30.0) -> socket.socket:
    return socket.create_connection(connect_address(served), timeout=timeout_s)


def head_of(method: str, path: str, length: int | None = None, *more: str) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "host: localhost", *more]
    if method == "POST":
        lines.append("content-type: application/json")
    if length is not None:
        lines.append(f"content-length: {length}")
    return "\r\n".join([*lines, "", ""]).encode()


def read_answer(client: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of one answer with a length."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += _some(client)
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    while len(body) < int(headers.get("content-length", "0")):
        body += _some(client)
    return int(first.split()[1]), headers, body


def _some(client: socket.socket) -> bytes:
    data = client.recv(2**16)
    if not data:
        raise ConnectionError("closed")
    return data


def ended(client: socket.socket) -> bool:
    """Wait for the end of the connection; True when the server ends it within the socket's timeout."""
    try:
        while client.recv(2**16):
            pass
    except TimeoutError:
        return False
    except OSError:
        return True
    return True
