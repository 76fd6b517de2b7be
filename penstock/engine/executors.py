"""The executors of the stages: they carry out operations of the brain on threads of their own and report the end.

A load never waits for a step of the compute loop: uploads, saves and compute have a thread each, fetches are
asynchronous in the pool, lookups have a few threads because a remote pool answers after a round trip.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from penstock.core.operations import BlockHit, Fetch, Forward, Lookup, Save
from penstock.engine.peers import RELAY_LINK, Peers
from penstock.engine.runner import Chunk, ModelRunner, UploadGroup
from penstock.engine.transfers import Transfers
from penstock.io.memory import aligned_buffer
from penstock.pool.api import Lease, Pool, PoolError

log = logging.getLogger(__name__)


class Worker:
    """One thread that does one piece of work after the other."""

    def __init__(self, name: str) -> None:
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, work: Callable[[], None]) -> None:
        self._queue.put(work)

    def _run(self) -> None:
        while (work := self._queue.get()) is not None:
            try:
                work()
            except Exception:  # work reports its own errors; what is left must not end the thread
                log.exception("work on %s raised", self._thread.name)

    def stop(self) -> None:
        """End after what is queued."""
        self._queue.put(None)

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()


class Staging:
    """L2: the slots' memory. A slot may stand for a leased block of a local memory member instead of its own bytes."""

    def __init__(self, memory: memoryview, slot_bytes: int) -> None:
        self._memory = memory
        self._slot_bytes = slot_bytes
        self._leases: dict[int, Lease] = {}
        self._replaced: dict[int, memoryview] = {}

    def slot(self, slot: int) -> memoryview:
        """The slot's own memory, padded to the alignment."""
        replaced = self._replaced.get(slot)
        return (
            replaced if replaced is not None else self._memory[slot * self._slot_bytes : (slot + 1) * self._slot_bytes]
        )

    def content(self, slot: int, size_bytes: int) -> memoryview:
        """The block that was fetched into the slot."""
        lease = self._leases.get(slot)
        return (lease.view if lease is not None else self.slot(slot))[:size_bytes]

    def hold(self, slot: int, lease: Lease) -> None:
        self._leases[slot] = lease

    def replace(self, slot: int) -> None:
        """Other memory for a slot whose own a device still holds."""
        self._replaced[slot] = aligned_buffer(self._slot_bytes)

    def release(self, slot: int) -> None:
        lease = self._leases.pop(slot, None)
        if lease is not None:
            lease.release()


def _reason(error: PoolError | None) -> str | None:
    return None if error is None else error.reason


class PoolStages:
    """Lookup and fetch, and the second half of a save or a hand-off: everything that talks to the pool or to decode
    engines."""

    def __init__(
        self, pool: Pool, staging: Staging, block_bytes: int, lookup_threads: int, peers: Peers | None = None
    ) -> None:
        self._pool = pool
        self._peers = peers
        self._staging = staging
        self._block_bytes = block_bytes
        self._transfers = Transfers(staging.replace)
        self._lookups = ThreadPoolExecutor(lookup_threads, thread_name_prefix="penstock-lookup")
        self._hand_offs = Worker("penstock-hand-off") if peers is not None else None

    def lookup(self, op: Lookup, done: Callable[[list[BlockHit | None] | None], None]) -> None:
        def ask() -> None:
            try:
                found = self._pool.lookup(op.keys, op.timeout_s)
            except PoolError:
                done(None)
                return
            except Exception:  # whatever it is, the request goes on without hits
                log.exception("a lookup raised")
                done(None)
                return
            done([None if hit is None else BlockHit(hit.size_bytes, hit.route) for hit in found])

        self._lookups.submit(ask)

    def fetch(self, op: Fetch, done: Callable[[str | None], None]) -> None:
        """A block of a local memory member is leased in place; any other is read into the slot, from the pool or
        through the decode engine that the route names."""
        if self._peers is not None and op.route[-1].startswith(RELAY_LINK):
            into = self._staging.slot(op.slot)
            ended = self._transfers.begin(op.op_id, op.slot, op.timeout_s, done)
            address = op.route[-1].removeprefix(RELAY_LINK)
            self._peers.read(address, op.key, self._block_bytes, into, op.timeout_s, lambda e: ended(_reason(e)))
            return
        lease = self._pool.lease(op.key)
        if lease is not None:
            if len(lease.view) == self._block_bytes:
                self._staging.hold(op.slot, lease)
                done(None)
                return
            lease.release()
        into = self._staging.slot(op.slot)
        ended = self._transfers.begin(op.op_id, op.slot, op.timeout_s, done)
        self._pool.read(op.key, self._block_bytes, into, op.timeout_s, lambda error: ended(_reason(error)))

    def write(self, op: Save, done: Callable[[str | None], None]) -> None:
        data = self._staging.slot(op.slot)
        ended = self._transfers.begin(op.op_id, op.slot, op.timeout_s, done)
        self._pool.write(op.block, data, op.timeout_s, lambda error: ended(_reason(error)))

    def hand_over(self, op: Forward, done: Callable[[str | None], None]) -> None:
        """The slot may be a load's that is being uploaded, and several engines may get the block at once."""
        assert self._peers is not None and self._hand_offs is not None, "nobody to hand over to"
        peers, data = self._peers, self._staging.content(op.slot, self._block_bytes)

        def send() -> None:
            peers.hand_over(op.to, op.block, data, op.timeout_s, lambda error: done(_reason(error)))

        self._hand_offs.put(send)  # checksums take time

    def end_late(self) -> None:
        """Give up transfers that the pool did not end by their deadline."""
        self._transfers.end_late()

    def close(self) -> None:
        self._lookups.shutdown(wait=False, cancel_futures=True)
        if self._hand_offs is not None:
            self._hand_offs.stop()


class FailedUpload:
    """Stands for a group that could not be prepared: a batch that waits for it fails."""

    def __init__(self, cause: BaseException) -> None:
        self._cause = cause

    def wait_layer(self, layer: int) -> None:
        raise RuntimeError(f"layer {layer} does not come: the upload failed to start: {self._cause}")


class RunnerStages:
    """Upload, compute and the first half of a save: everything that talks to the model runner."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self._uploader = Worker("penstock-upload")
        self._saver = Worker("penstock-save")
        self._computer = Worker("penstock-compute")

    def upload(
        self, blocks: Sequence[tuple[memoryview, int]], done: Callable[[BaseException | None], None]
    ) -> UploadGroup:
        """`done` is called from another thread, also when the upload cannot even start."""
        try:
            group = self._runner.start_upload(blocks)
        except Exception as error:  # the blocks become misses
            failed = FailedUpload(error)
            self._uploader.put(partial(done, error))
            return failed
        self._uploader.put(lambda: self._guarded(lambda: self._runner.upload(group), done))
        return group

    def download(self, page: int, into: memoryview, done: Callable[[BaseException | None], None]) -> None:
        self._saver.put(lambda: self._guarded(lambda: self._runner.download(page, into), done))

    @staticmethod
    def _guarded(work: Callable[[], None], done: Callable[[BaseException | None], None]) -> None:
        try:
            work()
        except Exception as error:  # whatever the device raises ends the operation, not the thread
            done(error)
        else:
            done(None)

    def compute(self, batch: Sequence[Chunk], done: Callable[[list[int | None] | BaseException], None]) -> None:
        def run() -> None:
            try:
                sampled = self._runner.run(batch)
            except Exception as error:  # the batch's requests end with the error, the engine goes on
                done(error)
            else:
                done(sampled)

        self._computer.put(run)

    def close(self, timeout_s: float) -> bool:
        """Stop the threads; False when one of them is stuck."""
        workers = (self._uploader, self._saver, self._computer)
        end = time.monotonic() + timeout_s
        for worker in workers:
            worker.stop()
        for worker in workers:
            worker.join(max(0.0, end - time.monotonic()))
        return not any(worker.alive for worker in workers)
