"""The worker's side: copies between staging memory and vLLM's pages, on threads of its own, as the other side asks.

A message arrives over the link as soon as a block is staged, so an upload waits for no step of vLLM's loop; only the
notice that a request's load is over goes through vLLM, with the end of the step under way.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import mmap
import os
import socket
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from penstock.io.memory import address_of
from penstock.process.guarded_thread import GuardedThread, GuardedWorker
from penstock.process.rate_limited_log import RateLimitedLog
from penstock.vllm.accepting import accept_scheduler
from penstock.vllm.copy_gate import CopyGate
from penstock.vllm.layout import KVRows
from penstock.vllm.link import (
    Attach,
    Done,
    Download,
    Finished,
    Hello,
    Leaving,
    Link,
    LinkError,
    Notice,
    Upload,
    cut_error,
    listen,
    map_memory,
)
from penstock.vllm.steps import StepError, Steps
from penstock.vllm.wire_checks import check_attach, check_block

log = logging.getLogger(__name__)
warnings = RateLimitedLog(log)

STEP_TIMEOUT_S = 60.0  # how long a save waits for the step that computes its block
ATTACH_TIMEOUT_S = 120.0  # for the staging memory, which comes once every worker has answered
JOIN_S = 2.0
NOTICES_MAX = 1 << 16  # remembered; vLLM has taken note of older ones
COPIES_MAX = 1024  # of one direction that wait; the scheduler's windows are smaller


@dataclass(slots=True)
class Staged:
    """The mapped staging memory and this worker's part of every slot."""

    memory: mmap.mmap
    address: int
    attach: Attach

    def part(self, slot: int) -> int:
        """The address of this worker's bytes of a slot."""
        return self.address + slot * self.attach.slot_bytes + self.attach.part_offset


class WorkerSide:
    """One worker of vLLM: listens for the scheduler's side, then does as it says until it goes away.

    The link is closed when no copy is queued or under way any more and not before: its end is this worker's word that
    it reads and writes nothing, for all copies that were not answered."""

    def __init__(self, engine_id: str, rank: int, rows: KVRows, defers_frees: bool = True) -> None:
        """`defers_frees`: see `link.Hello`."""
        self._engine_id = engine_id
        self._rows = rows
        self._rank = rank
        self._defers_frees = defers_frees
        self._lock = threading.Lock()
        self._finished: list[Finished] = []  # as many as loads are under way
        self._heard: OrderedDict[int, None] = OrderedDict()  # notices lately
        self._staged: Staged | None = None
        self._link: Link | None = None
        self._copies = 0  # queued or under way
        self._ending = False
        self._locked_address = 0
        self._closed = False
        self.steps = Steps(rows.accelerator)
        self.gate = CopyGate()
        # Where copies run beside everything, one thread enqueues the next message while the other waits for one.
        threads = 2 if rows.accelerator.copies_beside_compute else 1
        self._copiers = {
            name: tuple(GuardedWorker(name, COPIES_MAX) for _ in range(threads))
            for name in ("penstock-upload", "penstock-save")
        }
        self._next_copier = {name: itertools.cycle(workers) for name, workers in self._copiers.items()}
        self._listener = listen(engine_id, rank)
        self._thread = GuardedThread("penstock-worker", self._run)
        self._thread.start()

    def take_finished(self) -> list[Finished]:
        """Loads that are over, since the last call."""
        with self._lock:
            finished, self._finished = self._finished, []
        return finished

    def hear(self, notices: Sequence[Notice]) -> None:
        """Loads that are over; a notice that was heard already is left out."""
        with self._lock:
            for notice in notices:
                if notice.number not in self._heard:
                    self._heard[notice.number] = None
                    self._finished.append(notice.finished)
            while len(self._heard) > NOTICES_MAX:
                self._heard.popitem(last=False)

    def close(self) -> None:
        """End all threads. Copies under way end first; those that are queued are answered, and come to nothing."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        with self._lock:
            link = self._link
        if link is not None:
            with contextlib.suppress(LinkError):
                link.send(Leaving())
            link.end_receiving()
        self._thread.join(JOIN_S)
        self._listener.close()
        self._end_copies()
        workers = [worker for some in self._copiers.values() for worker in some]
        for worker in workers:
            worker.join(JOIN_S)
        if any(worker.alive for worker in workers):
            log.error("a copy of Penstock's did not end within %g s; its memory stays locked", JOIN_S)
        else:
            self._unlock()

    def _run(self) -> None:
        try:
            link = accept_scheduler(self._listener, self._engine_id, lambda: self._closed)
            if link is None:
                return
            with self._lock:
                self._link = link
            if self._closed:
                return
            link.send(self._hello())
            attach, descriptor = link.receive_with_descriptor(ATTACH_TIMEOUT_S)
            self._staged = self._map(attach, descriptor)
            while True:
                self._handle(link, link.receive())
        except LinkError as error:
            if not self._closed:
                log.warning("Penstock's link to the scheduler ended (%s): vLLM goes on without it", error)
        finally:
            self._end_copies()

    def _hello(self) -> Hello:
        rows = self._rows
        node = rows.accelerator.numa_node
        return Hello(
            self._rank, os.getpid(), rows.row_bytes, rows.describe(), self._defers_frees, -1 if node is None else node
        )

    def _end_copies(self) -> None:
        """Take no more copies; the link closes once none is left."""
        with self._lock:
            self._ending = True
        self.steps.stop()
        for workers in self._copiers.values():
            for worker in workers:
                worker.stop()
        self._close_if_ended()

    def _close_if_ended(self) -> None:
        with self._lock:
            link = self._link if self._ending and not self._copies else None
        if link is not None:
            link.close()

    def _map(self, message: object, descriptor: int) -> Staged:
        try:
            attach, _ = check_attach(message, descriptor, self._rows.row_bytes)
            size_bytes = attach.slots * attach.slot_bytes
            memory = map_memory(descriptor, size_bytes)
        finally:
            os.close(descriptor)
        address = address_of(memoryview(memory))
        self._rows.accelerator.lock(address, size_bytes)
        self._locked_address = address
        return Staged(memory, address, attach)

    def _unlock(self) -> None:
        if self._locked_address:
            self._rows.accelerator.unlock(self._locked_address)
            self._locked_address = 0

    def _handle(self, link: Link, message: object) -> None:
        if isinstance(message, Upload):
            self._begin(link, "penstock-upload", message.op_id, partial(self._upload, message))
        elif isinstance(message, Download):
            self._begin(link, "penstock-save", message.op_id, partial(self._download, message))
        elif isinstance(message, Notice):
            self.hear([message])
        else:
            raise LinkError(f"a {type(message).__name__} that a worker does not expect")

    def _begin(self, link: Link, threads: str, op_id: int, work: Callable[[], None]) -> None:
        with self._lock:
            self._copies += 1
        if not next(self._next_copier[threads]).put(partial(self._copy, link, op_id, work)):
            self._answer(link, op_id, f"more than {COPIES_MAX} copies are queued, or the worker ends")

    def _copy(self, link: Link, op_id: int, work: Callable[[], None]) -> None:
        error: str | None = None
        try:
            if self._ending:
                raise StepError("the worker ends")
            work()
        except Exception as raised:  # whatever the device raises ends the operation, not the thread
            error = f"{type(raised).__name__}: {raised}"
            if not self._ending:
                warnings.warning("copy", "a copy of Penstock's failed: %s", error)
                log.debug("a copy failed", exc_info=raised)
        self._answer(link, op_id, error)

    def _answer(self, link: Link, op_id: int, error: str | None) -> None:
        """The copy reads and writes nothing any more."""
        with contextlib.suppress(LinkError):  # the link's end says the same
            link.send(Done(op_id, None if error is None else cut_error(error)))
        with self._lock:
            self._copies -= 1
        self._close_if_ended()

    def _upload(self, message: Upload) -> None:
        assert self._staged is not None
        for slot, ids in message.blocks:
            check_block(slot, ids, self._staged.attach, self._rows.vllm_blocks)
        if message.after >= 0:
            self.steps.wait_begun(message.after, STEP_TIMEOUT_S)
        if message.blocks:
            with self.gate.copying():
                self._rows.upload([(self._staged.part(slot), ids) for slot, ids in message.blocks])

    def _download(self, message: Download) -> None:
        assert self._staged is not None
        check_block(message.slot, message.ids, self._staged.attach, self._rows.vllm_blocks)
        self.steps.wait(message.step, STEP_TIMEOUT_S)
        with self.gate.copying():
            self._rows.download([(self._staged.part(message.slot), message.ids)])
