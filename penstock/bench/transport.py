"""`penstock bench transport`: reads from a pool node against bare loops, of sockets and of NIXL, each between two
processes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import queue
import re
import statistics
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from penstock.bench.process_cpu import cpu_s
from penstock.bench.processes import POOL_READY, ProcessFailed, ReadyProcess
from penstock.bench.transport_bare import SET_BYTES, TIMEOUT_S, bare_process, run_bare
from penstock.bench.transport_one_sided import conclude_one_sided, measure_one_sided
from penstock.command_line import PlotFile, refuse
from penstock.core.keys import KEY_BYTES, BlockKey
from penstock.core.new_block import NewBlock
from penstock.extras import missing_modules
from penstock.io.memory import aligned_buffer
from penstock.pool.api import Pool, PoolError, ReadCheck
from penstock.pool.authenticated import authenticated
from penstock.pool.checksum import block_checksum
from penstock.pool.mac import PoolKey
from penstock.pool.net.connect import connect_pool
from penstock.pool.net.secret import Secret
from penstock.pool.net.tls import PeerTls
from penstock.process.child_python import python_command
from penstock.report import Report
from penstock.testing.certificates import Authority
from penstock.workloads.plots import bar_chart

SIZES = {"128k": 128 << 10, "2m": 2 << 20, "4m": 4 << 20}
ALONE_SIZES = {"64k": 64 << 10, "512k": 512 << 10, "4m": 4 << 20}
BUFFER_BYTES = 32 << 20
WINDOW = 8  # concurrent reads of the client
SPAN_BYTES, SPANS = 1 << 20, 4  # of blocks that travel together, and how many of those are under way
RATIO_GOALS = {("128k", 1): 0.8, ("2m", 1): 0.95, ("4m", 1): 0.95, ("4m", 2): 0.9}


@dataclass(slots=True)
class Samples:
    """Bandwidths of one contestant's repeats at one load, and their total cost."""

    bytes_per_s: list[float] = field(default_factory=list)
    moved_bytes: int = 0
    client_cpu_s: float = 0.0
    node_cpu_s: float = 0.0

    @property
    def median(self) -> float:
        """Median of the repeats, in bytes per second."""
        return statistics.median(self.bytes_per_s)

    @property
    def cpu_s_per_gb(self) -> float:
        """Processor seconds per 10^9 bytes, of both processes."""
        return (self.client_cpu_s + self.node_cpu_s) / (self.moved_bytes / 1e9)


@dataclass(frozen=True, slots=True)
class Proof:
    """Credentials of one contestant: the node's flags, and the client's. With a pool key, blocks have MACs, which the
    client verifies instead of checksums."""

    flags: tuple[str, ...] = ()
    secret: Secret | None = None
    tls: PeerTls | None = None
    pool_key: PoolKey | None = None


Results = dict[tuple[str, str, int], Samples]  # (contestant, size, connections)


def transport(
    repeats: Annotated[int, typer.Option(min=1, max=100, help="Runs of each load; the median counts.")] = 9,
    run_mib: Annotated[int, typer.Option(min=64, max=65536, help="MiB that one run moves.")] = 1024,
    tls: Annotated[
        bool, typer.Option("--tls", help="Also compare a shared secret and mutual TLS (needs the openssl command).")
    ] = False,
    pool_key_file: Annotated[
        Path | None,
        typer.Option(help="Also read with this pool key (mac_*), to measure the cost of MACs in the same run."),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write the figures to this file.")] = None,
    plot: PlotFile = None,
) -> None:
    """Read bandwidth and CPU time of a pool node over loopback TCP against a bare socket loop, and one-sided against a
    bare loop of NIXL, where that is installed."""
    console = Console()
    report = Report("transport")
    loads = [("128k", 1), ("2m", 1), ("4m", 1), ("4m", 2)]
    try:
        pool_key = PoolKey.read(pool_key_file) if pool_key_file is not None else None
        with tempfile.TemporaryDirectory() as folder:
            proofs = {"tcp": Proof()} | (_proofs(Path(folder)) if tls else {})
            if pool_key is not None:
                proofs["mac"] = Proof(pool_key=pool_key)
            results = _measure(console, loads, repeats, run_mib << 20, proofs)
        one_sided = measure_one_sided(repeats, run_mib << 20) if not missing_modules("nixl") else None
    except (OSError, ValueError, PoolError, ProcessFailed) as error:
        refuse("penstock bench transport", error, status=1)
    _conclude(report, results, loads, pool_key)
    for who in ("tcp", "secret", "tls") if tls else ():
        _add_costs(report, results, loads, who)
    if one_sided is not None:
        conclude_one_sided(report, one_sided)
    report.print(console)
    if json is not None:
        report.write_json(json)
    if plot is not None:
        draw(plot, report)


def draw(path: Path, report: Report) -> None:
    """Reads in messages beside the bare socket loop and, where they were measured, one-sided beside NIXL's own loop."""
    titles = {"tcp": "Penstock", "bare": "bare loop", "one_sided": "Penstock", "nixl": "bare loop"}
    titles["unchecked"] = "Penstock, not verified"
    panels: dict[str, dict[str, dict[str, float]]] = {}
    for name, value in report.figures.items():
        if (found := re.fullmatch(r"(.+)_read_(\w+)_gb_per_s", name)) is not None:
            who, load = found.groups()
            panel = (
                "one-sided; the bare loop is NIXL's"
                if who in ("one_sided", "nixl")
                else "in messages over loopback TCP"
            )
            group = load.replace("_2conn", ", two connections")
            panels.setdefault(panel, {}).setdefault(group, {})[titles.get(who, who)] = value
    bar_chart(path, "Reads between two processes, medians", "GB/s", panels)


def _proofs(folder: Path) -> dict[str, Proof]:
    """Credentials with a secret, and with certificates. Raises OSError."""
    key, file = os.urandom(32).hex(), folder / "secret"
    file.touch(0o600)
    file.write_text(key)
    certificates = Authority(folder).issue()
    return {
        "secret": Proof(("--secret-file", str(file)), secret=Secret(key.encode())),
        "tls": Proof(tuple(certificates.flags), tls=certificates.tls),
    }


def _measure(
    console: Console, loads: list[tuple[str, int]], repeats: int, run_bytes: int, proofs: dict[str, Proof]
) -> Results:
    """All loads, interleaved: each repeat runs all contestants of every load, in alternating order."""
    results: Results = defaultdict(Samples)
    members = ["--memory", str(len(SIZES) * SET_BYTES)]
    command = python_command("-m", "penstock", "pool", "--listen", "127.0.0.1:0", *members)
    with contextlib.ExitStack() as stack:
        nodes = {
            who: stack.enter_context(ReadyProcess([*command, *proof.flags], POOL_READY, ready_s=30.0))
            for who, proof in proofs.items()
        }
        bare = stack.enter_context(bare_process())
        buffers = aligned_buffer(BUFFER_BYTES)
        keys = {who: _fill(nodes[who].address, proof) for who, proof in proofs.items()}
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        progress = stack.enter_context(Progress(*columns, console=console))
        bar = progress.add_task("reading", total=repeats * len(loads) * (3 + len(nodes)))
        for repeat in range(repeats):
            for size, connections in loads:
                size_bytes = SIZES[size]
                count = run_bytes // size_bytes
                load = (size_bytes, count, connections, buffers)
                runs: dict[str, tuple[int, Callable[[], float]]] = {
                    "bare": (bare.pid, partial(run_bare, bare.address, *load)),
                    "checked": (bare.pid, partial(run_bare, bare.address, *load, checksums=True)),
                }
                for who, proof in proofs.items():
                    node = nodes[who]
                    runs[who] = (node.pid, partial(_run_pool, node.address, proof, keys[who][size], *load))
                node = nodes["tcp"]
                runs["unchecked"] = node.pid, partial(_run_pool, node.address, Proof(), keys["tcp"][size], *load, False)
                for who in sorted(runs, reverse=repeat % 2 == 1):
                    pid, run = runs[who]
                    begin_s, node_begin_s = time.process_time(), cpu_s(pid)
                    seconds = run()
                    found = results[who, size, connections]
                    found.client_cpu_s += time.process_time() - begin_s
                    found.node_cpu_s += cpu_s(pid) - node_begin_s
                    found.moved_bytes += count * size_bytes
                    found.bytes_per_s.append(count * size_bytes / seconds)
                    progress.advance(bar)
    return results


def _conclude(report: Report, results: Results, loads: list[tuple[str, int]], pool_key: PoolKey | None) -> None:
    gb_per_s, cpu_s_per_gb = _alone(_checksum, SIZES["4m"])
    for size, connections in loads:
        suffix = size if connections == 1 else f"{size}_{connections}conn"
        bare, ours = results["bare", size, connections], results["tcp", size, connections]
        ratios = [a / b for a, b in zip(ours.bytes_per_s, bare.bytes_per_s, strict=True)]
        report.figure(f"tcp_read_{suffix}_gb_per_s", ours.median / 1e9)
        report.figure(f"bare_read_{suffix}_gb_per_s", bare.median / 1e9)
        report.figure(f"tcp_read_{suffix}_ratio", ours.median / bare.median, RATIO_GOALS[size, connections])
        checked = results["checked", size, connections]
        report.figure(f"tcp_read_{suffix}_ratio_max", checked.median / bare.median)
        report.figure(f"tcp_read_{suffix}_checked_ratio", ours.median / checked.median)
        report.figure(f"tcp_read_{suffix}_paired_ratio", statistics.median(ratios))
        report.figure(f"tcp_read_{suffix}_cpu_s_per_gb", ours.cpu_s_per_gb, bare.cpu_s_per_gb)
        report.figure(f"checked_read_{suffix}_cpu_s_per_gb", checked.cpu_s_per_gb, bare.cpu_s_per_gb)
        unchecked = results["unchecked", size, connections]
        report.figure(f"unchecked_read_{suffix}_gb_per_s", unchecked.median / 1e9)
        report.figure(f"unchecked_read_{suffix}_ratio", unchecked.median / bare.median)
        report.figure(f"unchecked_read_{suffix}_cpu_s_per_gb", unchecked.cpu_s_per_gb, bare.cpu_s_per_gb)
        if pool_key is not None:
            mac = results["mac", size, connections]
            report.figure(f"mac_read_{suffix}_gb_per_s", mac.median / 1e9)
            report.figure(f"mac_read_{suffix}_cpu_s_per_gb", mac.cpu_s_per_gb, ours.cpu_s_per_gb)
    report.figure("checksum_4m_gb_per_s", gb_per_s)
    report.figure("checksum_4m_cpu_s_per_gb", cpu_s_per_gb)
    if pool_key is not None:
        for size, size_bytes in ALONE_SIZES.items():
            checksum_s_per_gb = _alone(_checksum, size_bytes)[1]
            gb_per_s, cpu_s_per_gb = _alone(pool_key.mac, size_bytes)
            report.figure(f"mac_{size}_gb_per_s", gb_per_s)
            report.figure(f"mac_{size}_cpu_s_per_gb", cpu_s_per_gb, checksum_s_per_gb)
        report.notes.append("mac_* verifies MACs, not checksums; limit of its *_cpu_s_per_gb: the checksum's")
    report.notes.append("real bytes between two processes over loopback; tcp_* verifies the checksum of every block")
    report.notes.append("unchecked_*: the same reads, not verified, only measured: the difference is the checksum's")
    report.notes.append("*_ratio_max: the bare loop with the checksum, over the one without; *_checked_ratio: over it")
    report.notes.append("limit of *_ratio: the goal; of *_cpu_s_per_gb: the bare loop's, both processes together")


def _add_costs(report: Report, results: Results, loads: list[tuple[str, int]], who: str) -> None:
    """Cost of one kind of credentials: bandwidth, and CPU time of each side."""
    for size, connections in loads:
        suffix = size if connections == 1 else f"{size}_{connections}conn"
        found, plain = results[who, size, connections], results["tcp", size, connections]
        gb = found.moved_bytes / 1e9
        if who != "tcp":
            report.figure(f"{who}_read_{suffix}_gb_per_s", found.median / 1e9)
            report.figure(f"{who}_read_{suffix}_to_tcp_ratio", found.median / plain.median)
        report.figure(f"{who}_read_{suffix}_client_cpu_s_per_gb", found.client_cpu_s / gb)
        report.figure(f"{who}_read_{suffix}_node_cpu_s_per_gb", found.node_cpu_s / gb)
    if who == "tls":
        report.notes.append(
            "tcp_*: open to anyone who reaches the port; secret_*: a shared secret; tls_*: mutual TLS 1.3"
        )


def _checksum(key: BlockKey, data: memoryview) -> object:
    return block_checksum(key, data)


def _alone(digest: Callable[[BlockKey, memoryview], object], size_bytes: int) -> tuple[float, float]:
    """GB/s and CPU-s per GB of a digest of blocks, over memory that is not in a cache."""
    memory, key = aligned_buffer(SET_BYTES), bytes(KEY_BYTES)
    memory[:] = os.urandom(1 << 20) * (SET_BYTES >> 20)
    begin_s, begin_cpu_s = time.perf_counter(), time.process_time()
    for _ in range(8):
        for at in range(0, SET_BYTES, size_bytes):
            digest(key, memory[at : at + size_bytes])
    gb = 8 * SET_BYTES / 1e9
    return gb / (time.perf_counter() - begin_s), (time.process_time() - begin_cpu_s) / gb


# --- Penstock: a pool node and a client ---


def _connect(address: str, proof: Proof, connections: int = 1) -> Pool:
    pool = connect_pool(address, connections=connections, secret=proof.secret, tls=proof.tls)
    return authenticated(pool, proof.pool_key)


def _fill(address: str, proof: Proof) -> dict[str, list[BlockKey]]:
    """Write the block sets; returns their keys."""
    pool = _connect(address, proof)
    data = aligned_buffer(max(SIZES.values()))
    data[:] = os.urandom(len(data))
    keys: dict[str, list[BlockKey]] = {}
    try:
        for size, size_bytes in SIZES.items():
            parent = hashlib.blake2b(size.encode(), digest_size=16).digest()
            keys[size] = []
            for _ in range(SET_BYTES // size_bytes):
                key = hashlib.blake2b(parent, digest_size=16).digest()
                ended: queue.SimpleQueue[PoolError | None] = queue.SimpleQueue()
                pool.write(NewBlock(key, parent, size_bytes), data, TIMEOUT_S, ended.put)
                error = ended.get(timeout=TIMEOUT_S + 1)
                if error is not None:
                    raise error
                keys[size].append(key)
                parent = key
    finally:
        pool.close(5.0)
    return keys


class _Reader:
    """Has `WINDOW` blocks, or `SPANS` spans of smaller ones, on their way until `count` have ended."""

    def __init__(
        self, pool: Pool, keys: list[BlockKey], size_bytes: int, count: int, buffers: memoryview, verify: bool = True
    ) -> None:
        self._pool, self._keys, self._size, self._count, self._buffers = pool, keys, size_bytes, count, buffers
        self._check: ReadCheck | None = None if verify else _accept
        self._span = max(1, SPAN_BYTES // size_bytes)
        self._window = WINDOW if self._span == 1 else SPANS
        self._lock = threading.Lock()
        self._next = self._ended = 0
        self._failed: PoolError | None = None
        self._all = threading.Event()

    def run(self) -> float:
        """Seconds until every read has ended. Raises the first PoolError."""
        begin_s = time.perf_counter()
        for slot in range(min(self._window, -(-self._count // self._span))):
            self._start(slot)
        if not self._all.wait(TIMEOUT_S + 1):
            raise PoolError("deadline", "reads did not end by their deadline")
        if self._failed is not None:
            raise self._failed
        return time.perf_counter() - begin_s

    def _start(self, slot: int) -> None:
        with self._lock:
            first = self._next
            blocks = min(self._span, self._count - first)
            if not blocks:
                return
            self._next += blocks
        # Buffers rotate so that a read goes to memory that is not in a cache, as in the bare loop.
        turns = BUFFER_BYTES // self._size // self._span // self._window
        at = (first // self._span % turns * self._window + slot) * self._span
        intos = [self._buffers[one * self._size : (one + 1) * self._size] for one in range(at, at + blocks)]
        keys = [self._keys[number % len(self._keys)] for number in range(first, first + blocks)]
        if blocks == 1:
            ended = partial(self._end_one, slot)
            self._pool.read(keys[0], self._size, intos[0], TIMEOUT_S, ended, self._check)
        else:
            checks = [self._check] * blocks
            self._pool.read_many(keys, self._size, intos, TIMEOUT_S, partial(self._end, slot), checks)

    def _end_one(self, slot: int, error: PoolError | None) -> None:
        self._end(slot, [error])

    def _end(self, slot: int, errors: list[PoolError | None]) -> None:
        error = next(filter(None, errors), None)
        with self._lock:
            self._ended += len(errors)
            if error is not None:
                self._failed = self._failed or error
                self._next = self._count
            finished = self._ended == self._count or error is not None
        if finished:
            self._all.set()
        else:
            self._start(slot)


def _run_pool(
    address: str,
    proof: Proof,
    keys: list[BlockKey],
    size_bytes: int,
    count: int,
    connections: int,
    buffers: memoryview,
    verify: bool = True,
) -> float:
    pool = _connect(address, proof, connections)
    try:
        return _Reader(pool, keys, size_bytes, count, buffers, verify).run()
    finally:
        pool.close(5.0)


def _accept(data: memoryview, checksum: int, mac: bytes) -> None:
    """A check that verifies nothing."""
