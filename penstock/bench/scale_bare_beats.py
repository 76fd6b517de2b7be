"""The limit of heartbeats in `penstock bench scale`: the same bytes over as many sockets to the same kind of event
loop, which answers each with as many bytes as the router does, and does nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import re
import select
import socket
import sys
import threading
import time
from collections.abc import Iterator

from penstock.bench.processes import ReadyProcess
from penstock.cluster import wire
from penstock.process.child_python import python_command
from penstock.process.file_limit import raise_file_limit

READY = re.compile(r"bare beats come to ([\w.:]+:\d+)")
TIMEOUT_S, LOOK_S = 30.0, 0.1
BACKLOG = 1024
RECEIVE_BYTES = 1 << 16
ANSWER = wire.frame(wire.Beat(1))


def bare_beat_cpu_s(connections: int, beat_s: float, beat_bytes: list[int], beats: int) -> float:
    """CPU seconds of this process per message, of `beats` of them at least: each connection sends one every `beat_s`;
    their lengths take turns. Raises OSError, ProcessFailed, TimeoutError."""
    raise_file_limit()
    with _answering() as (address, counts):
        arguments = (address, str(connections), str(beat_s), *map(str, beat_bytes))
        with ReadyProcess(python_command("-m", __name__, *arguments), READY, ready_s=TIMEOUT_S):
            begin, begin_s, end_s = counts[0], time.process_time(), time.monotonic() + TIMEOUT_S
            while (came := counts[0] - begin) < beats:
                if time.monotonic() > end_s:
                    raise TimeoutError(f"{came} of {beats} messages came within {TIMEOUT_S:g} s")
                time.sleep(LOOK_S)
            return (time.process_time() - begin_s) / came


class _Answers(asyncio.Protocol):
    """Answers whatever arrives: at this rate one message at a time does."""

    def __init__(self, counts: list[int]) -> None:
        self._counts = counts
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        self._counts[0] += 1
        self._transport.write(ANSWER)


@contextlib.contextmanager
def _answering() -> Iterator[tuple[str, list[int]]]:
    """An event loop on a thread of its own; its address, and how many messages it has answered."""
    loop, counts = asyncio.new_event_loop(), [0]
    thread = threading.Thread(target=loop.run_forever, name="bare-beats", daemon=True)
    server: asyncio.Server | None = None
    try:
        made = loop.create_server(lambda: _Answers(counts), "127.0.0.1", 0, backlog=BACKLOG)
        server = loop.run_until_complete(made)
        thread.start()
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}", counts
    finally:
        if thread.is_alive():
            loop.call_soon_threadsafe(loop.stop)
            thread.join(TIMEOUT_S)
        if server is not None:
            server.close()
        loop.close()


def send(address: tuple[str, int], connections: int, beat_s: float, beat_bytes: list[int]) -> None:
    """Runs in a process of its own, until it is ended."""
    raise_file_limit()
    socks = [socket.create_connection(address, TIMEOUT_S) for _ in range(connections)]
    by_file = {sock.fileno(): sock for sock in socks}
    ready = select.epoll()
    for file, sock in by_file.items():
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        ready.register(file, select.EPOLLIN)
    print(f"bare beats come to {address[0]}:{address[1]}", flush=True)
    frames = [bytes(size) for size in beat_bytes]
    next_s, turn = time.monotonic(), 0
    while True:
        while next_s <= time.monotonic():
            socks[turn % connections].sendall(frames[turn % len(frames)])
            turn, next_s = turn + 1, next_s + beat_s / connections
        for file, _ in ready.poll(max(0.0, next_s - time.monotonic())):
            if not by_file[file].recv(RECEIVE_BYTES):
                return


if __name__ == "__main__":
    place, _, port = sys.argv[1].rpartition(":")
    send((place, int(port)), int(sys.argv[2]), float(sys.argv[3]), list(map(int, sys.argv[4:])))
