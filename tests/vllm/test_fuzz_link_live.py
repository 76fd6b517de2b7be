"""vLLM's worker link gets mutants: from strangers before the scheduler comes, from a scheduler, from a worker."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import random
import socket
import threading
import uuid
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from penstock.process.guarded_thread import thread_failures
from penstock.vllm import link as wire
from penstock.vllm.link import Attach, Done, Hello, Link, LinkError, Upload, connect, create_memory, listen, socket_name
from penstock.vllm.worker import WorkerSide
from penstock.vllm.worker_links import WorkerLinks
from tests.fuzz_messages import MESSAGES, SEED, Protocol
from tests.message_mutants import Piece, mutants
from tests.process_figures import back_to, figures
from tests.vllm.gated_rows import PLACES, ROW_BYTES, ROWS, WAIT_S, GatedRows

MIB = 1 << 20
SLOTS, SLOT_BYTES = 4, 4096
LINK = Protocol("link", wire.Message, wire.decode, LinkError)
ROUNDS = max(1, MESSAGES // 500_000)  # for each type of message


def each_mutant(rounds: int, count: int, feed: Callable[[list[bytes], random.Random], None]) -> None:
    """Give `feed` so many mutants, for each type of message and round."""
    for cls in LINK.kinds:

        @seed(SEED)
        @settings(max_examples=rounds, database=None, suppress_health_check=[*HealthCheck])
        @given(LINK.valid(cls), st.integers(0, 1 << 32))
        def run(base: list[Piece], number: int) -> None:
            draws = random.Random(number)
            made = list(mutants(base, 20 * count, draws))
            draws.shuffle(made)
            feed(made[:count], draws)

        run()


def framed(body: bytes) -> bytes:
    return len(body).to_bytes(4, "little") + body


@pytest.fixture
def engine() -> str:
    return str(uuid.uuid4())


@contextlib.contextmanager
def worker(engine: str, rank: int, rows: GatedRows) -> Iterator[WorkerSide]:
    side = WorkerSide(engine, rank, rows)
    try:
        yield side
    finally:
        side.close()


@contextlib.contextmanager
def scheduler_of(engine: str) -> Iterator[Link]:
    link = connect(engine, 0, WAIT_S)
    assert isinstance(link.receive(WAIT_S), Hello)
    descriptor, memory = create_memory(SLOTS * SLOT_BYTES)
    memory[: 2 * ROW_BYTES] = b"k" * (2 * ROW_BYTES)
    link.send_with_descriptor(Attach(SLOTS, SLOT_BYTES, 0, [ROWS]), descriptor)
    os.close(descriptor)
    try:
        yield link
    finally:
        link.close()
        memory.close()


def test_strangers_that_send_mutants_do_not_end_a_start(engine: str, caplog: pytest.LogCaptureFixture) -> None:
    failed = thread_failures()

    def strange(bodies: list[bytes], draws: random.Random) -> None:
        for body in bodies:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as one, contextlib.suppress(OSError):
                one.connect(socket_name(engine, 0))
                one.sendall(framed(body))

    rows = GatedRows()
    with worker(engine, 0, rows):
        each_mutant(1, 4, strange)
        before = figures()
        each_mutant(4 * ROUNDS, 20, strange)
        back_to(before, 32 * MIB)
        with scheduler_of(engine) as link:
            link.send(Upload(1, [(0, [[4, 5]])]))
            assert link.receive(WAIT_S) == Done(1, None)
            assert bytes(rows.cache[4].tolist()) == b"k" * ROW_BYTES
    assert thread_failures() == failed
    assert not [record for record in caplog.records if record.exc_info] and len(caplog.records) < 20


def test_a_worker_that_gets_mutants_answers_or_ends_its_link(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing beyond vLLM's blocks and the staging memory is touched, and no thread, file or mapping stays."""
    caplog.set_level(logging.ERROR, "penstock")  # records would hold errors, these their frames
    failed = thread_failures()

    def attack(bodies: list[bytes], draws: random.Random) -> None:
        engine, rows = str(uuid.uuid4()), GatedRows()
        with worker(engine, 0, rows) as side, scheduler_of(engine) as link:
            link.send(Upload(1, [(0, [[4, 5]])]))
            assert link.receive(WAIT_S) == Done(1, None)
            with contextlib.suppress(LinkError, OSError):
                for body in bodies:
                    link._socket.sendall(framed(body))  # noqa: SLF001 (bytes that no method sends)
                link.end_sending()
                while True:
                    assert isinstance(link.receive(WAIT_S), Done | wire.Leaving)
            assert rows.cache.shape == (PLACES, ROW_BYTES)
            side.close()

    each_mutant(1, 2, attack)
    before = figures()
    each_mutant(3 * ROUNDS, 3, attack)
    assert not [record for record in caplog.records if record.exc_info]
    back_to(before, 32 * MIB)
    assert thread_failures() == failed


class HandMadeWorker:
    """A worker that says Hello, takes the memory, and then sends what a test wants."""

    def __init__(self, engine: str, rank: int) -> None:
        self._listener = listen(engine, rank)
        self.rank = rank

    def greet(self) -> None:
        self.socket, _ = self._listener.accept()
        self.link = Link(self.socket)
        self.link.receive(WAIT_S)
        self.link.send(Hello(self.rank, 1, [[ROW_BYTES]], "a layout"))

    def close(self) -> None:
        self._listener.close()
        self.link.close()


def test_a_worker_that_sends_mutants_ends_no_other_ranks_copies(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "penstock")  # records would hold errors, these their frames
    failed = thread_failures()

    def attack(bodies: list[bytes], draws: random.Random) -> None:
        engine, rows = str(uuid.uuid4()), GatedRows()
        odd = HandMadeWorker(engine, 1)
        events: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        ended: list[str | None] = []
        with worker(engine, 0, rows):
            links = started(engine, odd)
            memory = links.share(SLOTS)
            links.start(events.put, lambda error: None)
            os.close(odd.link.receive_with_descriptor(WAIT_S)[1])
            for op_id in (1, 2):
                links.upload(Upload(op_id, [(0, [[4, 5]])]), ended.append)
            with contextlib.suppress(OSError):
                for body in bodies:
                    odd.socket.sendall(framed(body))
            odd.close()
            while len(ended) < 2:
                events.get(timeout=WAIT_S)()
            assert all(rows.begun.acquire(timeout=WAIT_S) for _ in ended), "what rank 0 was asked for was copied"
            assert all(error in (None, "worker rank 1 is gone") or len(error) <= 500 for error in ended if error)
            assert not links.writing
            links.close()
            memory.close()

    each_mutant(1, 2, attack)
    before = figures()
    each_mutant(2 * ROUNDS, 3, attack)
    assert not [record for record in caplog.records if record.exc_info]
    back_to(before, 32 * MIB)
    assert thread_failures() == failed


def started(engine: str, odd: HandMadeWorker) -> WorkerLinks:
    """Links to rank 0, which is real, and to `odd`; both are greeted one after the other."""
    greeting = threading.Thread(target=odd.greet, daemon=True)
    greeting.start()
    links = WorkerLinks(engine, (ROWS,), 2)
    greeting.join(WAIT_S)
    return links
