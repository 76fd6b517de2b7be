"""A link of a stated rate in front of any TCP server: a forwarder whose connections share one paced direction each way.

`python -m benchmarks.peers.paced_link --target HOST:PORT --bytes-per-s N` runs one as a separate process. Both stores
of `python -m benchmarks vllm` are behind such links, so that neither has a faster connection.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from penstock.bench.processes import ReadyProcess
from penstock.pacing import Pacer
from penstock.process.child_python import python_command

PIECE_BYTES = 64 << 10
SOCKET_BUFFER_BYTES = 256 << 10  # of each socket on the way: bytes in transit beyond the rate
CONNECTIONS_MAX = 128
CONNECT_S = 5.0
READY = re.compile(r"link ready on (\S+ counters \S+)")


@dataclass(frozen=True, slots=True)
class LinkBytes:
    """Bytes that a link has transferred: `down` from the server (loads), `up` to it (saves)."""

    down_bytes: int
    up_bytes: int

    def since(self, before: LinkBytes) -> LinkBytes:
        """The bytes since `before`."""
        return LinkBytes(self.down_bytes - before.down_bytes, self.up_bytes - before.up_bytes)


class _Line:
    """One direction: a pacer shared by all connections, and its byte count."""

    def __init__(self, bytes_per_s: float) -> None:
        self._pacer = Pacer(bytes_per_s)
        self._lock = threading.Lock()
        self.sent_bytes = 0

    def pump(self, source: socket.socket, sink: socket.socket) -> None:
        """Forward until the source ends or either side breaks; then the sink is shut down too."""
        piece = memoryview(bytearray(PIECE_BYTES))
        try:
            while size := source.recv_into(piece):
                self._pacer.wait(size, 0.0)
                sink.sendall(piece[:size])
                with self._lock:
                    self.sent_bytes += size
        except OSError:
            _cut(source)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


def _cut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _prepare(connection: socket.socket) -> socket.socket:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_BYTES)
    return connection


class PacedLink:
    """Listens on a free port of 127.0.0.1 and forwards each connection to `target`; daemon threads, two for each."""

    def __init__(self, target: tuple[str, int], bytes_per_s: float) -> None:
        self._target = target
        self._down, self._up = _Line(bytes_per_s), _Line(bytes_per_s)
        self._free = threading.Semaphore(CONNECTIONS_MAX)
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER_BYTES)
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(CONNECTIONS_MAX)
        host, port = self._listener.getsockname()
        self.address = f"{host}:{port}"

    def run(self) -> None:
        """Accept until `close`."""
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def close(self) -> None:
        """Stop listening; open connections continue."""
        _cut(self._listener)
        self._listener.close()

    def transferred(self) -> LinkBytes:
        """Bytes forwarded until now."""
        return LinkBytes(self._down.sent_bytes, self._up.sent_bytes)

    def _serve(self, client: socket.socket) -> None:
        """One connection, both ways. Closed at once beyond CONNECTIONS_MAX or if its server is not reachable."""
        if not self._free.acquire(blocking=False):
            client.close()
            return
        try:
            with client, socket.socket() as server:
                server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER_BYTES)
                server.settimeout(CONNECT_S)
                server.connect(self._target)
                server.settimeout(None)
                _prepare(client)
                _prepare(server)
                back = threading.Thread(target=self._down.pump, args=(server, client), daemon=True)
                back.start()
                self._up.pump(client, server)
                back.join()
        except OSError:
            return
        finally:
            self._free.release()


def split_address(address: str) -> tuple[str, int]:
    """Host and port of HOST:PORT. Raises ValueError."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"address is {address!r}; HOST:PORT is needed")
    return host, int(port)


class LinkProcess:
    """A `PacedLink` in a separate process."""

    def __init__(self, target: str, bytes_per_s: float) -> None:
        module = python_command(__file__)  # by its path: a checkout's folder is not on the module path
        self._process = ReadyProcess(
            [*module, "--target", target, "--bytes-per-s", f"{bytes_per_s:.0f}"], READY, ready_s=30.0
        )
        self.address = ""
        self._counters = ("", 0)

    def __enter__(self) -> LinkProcess:
        self._process.__enter__()
        self.address, _, counters = self._process.address.split()
        self._counters = split_address(counters)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stop()

    def transferred(self) -> LinkBytes:
        """Read the byte counts. Raises OSError if the process is gone."""
        with socket.create_connection(self._counters, CONNECT_S) as connection, connection.makefile() as lines:
            return LinkBytes(**json.loads(lines.readline()))


def measure_link(bytes_per_s: float, seconds: float = 1.0) -> float:
    """Bytes per second that a bare reader gets through such a link: the bound of every system behind it."""
    with ExitStack() as stack:
        link = stack.enter_context(LinkProcess(stack.enter_context(_source()), bytes_per_s))
        connection = stack.enter_context(socket.create_connection(split_address(link.address), CONNECT_S))
        connection.settimeout(CONNECT_S)
        piece = bytearray(1 << 20)
        warm_bytes = 0
        while warm_bytes < 2 * SOCKET_BUFFER_BYTES:  # the buffers on the way may hold this much in advance
            warm_bytes += connection.recv_into(piece)
        start_s, got_bytes = time.monotonic(), 0
        while time.monotonic() - start_s < seconds:
            size = connection.recv_into(piece)
            if not size:
                raise OSError("the link closed the connection while it was measured")
            got_bytes += size
        return got_bytes / (time.monotonic() - start_s)


@contextmanager
def _source() -> Iterator[str]:
    """A server that sends zeros to its one client indefinitely."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        listener.settimeout(CONNECT_S)

        def send() -> None:
            zeros = bytes(1 << 20)
            with contextlib.suppress(OSError):
                connection, _ = listener.accept()
                with connection:
                    while True:
                        connection.sendall(zeros)

        threading.Thread(target=send, daemon=True).start()
        host, port = listener.getsockname()
        yield f"{host}:{port}"


def _serve_counters(listener: socket.socket, link: PacedLink) -> None:
    """Send one JSON line to each connecting client."""
    while True:
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError):
            found = link.transferred()
            connection.sendall(
                json.dumps({"down_bytes": found.down_bytes, "up_bytes": found.up_bytes}).encode() + b"\n"
            )


def main() -> None:
    """Run one link until the process is ended; prints its addresses."""
    parser = argparse.ArgumentParser(description="Forward TCP connections over a link of a stated rate.")
    parser.add_argument("--target", required=True, help="HOST:PORT of the server behind the link")
    parser.add_argument("--bytes-per-s", required=True, type=float, help="each way, all connections together")
    given = parser.parse_args()
    link = PacedLink(split_address(given.target), given.bytes_per_s)
    counters = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=_serve_counters, args=(counters, link), daemon=True).start()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    print(f"link ready on {link.address} counters 127.0.0.1:{counters.getsockname()[1]}", flush=True)
    link.run()


if __name__ == "__main__":
    main()
