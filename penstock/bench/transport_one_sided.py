"""The part of `penstock bench transport` with NIXL: one node, read and written in messages and one-sided, against bare
loops and plain copies."""

from __future__ import annotations

import contextlib
import hashlib
import os
import queue
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from penstock.bench.process_cpu import cpu_s
from penstock.bench.processes import POOL_READY, ReadyProcess
from penstock.bench.transport_bare import SET_BYTES, TIMEOUT_S
from penstock.bench.transport_nixl import BareNixl, bare_nixl_process
from penstock.core.keys import BlockKey
from penstock.core.new_block import NewBlock
from penstock.io.memory import aligned_buffer
from penstock.pool.api import Done, PoolError, ReadCheck
from penstock.pool.net.connect import connect_pool
from penstock.pool.net.remote import RemotePool
from penstock.process.child_python import python_command
from penstock.report import Report

SIZES = {"1m": 1 << 20, "8m": 8 << 20}
BUFFER_BYTES = 64 << 20
WINDOW = 8  # blocks that are read at the same time
ATTACH_S = 10.0
RATIO_MIN = 0.9
NODE_CPU_S_PER_GB_MAX = 0.02
COPY_RATIO_MAX = 1.2  # client's CPU of a read that verifies nothing, over that of a plain copy
COPIED = "8m"


@dataclass(slots=True)
class Runs:
    """The repeats of one contestant at one size; CPU time of both processes."""

    bytes_per_s: list[float] = field(default_factory=list)
    moved_bytes: int = 0
    client_cpu_s: float = 0.0
    node_cpu_s: float = 0.0


@dataclass(slots=True)
class OneSidedResults:
    """What was measured, by contestant and size, and what idle processes use."""

    runs: dict[tuple[str, str], Runs]
    idle_share: float
    transport: str


def measure_one_sided(repeats: int, run_bytes: int) -> OneSidedResults:
    """Reads of blocks in memory, in messages ("tcp"), one-sided, and by the bare loop ("nixl"), in alternating order.
    Raises OSError, PoolError and ProcessFailed."""
    runs: dict[tuple[str, str], Runs] = defaultdict(Runs)
    command = python_command("-m", "penstock", "pool", "--listen", "127.0.0.1:0", "--rdma")
    with contextlib.ExitStack() as stack:
        members = ["--memory", str((len(SIZES) + 1) * SET_BYTES)]
        node = stack.enter_context(ReadyProcess([*command, *members], POOL_READY, ready_s=30.0))
        bare = stack.enter_context(bare_nixl_process())
        buffers = aligned_buffer(BUFFER_BYTES)
        in_messages, one_sided = connect_pool(node.address), connect_pool(node.address)
        for pool in (in_messages, one_sided):
            stack.callback(pool.close, 5.0)
        keys = _fill(in_messages)
        one_sided.register(buffers)
        _until_attached(one_sided)
        loop = BareNixl(bare.address, buffers)
        copied = aligned_buffer(SET_BYTES)
        copied[:] = os.urandom(1 << 20) * (SET_BYTES >> 20)
        for repeat in range(repeats):
            for size, size_bytes in SIZES.items():
                count = run_bytes // size_bytes
                contest: dict[str, tuple[int, Callable[[], float]]] = {
                    "nixl": (bare.pid, partial(loop.run, size_bytes, count)),
                    "one_sided": (node.pid, partial(_read, one_sided, keys[size], size_bytes, count, buffers)),
                    "tcp": (node.pid, partial(_read, in_messages, keys[size], size_bytes, count, buffers)),
                }
                if size == COPIED:
                    unchecked = partial(_read, one_sided, keys[size], size_bytes, count, buffers, _unchecked)
                    contest["unchecked"] = node.pid, unchecked
                    contest["checked"] = bare.pid, partial(loop.run, size_bytes, count, checksums=True)
                    contest["copy"] = node.pid, partial(_copy, copied, size_bytes, count, buffers)
                for who in sorted(contest, reverse=repeat % 2 == 1):
                    _run(runs[who, size], *contest[who], count * size_bytes)
                writers = {"one_sided_write": one_sided, "tcp_write": in_messages}
                for who in sorted(writers, reverse=repeat % 2 == 1):
                    new = _keys_of(f"{who} {repeat} {size}", SET_BYTES // size_bytes)
                    write = partial(_write, writers[who], new, size_bytes, buffers)
                    _run(runs[who, size], node.pid, write, SET_BYTES)
                    in_messages.evict(new)
        idle = Runs()
        _run(idle, node.pid, _sleep, 1)
        return OneSidedResults(runs, idle.client_cpu_s + idle.node_cpu_s, one_sided.one_sided)


def _run(found: Runs, pid: int, run: Callable[[], float], moved_bytes: int) -> None:
    begin_s, node_begin_s = time.process_time(), cpu_s(pid)
    seconds = run()
    found.client_cpu_s += time.process_time() - begin_s
    found.node_cpu_s += cpu_s(pid) - node_begin_s
    found.moved_bytes += moved_bytes
    found.bytes_per_s.append(moved_bytes / seconds)


def _sleep() -> float:
    time.sleep(1.0)
    return 1.0


def conclude_one_sided(report: Report, results: OneSidedResults) -> None:
    """The figures `one_sided_*` and `nixl_*`; the checksums of every block are part of them."""
    for size in SIZES:
        bare, ours, tcp = (results.runs[who, size] for who in ("nixl", "one_sided", "tcp"))
        median, limit = statistics.median(ours.bytes_per_s), statistics.median(bare.bytes_per_s)
        report.figure(f"one_sided_read_{size}_gb_per_s", median / 1e9)
        report.figure(f"nixl_read_{size}_gb_per_s", limit / 1e9)
        report.figure(f"one_sided_read_{size}_ratio", median / limit, RATIO_MIN if size == "8m" else None)
        for side in ("client", "node"):
            at_most = NODE_CPU_S_PER_GB_MAX if side == "node" else None
            cost = {who: getattr(found, f"{side}_cpu_s") / (found.moved_bytes / 1e9) for who, found in
                    (("one_sided", ours), ("nixl", bare), ("tcp", tcp))}  # fmt: skip
            report.figure(f"one_sided_read_{size}_{side}_cpu_s_per_gb", cost["one_sided"], at_most)
            report.figure(f"nixl_read_{size}_{side}_cpu_s_per_gb", cost["nixl"])
            report.figure(f"tcp_read_{size}_{side}_cpu_s_per_gb", cost["tcp"])
        for who in ("one_sided_write", "tcp_write"):
            found = results.runs[who, size]
            report.figure(f"{who}_{size}_gb_per_s", statistics.median(found.bytes_per_s) / 1e9)
            report.figure(f"{who}_{size}_client_cpu_s_per_gb", found.client_cpu_s / (found.moved_bytes / 1e9))
            report.figure(f"{who}_{size}_node_cpu_s_per_gb", found.node_cpu_s / (found.moved_bytes / 1e9))
    unchecked, copy = (results.runs[who, COPIED] for who in ("unchecked", "copy"))
    checked, bare = (results.runs[who, COPIED] for who in ("checked", "nixl"))
    copy_s_per_byte = copy.client_cpu_s / copy.moved_bytes
    ratio, limit = (one.client_cpu_s / one.moved_bytes / copy_s_per_byte for one in (unchecked, bare))
    most = statistics.median(checked.bytes_per_s) / statistics.median(bare.bytes_per_s)
    median = statistics.median(results.runs["one_sided", COPIED].bytes_per_s)
    report.figure(f"one_sided_read_{COPIED}_ratio_max", most)
    report.figure(f"one_sided_read_{COPIED}_checked_ratio", median / statistics.median(checked.bytes_per_s))
    report.figure(f"copy_{COPIED}_cpu_s_per_gb", copy.client_cpu_s / (copy.moved_bytes / 1e9))
    report.figure(f"one_sided_read_{COPIED}_unchecked_client_cpu_over_copy", ratio, COPY_RATIO_MAX)
    report.figure(f"nixl_read_{COPIED}_client_cpu_over_copy", limit)
    report.figure("one_sided_idle_cores", results.idle_share, 0.02)
    report.notes.append(
        f"one_sided_*, nixl_*: by {results.transport}; one_sided_* verifies the checksum of every block, nixl_* none; "
        "ratio_max: the bare loop with checksums on two more threads, over the one without; checked_ratio: over it"
    )


def _fill(pool: RemotePool) -> dict[str, list[BlockKey]]:
    """Write a set of blocks of each size; returns their keys."""
    data = aligned_buffer(max(SIZES.values()))
    data[:] = os.urandom(len(data))
    keys: dict[str, list[BlockKey]] = {}
    for size, size_bytes in SIZES.items():
        keys[size] = _keys_of(size, SET_BYTES // size_bytes)
        for key in keys[size]:
            ended: queue.SimpleQueue[PoolError | None] = queue.SimpleQueue()
            pool.write(NewBlock(key, bytes(16), size_bytes), data, TIMEOUT_S, ended.put)
            if (error := ended.get(timeout=TIMEOUT_S + 1)) is not None:
                raise error
    return keys


def _keys_of(name: str, count: int) -> list[BlockKey]:
    return [hashlib.blake2b(f"{name} {number}".encode(), digest_size=16).digest() for number in range(count)]


def _unchecked(data: memoryview, checksum: int, mac: bytes) -> None:
    """A check that looks at nothing."""


def _copy(source: memoryview, size_bytes: int, count: int, buffers: memoryview) -> float:
    """Seconds for `count` copies within this process, of rotating parts."""
    there, here = np.frombuffer(source, np.uint8), np.frombuffer(buffers, np.uint8)
    begin_s = time.perf_counter()
    for number in range(count):
        at, into = (number % (len(one) // size_bytes) * size_bytes for one in (there, here))
        np.copyto(here[into : into + size_bytes], there[at : at + size_bytes])
    return time.perf_counter() - begin_s


def _until_attached(pool: RemotePool) -> None:
    until_s = time.monotonic() + ATTACH_S
    while pool.one_sided.startswith("off"):
        if time.monotonic() > until_s:
            raise PoolError("network", f"the node is not read one-sided: {pool.one_sided}")
        time.sleep(0.01)


def _read(
    pool: RemotePool,
    keys: list[BlockKey],
    size_bytes: int,
    count: int,
    buffers: memoryview,
    check: ReadCheck | None = None,
) -> float:
    """Seconds for `count` reads, WINDOW at the same time, into rotating parts of the buffers."""

    def read(number: int, part: memoryview, ended: Done) -> None:
        pool.read(keys[number % len(keys)], size_bytes, part, TIMEOUT_S, ended, check)

    return _several(read, size_bytes, count, buffers)


def _write(pool: RemotePool, keys: list[BlockKey], size_bytes: int, buffers: memoryview) -> float:
    """Seconds for writes of these blocks, WINDOW at the same time, from rotating parts of the buffers."""

    def write(number: int, part: memoryview, ended: Done) -> None:
        pool.write(NewBlock(keys[number], bytes(16), size_bytes, number), part, TIMEOUT_S, ended)

    return _several(write, size_bytes, len(keys), buffers)


def _several(begin: Callable[[int, memoryview, Done], None], size_bytes: int, count: int, buffers: memoryview) -> float:
    """Seconds for `count` operations, WINDOW at the same time, each with its part of the buffers."""
    slots = len(buffers) // size_bytes
    free = threading.Semaphore(min(WINDOW, slots))
    failed: list[PoolError] = []

    def ended(error: PoolError | None) -> None:
        if error is not None:
            failed.append(error)
        free.release()

    begin_s = time.perf_counter()
    for number in range(count):
        free.acquire()
        at = number % slots * size_bytes
        begin(number, buffers[at : at + size_bytes], ended)
    for _ in range(min(WINDOW, slots)):
        free.acquire()
    if failed:
        raise failed[0]
    return time.perf_counter() - begin_s
