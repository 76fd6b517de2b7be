"""The limit of one-sided reads in `bench transport`: NIXL's reads between two processes, nothing else."""

from __future__ import annotations

import os
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from penstock.bench.processes import ReadyProcess
from penstock.bench.transport_bare import SET_BYTES, TIMEOUT_S
from penstock.core.keys import KEY_BYTES
from penstock.io.memory import address_of, aligned_buffer
from penstock.pool.checksum import block_checksum
from penstock.pool.net.nixl_agent import NixlAgent, NixlTransfer
from penstock.process.child_python import python_command

READY = re.compile(r"bare NIXL ready: ([0-9a-f]+:[0-9]+)")
WINDOW = 8  # reads that are open at the same time
POLL_S = 50e-6
CHECKSUM_THREADS = 2


def bare_nixl_process() -> ReadyProcess:
    """The side that is read."""
    return ReadyProcess(python_command("-m", __name__), READY, ready_s=30.0)


def serve() -> None:
    """Runs in a separate process: registers memory, and says where it is."""
    agent, memory = NixlAgent(), aligned_buffer(SET_BYTES)
    memory[:] = os.urandom(1 << 20) * (SET_BYTES >> 20)
    agent.register(memory)
    print(f"bare NIXL ready: {agent.metadata().hex()}:{address_of(memory)}", flush=True)
    threading.Event().wait()


class BareNixl:
    """The side that reads, into `buffers`."""

    def __init__(self, described: str, buffers: memoryview) -> None:
        metadata, _, there = described.partition(":")
        self._there = int(there)
        self._agent = NixlAgent()
        self._agent.register(buffers)
        self._peer: Any = self._agent.add_peer(bytes.fromhex(metadata))
        self._buffers = buffers

    def run(self, size_bytes: int, count: int, checksums: bool = False) -> float:
        """Seconds for `count` reads into rotating parts of the buffers; with `checksums`, until other threads have
        computed that of each part. Raises PoolError and TimeoutError."""
        begin_s = time.perf_counter()
        reading: list[tuple[NixlTransfer, int]] = []
        begun = 0
        with ThreadPoolExecutor(CHECKSUM_THREADS) as threads:
            while begun < count or reading:
                while begun < count and len(reading) < WINDOW:
                    there = self._there + begun % (SET_BYTES // size_bytes) * size_bytes
                    at = begun % (len(self._buffers) // size_bytes) * size_bytes
                    span = address_of(self._buffers) + at, there, size_bytes
                    reading.append((self._agent.begin("READ", self._peer, [span]), at))
                    begun += 1
                left: list[tuple[NixlTransfer, int]] = []
                for one, at in reading:
                    if not one.ended():
                        left.append((one, at))
                    elif checksums:
                        threads.submit(block_checksum, bytes(KEY_BYTES), self._buffers[at : at + size_bytes])
                if len(left) == len(reading):
                    time.sleep(POLL_S)
                reading = left
                if time.perf_counter() - begin_s > TIMEOUT_S:
                    raise TimeoutError(f"the bare reads did not end within {TIMEOUT_S:.0f} s")
        return time.perf_counter() - begin_s


if __name__ == "__main__":
    serve()
