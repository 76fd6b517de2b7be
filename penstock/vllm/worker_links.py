"""The scheduler side's links to the workers of its engine: it connects, shares memory and requests copies."""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from penstock.core.layout import staging_bytes
from penstock.process.guarded_thread import GuardedThread
from penstock.vllm import link as wire
from penstock.vllm.shared_staging import bind_parts
from penstock.vllm.wire_checks import check_hello

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 30.0
HELLO_TIMEOUT_S = 30.0
JOIN_S = 5.0
LATE_S = 30.0  # a copy unanswered for this long is logged

Event = Callable[[], None]
Ended = Callable[[str | None], None]


class WorkerLostError(RuntimeError):
    """A worker ended its link or sent an invalid message: no more copies can be requested. `in_order`: vLLM closes
    it."""

    def __init__(self, reason: str, in_order: bool = False) -> None:
        super().__init__(reason)
        self.in_order = in_order


@dataclass(slots=True)
class _Rank:
    """A worker. `asked` are the copies that it has to answer, shared by control thread and receiver."""

    number: int
    link: wire.Link
    lock: threading.Lock = field(default_factory=threading.Lock)
    asked: set[int] = field(default_factory=set)
    gone: bool = False  # its link has ended, and with it all its copies; used by the control thread

    def ask(self, op_id: int) -> None:
        with self.lock:
            self.asked.add(op_id)

    def answered(self, op_id: int) -> None:
        """Raises LinkError for an answer to a copy that was not requested, or a second answer."""
        with self.lock:
            if op_id not in self.asked:
                raise wire.LinkError(f"rank {self.number} answers operation {op_id}, which it does not do")
            self.asked.remove(op_id)


@dataclass(slots=True)
class _Copy:
    """A message that every worker it was sent to has to answer: explicitly, or by the end of its link."""

    left: set[int]
    ended: Ended
    writes: bool
    begun_s: float
    error: str | None = None
    late: bool = False


class WorkerLinks:
    """One link to each worker. `post` queues an event for the control thread, which alone calls `upload`, `download`
    and `notify`; a copy's end is such an event. A copy ends for a rank when that rank says so or when its link ends;
    the worker closes its link after its last copy, and the kernel closes it when the process dies. Other ranks'
    copies continue."""

    def __init__(self, engine_id: str, rows: tuple[int, ...], ranks: int, readers: Sequence[int] | None = None) -> None:
        """Connects to the workers. `rows` is the number of vLLM blocks of each group in a pool block. Each worker has a
        part of a block, one behind the other; with `readers` the part of each is the whole block, of which these ranks
        together have all bytes. Raises LinkError."""
        self._ranks: list[_Rank] = []
        self._rows = rows
        self._copies: dict[int, _Copy] = {}
        self._threads: list[GuardedThread] = []
        self._closing = False
        self.descriptor = -1  # of the memory that they map
        self._readers = range(ranks) if readers is None else readers
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            hellos = [self._connect(engine_id, rank) for rank in range(ranks)]
            undo.pop_all()
        self.layout = [hello.layout for hello in hellos]
        self.defers_frees = all(hello.defers_frees for hello in hellos)
        parts = [
            sum(sum(sizes) * count for sizes, count in zip(hello.row_bytes, rows, strict=True)) for hello in hellos
        ]
        self._offsets = [sum(parts[:rank]) if readers is None else 0 for rank in range(ranks)]
        self.block_bytes = sum(parts) if readers is None else parts[0]
        if readers is not None and len(set(parts)) > 1:
            raise wire.LinkError(f"workers' blocks have {sorted(set(parts))} bytes; each must be the whole block")
        nodes = [hello.memory_node for hello in hellos]
        same = nodes[0] if len(set(nodes)) == 1 else -1
        self._parts_by_node = list(zip(nodes, parts, strict=True)) if readers is None else [(same, parts[0])]
        self.slot_bytes = staging_bytes(self.block_bytes)

    def _connect(self, engine_id: str, rank: int) -> wire.Hello:
        link = wire.connect(engine_id, rank, CONNECT_TIMEOUT_S)
        self._ranks.append(_Rank(rank, link))
        try:
            return check_hello(link.receive(HELLO_TIMEOUT_S), rank, self._rows)
        except wire.LinkError as error:
            raise wire.LinkError(f"worker rank {rank} of engine {engine_id} is unusable: {error}") from None

    def share(self, slots: int) -> mmap.mmap:
        """Create memory of this many slots, which every worker maps; each one's parts are near its device. To be called
        once."""
        self.descriptor, memory = wire.create_memory(slots * self.slot_bytes)
        bind_parts(memoryview(memory), self.slot_bytes, self._parts_by_node)
        for rank, offset in zip(self._ranks, self._offsets, strict=True):
            attach = wire.Attach(slots, self.slot_bytes, offset, list(self._rows))
            rank.link.send_with_descriptor(attach, self.descriptor)
        return memory

    def start(self, post: Callable[[Event], None], lost: Callable[[WorkerLostError], None]) -> None:
        """Receive answers from now on, on one thread per worker. `lost(error)` is posted when a worker accepts no more
        requests; its copies may still be running."""
        self._post, self._lost = post, lost
        self._threads = [
            GuardedThread(f"penstock-link-{rank.number}", partial(self._receive, rank), kind="penstock-link")
            for rank in self._ranks
        ]
        for thread in self._threads:
            thread.start()

    @property
    def writing(self) -> bool:
        """Whether a worker may still write to pages."""
        return any(copy.writes for copy in self._copies.values())

    def upload(self, message: wire.Upload, ended: Ended) -> None:
        """Every worker copies its parts up; `ended` gets the error, or None."""
        self._copy(message.op_id, message, self._ranks, ended, writes=True)

    def download(self, message: wire.Download, ended: Ended) -> None:
        """Every worker that holds unique bytes copies its part down."""
        self._copy(message.op_id, message, [self._ranks[rank] for rank in self._readers], ended, writes=False)

    def notify(self, message: wire.Notice) -> None:
        """Send to all workers, without an answer. A worker that cannot be reached will be reported lost."""
        for rank in self._ranks:
            with contextlib.suppress(wire.LinkError):
                rank.link.send(message)

    def late(self) -> list[tuple[int, list[int]]]:
        """Copies that became late since the last call: their number, and the ranks that have not answered."""
        now_s = time.monotonic()
        found = []
        for op_id, copy in self._copies.items():
            if not copy.late and now_s - copy.begun_s > LATE_S:
                copy.late = True
                found.append((op_id, sorted(copy.left)))
        return found

    def close(self) -> None:
        """Close the links; the workers then end their side."""
        self._closing = True
        for rank in self._ranks:
            rank.link.close()
        for thread in self._threads:
            thread.join(JOIN_S)
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _copy(self, op_id: int, message: wire.Message, ranks: list[_Rank], ended: Ended, writes: bool) -> None:
        copy = _Copy({rank.number for rank in ranks}, ended, writes, time.monotonic())
        self._copies[op_id] = copy
        for rank in ranks:
            rank.ask(op_id)
            # A rank that does not get the whole message ends its link after its other copies; that ends this copy.
            with contextlib.suppress(wire.LinkError):
                rank.link.send(message)
            if rank.gone:
                self._post(partial(self._copied, rank.number, op_id, f"worker rank {rank.number} is gone"))

    def _copied(self, rank: int, op_id: int, error: str | None) -> None:
        copy = self._copies.get(op_id)
        if copy is not None and self._answered(copy, rank, error):
            del self._copies[op_id]
            copy.ended(copy.error)

    @staticmethod
    def _answered(copy: _Copy, rank: int, error: str | None) -> bool:
        """Whether no further answer is expected."""
        copy.left.discard(rank)
        copy.error = copy.error or error
        return not copy.left

    def _receive(self, rank: _Rank) -> None:
        leaving = False
        try:
            while True:
                message = rank.link.receive()
                if isinstance(message, wire.Leaving):
                    leaving = True
                    continue
                if not isinstance(message, wire.Done):
                    raise wire.LinkError(f"rank {rank.number} sent a {type(message).__name__}; allowed: Done")
                rank.answered(message.op_id)
                self._post(partial(self._copied, rank.number, message.op_id, message.error))
        except Exception as error:
            if not self._closing:
                reason = f"the link to worker rank {rank.number} ended: {error}"
                self._post(partial(self._lost, WorkerLostError(reason, leaving)))
            if not isinstance(error, wire.LinkError):
                raise
        finally:
            rank.link.end_sending()  # the worker ends its copies, then the link
            rank.link.drain()
            self._post(partial(self._ended, rank))

    def _ended(self, rank: _Rank) -> None:
        """Nothing of this rank's copies is under way any more."""
        rank.gone = True
        error = f"worker rank {rank.number} is gone"
        mine = [(op_id, copy) for op_id, copy in self._copies.items() if rank.number in copy.left]
        ended = [(op_id, copy) for op_id, copy in mine if self._answered(copy, rank.number, error)]
        for op_id, _ in ended:
            del self._copies[op_id]
        with contextlib.ExitStack() as all_of_them:  # closes all, even if one raises
            for _, copy in ended:
                all_of_them.callback(copy.ended, copy.error)
