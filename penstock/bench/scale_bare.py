"""The limit of lookups in `penstock bench scale`: the same bytes over as many sockets, nothing else at both ends."""

from __future__ import annotations

import re
import select
import socket
import struct
import sys
from collections.abc import Sequence

from penstock.bench.processes import ReadyProcess
from penstock.process.child_python import python_command

READY = re.compile(r"bare nodes ready on ([\w.:]+:\d+)")
ORDER = struct.Struct("<II")  # a request begins with its bytes and those of its answer
RECEIVE_BYTES = 1 << 16
TIMEOUT_S = 20.0
Round = Sequence[tuple[int, int]]  # bytes of request and answer for each node that is asked


def bare_nodes_process(nodes: int) -> ReadyProcess:
    """Answers over so many connections, on one thread."""
    return ReadyProcess(python_command("-m", __name__, str(nodes)), READY, ready_s=30.0)


def serve(nodes: int) -> None:
    """Runs in a process of its own, until its first connection ends."""
    with socket.create_server(("127.0.0.1", 0), backlog=nodes) as listener, select.epoll() as epoll:
        print(f"bare nodes ready on 127.0.0.1:{listener.getsockname()[1]}", flush=True)
        socks: dict[int, socket.socket] = {}
        for _ in range(nodes):
            sock, _ = listener.accept()
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            socks[sock.fileno()] = sock
            epoll.register(sock, select.EPOLLIN)
        answer = bytes(RECEIVE_BYTES)
        while True:
            for file, _ in epoll.poll():
                sock = socks[file]
                request = sock.recv(RECEIVE_BYTES)
                if not request:
                    return
                size_bytes, answer_bytes = ORDER.unpack_from(request)
                while len(request) < size_bytes:
                    request += sock.recv(size_bytes - len(request))
                sock.sendall(answer[:answer_bytes])


class BareNodes:
    """The asking side: one connection to each node."""

    def __init__(self, address: str, nodes: int) -> None:
        host, _, port = address.rpartition(":")
        self._socks = [socket.create_connection((host, int(port)), TIMEOUT_S) for _ in range(nodes)]
        for sock in self._socks:
            sock.settimeout(None)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def ask(self, rounds: Sequence[Round]) -> None:
        """Send each round's requests, each to another node, and receive the answers before the next one."""
        for asks in rounds:
            for sock, (size_bytes, answer_bytes) in zip(self._socks, asks, strict=False):
                sock.sendall(ORDER.pack(size_bytes, answer_bytes).ljust(size_bytes, b"\0"))
            for sock, (_, answer_bytes) in zip(self._socks, asks, strict=False):
                got = 0
                while got < answer_bytes:
                    got += len(sock.recv(answer_bytes - got))

    def close(self) -> None:
        """End the connections."""
        for sock in self._socks:
            sock.close()


if __name__ == "__main__":
    serve(int(sys.argv[1]))
