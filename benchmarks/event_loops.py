"""`python -m benchmarks event-loops`: threads that wait in the kernel, as in the pool's client, beside one event loop.

All three ways receive the same bytes from the same bare sender, and verify them in the same pieces; and all three ask
the same questions, as lookups are, of as many bare nodes.
"""

from __future__ import annotations

import asyncio
import socket
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, cast

import numpy as np
import typer
import uvloop
import xxhash
from rich.console import Console

from penstock.bench.processes import ProcessFailed
from penstock.bench.scale_bare import ORDER as QUESTION
from penstock.bench.scale_bare import BareNodes, bare_nodes_process
from penstock.bench.transport_bare import ORDER, TIMEOUT_S, bare_process
from penstock.command_line import refuse
from penstock.io.memory import aligned_buffer
from penstock.pool.net.payload_receiver import PIECE_BYTES, PayloadReceiver
from penstock.report import Report
from penstock.workloads.progress import progress_bar

WAYS = ("threads", "asyncio", "uvloop")
SIZES = {"128k": 128 << 10, "4m": 4 << 20}
CONNECTIONS = (1, 2, 8, 32)
SLOT_BYTES = 8 << 20  # received into, of each connection, in turns
REPEATS, RUN_BYTES, ROUNDS = 7, 512 << 20, 300
NODES = 24
QUESTION_BYTES, ANSWER_BYTES = 1_500, 400  # of a lookup of 90 blocks

NewLoop = Callable[[], asyncio.AbstractEventLoop]
LOOPS: dict[str, NewLoop] = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


class _Messages:
    """Where the messages of one connection are received, and what was received of them."""

    def __init__(self, memory: memoryview, size_bytes: int, count: int) -> None:
        self._memory, self._size_bytes, self.left = memory, size_bytes, count
        self._got, self._digest = 0, xxhash.xxh3_64()

    @property
    def piece(self) -> memoryview:
        """What to fill next."""
        at = self.left % (len(self._memory) // self._size_bytes) * self._size_bytes + self._got
        return self._memory[at : at + min(PIECE_BYTES, self._size_bytes - self._got)]

    def received(self, size_bytes: int) -> None:
        """Verify the first bytes of `piece`."""
        self._digest.update(self.piece[:size_bytes])
        self._got += size_bytes
        if self._got == self._size_bytes:
            self._digest.intdigest()
            self._got, self._digest = 0, xxhash.xxh3_64()
            self.left -= 1


def _threads(socks: list[socket.socket], messages: list[_Messages]) -> None:
    failures: list[OSError] = []

    def receive(sock: socket.socket, some: _Messages) -> None:
        receiver = PayloadReceiver(sock)
        try:
            while some.left:
                for piece in receiver.pieces(some.piece):
                    some.received(len(piece))
        except OSError as error:
            failures.append(error)

    threads = [threading.Thread(target=receive, args=pair, daemon=True) for pair in zip(socks, messages, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    if failures or any(thread.is_alive() for thread in threads):
        raise failures[0] if failures else TimeoutError(f"the reads did not end within {TIMEOUT_S:.0f} s")


class _Receiver(asyncio.BufferedProtocol):
    """The messages of one connection, in an event loop; the kernel is told how many bytes to wait for, as by
    `PayloadReceiver`."""

    def __init__(self, sock: socket.socket, messages: _Messages) -> None:
        self._sock, self._messages, self._waits_for = sock, messages, 0
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._messages.piece

    def buffer_updated(self, nbytes: int) -> None:
        self._messages.received(nbytes)
        if self._messages.left:
            self.wait()
        elif not self.ended.done():
            self.ended.set_result(None)

    def wait(self) -> None:
        """Be woken once the next piece is there whole."""
        if len(self._messages.piece) != self._waits_for:
            self._waits_for = len(self._messages.piece)
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, self._waits_for)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_exception(exc or ConnectionError("the bare sender closed the connection"))


def _loop(new_loop: NewLoop, socks: list[socket.socket], messages: list[_Messages]) -> None:
    async def receive() -> None:
        loop = asyncio.get_running_loop()
        made = []
        for sock, some in zip(socks, messages, strict=True):
            sock.setblocking(False)
            _, one = await loop.create_connection(partial(_Receiver, sock, some), sock=sock)
            one.wait()
            made.append(one)
        async with asyncio.timeout(TIMEOUT_S):
            await asyncio.gather(*(one.ended for one in made))

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(receive())


def _read(way: str, address: str, size_bytes: int, connections: int, count: int, memory: memoryview) -> float:
    """Seconds for `count` messages over so many connections."""
    host, _, port = address.rpartition(":")
    each = max(1, count // connections)
    socks = [socket.create_connection((host, int(port)), TIMEOUT_S) for _ in range(connections)]
    parts = [memory[at * SLOT_BYTES : (at + 1) * SLOT_BYTES] for at in range(connections)]
    messages = [_Messages(part, size_bytes, each) for part in parts]
    try:
        for sock in socks:
            sock.sendall(ORDER.pack(size_bytes, each))
        begin_s = time.perf_counter()
        if way == "threads":
            _threads(socks, messages)
        else:
            _loop(LOOPS[way], socks, messages)
        return (time.perf_counter() - begin_s) * count / (each * connections)
    finally:
        for sock in socks:
            sock.close()


class _Asker(asyncio.Protocol):
    """Questions to one node, one at a time."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self._left = 0
        self._answered: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass of it

    def ask(self, question: bytes) -> asyncio.Future[None]:
        """Send it; the result is there with the whole answer."""
        assert self.transport is not None
        self._left, self._answered = ANSWER_BYTES, asyncio.get_running_loop().create_future()
        self.transport.write(question)
        return self._answered

    def data_received(self, data: bytes) -> None:
        self._left -= len(data)
        if not self._left and self._answered is not None:
            self._answered.set_result(None)


def _ask_in_loop(new_loop: NewLoop, address: str, rounds: int) -> tuple[float, float]:
    """Seconds, and CPU seconds of this process, for so many rounds of questions to all nodes at once."""
    host, _, port = address.rpartition(":")
    question = QUESTION.pack(QUESTION_BYTES, ANSWER_BYTES).ljust(QUESTION_BYTES, b"\0")

    async def ask() -> tuple[float, float]:
        loop = asyncio.get_running_loop()
        nodes = [(await loop.create_connection(_Asker, host, int(port)))[1] for _ in range(NODES)]
        begin_s, begin_cpu_s = time.perf_counter(), time.process_time()
        async with asyncio.timeout(TIMEOUT_S):
            for _ in range(rounds):
                await asyncio.gather(*[node.ask(question) for node in nodes])
        used = time.perf_counter() - begin_s, time.process_time() - begin_cpu_s
        for node in nodes:
            if node.transport is not None:
                node.transport.close()
        return used

    with asyncio.Runner(loop_factory=new_loop) as runner:
        return runner.run(ask())


def _ask_by_hand(address: str, rounds: int) -> tuple[float, float]:
    nodes = BareNodes(address, NODES)
    begin_s, begin_cpu_s = time.perf_counter(), time.process_time()
    for _ in range(rounds):
        nodes.ask([[(QUESTION_BYTES, ANSWER_BYTES)] * NODES])
    used = time.perf_counter() - begin_s, time.process_time() - begin_cpu_s
    nodes.close()
    return used


def event_loops(
    quick: Annotated[bool, typer.Option(help="One short repeat of everything: checks that it runs.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write the figures to this file.")] = None,
) -> None:
    """Threads that wait in the kernel, as in the pool's client, beside asyncio and uvloop: reads of blocks that are
    verified, and questions to 24 nodes at once."""
    console = Console()
    report = Report("event-loops")
    repeats, run_bytes, rounds = (1, 64 << 20, 10) if quick else (REPEATS, RUN_BYTES, ROUNDS)
    try:
        with progress_bar(console) as progress:
            task = progress.add_task("start", total=2 * repeats)

            def step(text: str) -> None:
                progress.update(task, description=text, advance=1)

            _measure_reads(report, repeats, run_bytes, step)
            _measure_questions(report, repeats, rounds, step)
    except (OSError, ProcessFailed) as error:
        refuse("python -m benchmarks event-loops", error, status=1)
    report.notes.append(
        "read_<size>_<connections>: verified in pieces of 1 MiB; by threads one for each connection, in a loop on its "
        "thread; cpu_s_per_gb and question_cpu_us: of this process. questions_ms: one to each of 24 nodes at once, and "
        "all answers; by threads the one that asks also receives"
    )
    report.print(console)
    if json is not None:
        report.write_json(json)


def _measure_reads(report: Report, repeats: int, run_bytes: int, step: Callable[[str], None]) -> None:
    memory = aligned_buffer(SLOT_BYTES * max(CONNECTIONS))
    np.frombuffer(memory, np.uint8)[:] = 1  # its pages are there
    loads = [(way, size, connections) for size in SIZES for connections in CONNECTIONS for way in WAYS]
    rates: dict[tuple[str, str, int], list[float]] = defaultdict(list)
    cpu_s_per_gb: dict[tuple[str, str, int], list[float]] = defaultdict(list)
    with bare_process() as sender:
        for repeat in range(repeats):
            step(f"reads, repeat {repeat + 1} of {repeats}")
            for load in loads if repeat % 2 else reversed(loads):
                way, size, connections = load
                count, begin_s = run_bytes // SIZES[size], time.process_time()
                seconds = _read(way, sender.address, SIZES[size], connections, count, memory)
                cpu_s_per_gb[load].append((time.process_time() - begin_s) / (count * SIZES[size] / 1e9))
                rates[load].append(count * SIZES[size] / seconds)
    for load in loads:
        way, size, connections = load
        name = f"{way}_read_{size}_{connections}"
        report.figure(f"{name}_gb_per_s", statistics.median(rates[load]) / 1e9)
        report.figure(f"{name}_cpu_s_per_gb", statistics.median(cpu_s_per_gb[load]))
        if way != "threads":
            pairs = zip(rates[load], rates["threads", size, connections], strict=True)
            report.figure(f"{name}_over_threads", statistics.median(one / other for one, other in pairs))


def _measure_questions(report: Report, repeats: int, rounds: int, step: Callable[[str], None]) -> None:
    asked: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for repeat in range(repeats):
        step(f"questions, repeat {repeat + 1} of {repeats}")
        for way in WAYS if repeat % 2 else reversed(WAYS):
            with bare_nodes_process(NODES) as nodes:
                ask = _ask_by_hand if way == "threads" else partial(_ask_in_loop, LOOPS[way])
                asked[way].append(ask(nodes.address, rounds))
    for way, used in asked.items():
        report.figure(f"{way}_questions_ms", 1e3 * statistics.median(seconds for seconds, _ in used) / rounds)
        report.figure(f"{way}_question_cpu_us", 1e6 * statistics.median(cpu for _, cpu in used) / rounds / NODES)
