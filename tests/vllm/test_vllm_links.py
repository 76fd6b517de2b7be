"""The links between scheduler and workers when something is wrong with one: over real sockets, with real workers."""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import threading
import uuid
from collections.abc import Callable, Iterator

import msgspec
import pytest

from penstock.process.rate_limited_log import RateLimitedLog
from penstock.vllm import accepting, shared_staging, worker_links
from penstock.vllm import link as link_module
from penstock.vllm.accepting import CANDIDATES_MAX, accept_scheduler
from penstock.vllm.link import (
    Attach,
    Done,
    Download,
    Finished,
    Greet,
    Hello,
    Link,
    LinkError,
    Notice,
    Upload,
    connect,
    create_memory,
    listen,
    socket_name,
)
from penstock.vllm.shared_staging import BINDINGS_MAX, node_ranges
from penstock.vllm.worker import WorkerSide
from penstock.vllm.worker_links import WorkerLinks, WorkerLostError
from tests.vllm.gated_rows import PLACES, ROW_BYTES, ROWS, WAIT_S, GatedRows

SLOTS, SLOT_BYTES = 4, 4096
PAGE = 4096
HELLO = Hello(0, 1, [[ROW_BYTES]], "a layout")


class Scheduler:
    """WorkerLinks as the control thread drives them; this thread is the control thread."""

    def __init__(self, engine: str, ranks: int) -> None:
        self.links = WorkerLinks(engine, (ROWS,), ranks)
        self.memory = self.links.share(SLOTS)
        self.events: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.lost: list[WorkerLostError] = []
        self.told: list[str | None] = []
        self.links.start(self.events.put, self.lost.append)

    def step(self) -> None:
        """Handle the next event."""
        self.events.get(timeout=WAIT_S)()

    def upload(self, op_id: int, place: int = 0) -> None:
        self.links.upload(Upload(op_id, [(0, [[place, place + 1]])]), self.told.append)


@pytest.fixture
def engine() -> str:
    return str(uuid.uuid4())


@contextlib.contextmanager
def worker(engine: str, rank: int, rows: GatedRows) -> Iterator[WorkerSide]:
    side = WorkerSide(engine, rank, rows)
    try:
        yield side
    finally:
        rows.gate.set()
        side.close()


class RawWorker:
    """A worker whose every message a test writes itself."""

    def __init__(self, engine: str, rank: int, hello: object = None) -> None:
        self._listener = listen(engine, rank)
        self._hello = HELLO if hello is None else hello
        self._rank = rank
        self.ready = threading.Event()
        self.messages: list[object] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self.socket, _ = self._listener.accept()
        self.link = Link(self.socket)
        assert isinstance(self.link.receive(), Greet)
        if self._hello == "silence":
            return
        if isinstance(self._hello, Hello):
            self.link.send(msgspec.structs.replace(self._hello, rank=self._hello.rank or self._rank))
            with contextlib.suppress(LinkError):
                os.close(self.link.receive_with_descriptor()[1])
        else:
            self.raw(self._hello)
        self.ready.set()

    def raw(self, message: object) -> None:
        """Send what is no message of ours, or one with fields of any kind."""
        body = message if isinstance(message, bytes) else msgspec.msgpack.encode(message)
        self.socket.sendall(len(body).to_bytes(4, "little") + body)

    def close(self) -> None:
        self._listener.close()
        self._thread.join(WAIT_S)
        self.link.close()


WRONG = {
    "an answer to nothing": Done(77, None),
    "a second answer": Done(1, None),
    "a message for workers": Notice(0, Finished("r", [], False)),
    "no message": b"\xc1\xc1\xc1",
    "a number that is none": {"type": "Done", "op_id": float("nan"), "error": None},
    "a number out of range": {"type": "Done", "op_id": 1e300, "error": None},
    "a number below zero": {"type": "Done", "op_id": -1, "error": None},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_with_one_link_ends_no_ranks_copies(wrong: str, engine: str) -> None:
    """vLLM would give their pages to others while they are written."""
    rows = GatedRows(is_open=False)
    raw = RawWorker(engine, 1)
    with worker(engine, 0, rows):
        scheduler = Scheduler(engine, 2)
        assert raw.ready.wait(WAIT_S)
        if wrong == "a second answer":
            scheduler.links.upload(Upload(1, [(1, [[8, 9]])]), lambda error: None)
            raw.link.send(Done(1, None))
            scheduler.step()
        scheduler.upload(2)
        assert rows.begun.acquire(timeout=WAIT_S)
        raw.raw(WRONG[wrong])
        while not scheduler.lost:
            scheduler.step()
        assert not scheduler.lost[0].in_order and "rank 1" in str(scheduler.lost[0])
        assert scheduler.links.writing and not scheduler.told, "neither worker has said that it ends"
        rows.gate.set()
        for _ in range(2 if wrong == "a second answer" else 1):  # what rank 0 has to answer
            scheduler.step()
        with pytest.raises(queue.Empty):
            scheduler.events.get(timeout=0.5)
        assert scheduler.links.writing and not scheduler.told, "rank 1 may still write"
        raw.close()
        while not scheduler.told:
            scheduler.step()
        assert scheduler.told == ["worker rank 1 is gone"]
        scheduler.upload(3)
        while len(scheduler.told) < 2:
            scheduler.step()
        assert scheduler.told[1] == "worker rank 1 is gone", "nobody waits for a rank that is gone"
        assert not scheduler.links.writing
        scheduler.links.close()


def test_a_rank_that_is_closed_ends_its_own_copies_only(engine: str) -> None:
    first, second = GatedRows(), GatedRows(is_open=False)
    with worker(engine, 0, first) as closed, worker(engine, 1, second):
        scheduler = Scheduler(engine, 2)
        scheduler.upload(1)
        assert second.begun.acquire(timeout=WAIT_S)
        scheduler.step()
        closed.close()
        while not scheduler.lost:
            scheduler.step()
        assert scheduler.lost[0].in_order and scheduler.links.writing and not scheduler.told
        second.gate.set()
        while not scheduler.told:
            scheduler.step()
        assert scheduler.told == [None], "rank 0 had ended its part before"
        scheduler.links.close()


@contextlib.contextmanager
def greeted(engine: str, memory_bytes: int = SLOTS * SLOT_BYTES, **changes: object) -> Iterator[Link]:
    """A scheduler whose every message a test writes itself."""
    link = connect(engine, 0, WAIT_S)
    assert isinstance(link.receive(WAIT_S), Hello)
    descriptor, _memory = create_memory(memory_bytes)
    attach = msgspec.structs.replace(Attach(SLOTS, SLOT_BYTES, 0, [ROWS]), **changes)
    link.send_with_descriptor(attach, descriptor)
    os.close(descriptor)
    try:
        yield link
    finally:
        link.close()


def test_a_worker_answers_every_copy_before_it_closes_its_link(engine: str) -> None:
    rows = GatedRows(is_open=False)
    with worker(engine, 0, rows) as side, greeted(engine) as link:
        for op_id in range(5):
            link.send(Upload(op_id, [(0, [[2 * op_id, 2 * op_id + 1]])]))
        link.send(Download(5, 1, [[0, 1]], 99))  # of a step that never comes
        assert rows.begun.acquire(timeout=WAIT_S)
        closing = threading.Thread(target=side.close)
        closing.start()
        rows.gate.set()
        answers = []
        with pytest.raises(LinkError, match=r"went away|reset by peer"):
            while True:
                message = link.receive(WAIT_S)
                if isinstance(message, Done):
                    answers.append(message)
        closing.join(WAIT_S)
        assert sorted(answer.op_id for answer in answers) == list(range(6))
        written = sum(answer.error is None for answer in answers)
        assert written >= 1 and all("the worker ends" in answer.error for answer in answers if answer.error)


@pytest.mark.parametrize(
    ("block", "allowed"),
    [
        ((SLOTS, [[0, 1]]), "slot 4; allowed: 0 to 3"),
        ((0, [[0, PLACES]]), "allowed: -1 to 39"),
        ((0, [[0, 1, 2]]), r"allowed: \[2\]"),
        ((0, [[0, 1], [0, 1]]), r"allowed: \[2\]"),
        ((0, [[]]), r"allowed: \[2\]"),
    ],
)
def test_a_copy_beyond_the_cache_or_the_staging_memory_is_refused(
    block: tuple[int, list[list[int]]], allowed: str, engine: str
) -> None:
    rows = GatedRows()
    with worker(engine, 0, rows) as side, greeted(engine) as link:
        side.steps.record(1)
        link.send(Upload(1, [(1, [[4, 5]]), block]))
        link.send(Download(2, block[0], block[1], 1))
        for _ in range(2):
            answer = link.receive(WAIT_S)
            assert isinstance(answer, Done) and answer.error is not None
            with pytest.raises(LinkError, match=allowed):
                raise LinkError(answer.error)
        link.send(Upload(3, [(1, [[4, 5]])]))
        assert link.receive(WAIT_S) == Done(3, None), "the link goes on"
        assert rows.begun.acquire(blocking=False), "the block that is there"
        assert not rows.begun.acquire(blocking=False), "nothing of a copy that is refused"


@pytest.mark.parametrize(
    "wrong",
    [
        Upload(-1, [(0, [[0, 1]])]),
        Upload(1, [(-1, [[0, 1]])]),
        Upload(1, [(0, [[-2, 1]])]),
        Upload(1, [(0, [[0, 1e300]])]),  # type: ignore[list-item]
        Upload(1, [(0, [[0, float("nan")]])]),  # type: ignore[list-item]
        Download(1, 0, [[0, 1]], -5),
        Done(1, None),
        Greet("again"),
    ],
)
def test_a_message_with_impossible_numbers_ends_the_link(wrong: object, engine: str) -> None:
    rows = GatedRows()
    with worker(engine, 0, rows), greeted(engine) as link:
        link.send(wrong)  # type: ignore[arg-type]
        with pytest.raises(LinkError, match=r"went away|reset by peer"):
            link.receive(WAIT_S)
    assert not rows.begun.acquire(blocking=False), "nothing was copied"


@pytest.mark.parametrize(
    ("memory_bytes", "changes"),
    [
        (SLOTS * SLOT_BYTES - 4096, {}),  # reading its end would end the process
        (SLOTS * SLOT_BYTES + 4096, {}),
        (SLOTS * SLOT_BYTES, {"part_offset": SLOT_BYTES - 8}),
        (SLOTS * SLOT_BYTES, {"rows": [ROWS, ROWS]}),
        (SLOTS * SLOT_BYTES, {"rows": [0]}),
        (SLOTS * SLOT_BYTES, {"slots": 0}),
    ],
)
def test_staging_memory_that_is_not_as_it_says_is_refused(
    memory_bytes: int, changes: dict[str, object], engine: str
) -> None:
    with (
        worker(engine, 0, GatedRows()),
        greeted(engine, memory_bytes, **changes) as link,
        pytest.raises(LinkError, match=r"went away|reset by peer"),
    ):
        link.receive(WAIT_S)


def test_strangers_do_not_end_a_start(
    engine: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One connects and is silent, one goes at once, one says something else, one greets another engine."""
    monkeypatch.setattr(accepting, "warnings", RateLimitedLog(accepting.log))  # others had this line a moment ago
    with worker(engine, 0, GatedRows()), contextlib.ExitStack() as strangers:
        for says in (None, b"", b"GET / HTTP/1.1\r\n\r\n", msgspec.msgpack.encode(Greet("other"))):
            one = strangers.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            one.connect(socket_name(engine, 0))
            if says is not None:
                one.sendall(len(says).to_bytes(4, "little") + says if b"Greet" in says else says)
                one.shutdown(socket.SHUT_WR)
        scheduler = Scheduler(engine, 1)
        scheduler.upload(1)
        scheduler.step()
        assert scheduler.told == [None]
        scheduler.links.close()
    assert "a connection to Penstock's worker was closed" in caplog.text


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can connect as another user")
def test_another_users_connections_take_nobodys_place(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that has not greeted gives way to newer ones; those of others are closed at once instead."""
    monkeypatch.setattr(accepting, "GREET_TIMEOUT_S", 10 * WAIT_S)
    with worker(engine, 0, GatedRows()), contextlib.ExitStack() as strangers:
        early = strangers.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        early.connect(socket_name(engine, 0))
        for _ in range(3 * accepting.CANDIDATES_MAX):
            one = strangers.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            os.seteuid(65534)
            try:
                one.connect(socket_name(engine, 0))
            finally:
                os.seteuid(0)
            one.settimeout(WAIT_S)
            with contextlib.suppress(ConnectionError):
                assert one.recv(1) == b"", "it is closed at once"
        Link(early).send(Greet(engine))
        assert isinstance(Link(early).receive(WAIT_S), Hello)


@pytest.mark.parametrize(
    ("hello", "told"),
    [
        ("silence", "the link broke: timed out"),
        (Hello(3, 1, [[ROW_BYTES]], ""), "says that it is rank 3"),
        (Hello(0, 1, [[ROW_BYTES], [ROW_BYTES]], ""), "2 groups of layers; allowed: 1"),
        (Hello(0, 1, [[]], ""), "a group without layers"),
        (Hello(0, 1, [[ROW_BYTES, 0]], ""), "a layer without bytes"),
        (Hello(0, 1, [[1 << 45]], ""), "allowed: at most"),
        ({"type": "Hello", "rank": 0, "pid": 1, "row_bytes": [[float("nan")]], "layout": ""}, "an invalid message"),
        (Done(1, None), "answers with a Done; allowed: Hello"),
    ],
)
def test_a_worker_that_does_not_introduce_itself_is_a_clear_error(
    hello: object, told: str, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_links, "HELLO_TIMEOUT_S", 0.5 if hello == "silence" else WAIT_S)
    raw = RawWorker(engine, 0, hello)
    with pytest.raises(LinkError, match=told) as raised:
        WorkerLinks(engine, (ROWS,), 1)
    assert "worker rank 0" in str(raised.value)
    raw.close()


def test_a_worker_that_reads_nothing_stops_nobody(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its socket fills up; whoever sends gives up after a while, once."""
    monkeypatch.setattr(link_module, "SEND_TIMEOUT_S", 0.3)
    raw = RawWorker(engine, 0)
    scheduler = Scheduler(engine, 1)
    assert raw.ready.wait(WAIT_S)

    def notify() -> None:
        for number in range(2000):
            scheduler.links.notify(Notice(number, Finished("r" * 1000, [], False)))

    notifying = threading.Thread(target=notify, daemon=True)
    notifying.start()
    notifying.join(WAIT_S)
    assert not notifying.is_alive(), "vLLM's scheduler would wait"
    raw.close()
    while not scheduler.lost:
        scheduler.step()
    scheduler.links.close()


@pytest.mark.parametrize("said", [b"", b"\x10", b"\x00\x10\0\0" + bytes(16)], ids=["nothing", "a byte", "half"])
def test_candidates_that_drip_their_greeting_hold_up_no_scheduler(engine: str, said: bytes) -> None:
    """Each byte had a second of its own, and nobody else was looked at meanwhile."""
    stop, found = threading.Event(), queue.SimpleQueue[Link | None]()
    listener = listen(engine, 0)
    accepting = threading.Thread(target=lambda: found.put(accept_scheduler(listener, engine, stop.is_set)), daemon=True)
    accepting.start()
    dripping = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(CANDIDATES_MAX - 8)]
    for sock in dripping:
        sock.connect(socket_name(engine, 0))
        sock.sendall(said)

    def drip() -> None:
        while not stop.wait(0.1):
            for sock in dripping:
                with contextlib.suppress(OSError):
                    sock.sendall(b"\0")

    dripper = threading.Thread(target=drip, daemon=True)
    dripper.start()
    try:
        link = connect(engine, 0, WAIT_S)
        accepted = found.get(timeout=4.0)  # long before a candidate is given up
        assert accepted is not None
        link.send(HELLO)
        assert accepted.receive(WAIT_S) == HELLO
        accepted.close()
        link.close()
    finally:
        stop.set()
        for thread in (dripper, accepting):
            thread.join(WAIT_S)
        for sock in (listener, *dripping):
            sock.close()


def test_a_message_that_drips_has_one_deadline_for_all_of_it() -> None:
    local, remote = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    stop = threading.Event()

    def drip() -> None:
        with contextlib.suppress(OSError):
            while not stop.wait(0.05):
                remote.sendall(b"\x01")

    remote.sendall(b"\x10\x27\0\0")  # 10,000 bytes
    dripper = threading.Thread(target=drip, daemon=True)
    dripper.start()
    link = Link(local)
    with pytest.raises(LinkError):
        link.receive(0.5)
    assert dripper.is_alive(), "it was given up while it still sent"
    stop.set()
    dripper.join(WAIT_S)
    link.close()
    remote.close()


@pytest.mark.parametrize(
    ("parts", "ranges"),
    [
        ([(1, 5000), (1, 5000)], [(1, 0, 4 * PAGE)]),
        ([(-1, 5000), (-1, 5000)], []),
        ([(0, 5000), (1, 2000)], [(0, 0, 2 * PAGE), (0, 2 * PAGE, 4 * PAGE)]),
        (
            [(0, 2000), (0, 2096), (1, 4096)],
            [(0, 0, PAGE), (1, PAGE, 2 * PAGE), (0, 2 * PAGE, 3 * PAGE), (1, 3 * PAGE, 4 * PAGE)],
        ),
        ([(-1, 4096), (1, 4096)], [(1, PAGE, 2 * PAGE), (1, 3 * PAGE, 4 * PAGE)]),
    ],
)
def test_parts_of_staging_lie_on_the_memory_nodes_of_their_devices(
    parts: list[tuple[int, int]], ranges: list[tuple[int, int, int]]
) -> None:
    """In whole pages: a page with bytes of two parts goes with the first."""
    assert node_ranges(4 * PAGE, 2 * PAGE, parts) == ranges


def test_so_many_ranges_that_the_kernel_would_refuse_them_are_left_alone() -> None:
    assert node_ranges(2 * PAGE * BINDINGS_MAX, 2 * PAGE, [(0, PAGE), (1, PAGE)]) == []


def test_staging_is_bound_to_the_node_that_a_worker_names(monkeypatch: pytest.MonkeyPatch) -> None:
    bound: list[tuple[int, int]] = []
    monkeypatch.setattr(shared_staging, "bind_memory", lambda memory, node, strict: bound.append((len(memory), node)))
    engine = uuid.uuid4().hex
    rows = GatedRows()
    monkeypatch.setattr(type(rows.accelerator), "numa_node", 3)
    worker = WorkerSide(engine, 0, rows)
    scheduler = Scheduler(engine, 1)
    assert bound == [(SLOTS * SLOT_BYTES, 3)]
    scheduler.links.close()
    worker.close()
