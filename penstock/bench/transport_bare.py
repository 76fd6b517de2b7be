"""The limits of `bench transport`: sendall and recv_into between two processes, alone and with the checksum."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import struct
import threading
import time

import xxhash

from penstock.bench.processes import ReadyProcess
from penstock.io.memory import aligned_buffer
from penstock.process.child_python import python_command

READY = re.compile(r"bare server ready on ([\w.:]+:\d+)")
ORDER = struct.Struct("<QQ")  # size and count of the messages that a connection requests
SET_BYTES = 64 << 20  # distinct bytes, so that sends do not come from the processor's caches
CHECKED_BYTES = 512 << 10  # these lie in a processor's own cache when the checksum is computed
TIMEOUT_S = 20.0


def bare_process() -> ReadyProcess:
    """The sending side."""
    return ReadyProcess(python_command("-m", __name__), READY, ready_s=30.0)


def serve() -> None:
    """Runs in a separate process: each connection requests `count` messages of a size, and receives them."""
    memory = aligned_buffer(SET_BYTES)
    memory[:] = os.urandom(1 << 20) * (SET_BYTES >> 20)
    listener = socket.create_server(("127.0.0.1", 0))
    print(f"bare server ready on 127.0.0.1:{listener.getsockname()[1]}", flush=True)
    while True:
        sock, _ = listener.accept()
        threading.Thread(target=_send, args=(sock, memory), daemon=True).start()


def _send(sock: socket.socket, memory: memoryview) -> None:
    with sock, contextlib.suppress(OSError):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        size_bytes, count = ORDER.unpack(sock.recv(ORDER.size, socket.MSG_WAITALL))
        for number in range(count):
            at = number % (SET_BYTES // size_bytes) * size_bytes
            sock.sendall(memory[at : at + size_bytes])


def run_bare(
    address: str, size_bytes: int, count: int, connections: int, buffers: memoryview, checksums: bool = False
) -> float:
    """Seconds for `count` messages over `connections`, received into rotating parts of `buffers`; with `checksums`,
    each piece of CHECKED_BYTES is received whole, and taken into the message's checksum at once."""
    host, _, port = address.rpartition(":")
    socks = [socket.create_connection((host, int(port)), timeout=TIMEOUT_S) for _ in range(connections)]
    slots = len(buffers) // size_bytes // connections
    piece_bytes = min(size_bytes, CHECKED_BYTES) if checksums else size_bytes
    failures: list[OSError] = []

    def receive(number: int, sock: socket.socket) -> None:
        try:
            sock.settimeout(None)
            sock.sendall(ORDER.pack(size_bytes, count // connections))
            for i in range(count // connections):
                at = (number * slots + i % slots) * size_bytes
                into, digest, got = buffers[at : at + size_bytes], xxhash.xxh3_64(), 0
                while got < size_bytes:
                    piece = into[got : got + piece_bytes]
                    received = sock.recv_into(piece, 0, socket.MSG_WAITALL)
                    if received == 0:
                        raise ConnectionError("the bare server closed the connection")
                    if checksums:
                        digest.update(piece[:received])
                    got += received
                digest.intdigest()
        except OSError as error:
            failures.append(error)

    threads = [threading.Thread(target=receive, args=pair, daemon=True) for pair in enumerate(socks)]
    begin_s = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    seconds = time.perf_counter() - begin_s
    for sock in socks:
        sock.close()
    if failures or any(thread.is_alive() for thread in threads):
        raise failures[0] if failures else OSError(f"the bare loop did not end within {TIMEOUT_S:.0f} s")
    return seconds


if __name__ == "__main__":
    serve()
