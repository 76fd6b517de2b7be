"""The executors of the stages: they carry out operations of the core on threads of their own and report the end.

A load never waits for a step of the compute loop: uploads, saves and compute have a thread each, fetches are
asynchronous in the pool, lookups have a few threads because a remote pool answers after a round trip.
"""

from __future__ import annotations

import itertools
import logging
import time
import traceback
from collections.abc import Callable, Sequence

from penstock.core.operations import ChunkOutcome, Discard, Fetch, Forward, Lookup, Save
from penstock.engine.batch_faults import outcomes_of
from penstock.engine.device_staging import DeviceStaging
from penstock.engine.lookups import Answer, Lookups
from penstock.engine.peers import RELAY_LINK, Peers
from penstock.engine.runner import Chunk, ModelRunner, UploadGroup
from penstock.engine.save_spans import Saved
from penstock.engine.transfers import Transfers
from penstock.engine.upload_source import UploadSource
from penstock.io.memory import aligned_buffer
from penstock.pool.api import Lease, Pool, PoolError
from penstock.process.guarded_thread import GuardedWorker
from penstock.process.rate_limited_log import RateLimitedLog

log = logging.getLogger(__name__)
rare = RateLimitedLog(log)

HAND_OFFS_WAITING_MAX = 4096  # blocks; the windows of the decode engines keep far fewer under way
WORK_WAITING_MAX = 4096  # pieces of work per thread; the scheduler's windows and L2 keep far fewer under way


class Staging:
    """L2: the slots' memory. A slot may stand for a leased block of a local memory member instead of its own bytes, or
    for a block that landed in the device's memory."""

    def __init__(
        self,
        memory: memoryview,
        slot_bytes: int,
        lock: Callable[[memoryview], None] = lambda memory: None,
        twin: DeviceStaging | None = None,
    ) -> None:
        """`lock` page-locks memory for the device; `memory` is locked already. `twin`: where its blocks may land."""
        self._memory = memory
        self._slot_bytes = slot_bytes
        self._lock = lock
        self._twin = twin
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

    def source(self, slot: int, size_bytes: int) -> UploadSource:
        """The block that was fetched into the slot, wherever it is uploaded from."""
        landed = self._twin.block_in(slot) if self._twin is not None else None
        return landed or self.content(slot, size_bytes)

    def hold(self, slot: int, lease: Lease) -> None:
        """The slot stands for a leased block until `release`."""
        if self._twin is not None:
            self._twin.clear(slot)
        self._leases[slot] = lease

    def replace(self, slot: int) -> None:
        """Other memory for a slot whose own a device still holds; nothing lands for it on the device any more."""
        if self._twin is not None:
            self._twin.retire(slot)
        memory = aligned_buffer(self._slot_bytes)
        try:
            self._lock(memory)
        except RuntimeError as error:  # copies from and to it are slower then, and right
            log.warning("memory in place of a slot's is not page-locked: %s", error)
        self._replaced[slot] = memory

    def release(self, slot: int) -> None:
        """The slot's content is not needed any more; a lease ends."""
        if self._twin is not None:
            self._twin.clear(slot)
        lease = self._leases.pop(slot, None)
        if lease is not None:
            lease.release()


def _reason(error: PoolError | None) -> str | None:
    return None if error is None else error.reason


def _reason_of(error: Exception) -> str:
    """Log an exception of a call whose contract is to report errors, not to raise them."""
    told = "".join(traceback.format_exception(error))
    rare.warning(type(error).__name__, "a transfer could not begin: %s", told)
    return error.reason if isinstance(error, PoolError) else "device"


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
        self._lookups = Lookups(pool, lookup_threads)
        self._hand_offs = GuardedWorker("penstock-hand-off", HAND_OFFS_WAITING_MAX) if peers is not None else None

    def lookup(self, op: Lookup, done: Answer) -> None:
        """Ask the pool; `done` gets the answer."""
        self._lookups.ask(op, done)

    def discard(self, op: Discard) -> None:
        """Have the pool forget blocks."""
        self._lookups.discard(op)

    def fetch(self, op: Fetch, done: Callable[[str | None], None]) -> None:
        """A block of a local memory member is leased in place; any other is read into the slot, from the pool or
        through the decode engine that the route names."""
        ended = self._transfers.begin(op.op_id, op.slot, op.timeout_s, done)
        try:
            self._begin_fetch(op, ended)
        except Exception as error:  # noqa: BLE001 (the block's failure, not the control thread's)
            ended(_reason_of(error))

    def _begin_fetch(self, op: Fetch, ended: Callable[[str | None], None]) -> None:
        into = self._staging.slot(op.slot)
        if self._peers is not None and op.route[-1].startswith(RELAY_LINK):
            address = op.route[-1].removeprefix(RELAY_LINK)
            self._peers.read(address, op.key, self._block_bytes, into, op.timeout_s, lambda e: ended(_reason(e)))
            return
        if self._lease(op):
            ended(None)
            return
        self._staging.release(op.slot)
        self._pool.read(op.key, self._block_bytes, into, op.timeout_s, lambda error: ended(_reason(error)))

    def fetch_span(self, ops: Sequence[Fetch], done: Callable[[Sequence[str | None]], None]) -> None:
        """Blocks on one route of the pool: all leased in place, or all read together."""
        first = ops[0]
        ended = self._transfers.begin_span(first.op_id, [op.slot for op in ops], first.timeout_s, done)
        try:
            if all(map(self._lease, ops)):
                ended((None,) * len(ops))
                return
            self._release(ops)
            intos = [self._staging.slot(op.slot) for op in ops]
            keys = [op.key for op in ops]
            self._pool.read_many(
                keys, self._block_bytes, intos, first.timeout_s, lambda errors: ended(list(map(_reason, errors)))
            )
        except Exception as error:  # noqa: BLE001 (the blocks' failure, not the control thread's)
            self._release(ops)
            ended((_reason_of(error),) * len(ops))

    def fetch_all(self, span: Sequence[Fetch], done: Callable[[Sequence[Fetch], Sequence[str | None]], None]) -> None:
        """Blocks on one route: from the pool as a span, of which `done` hears once; through a decode engine singly."""
        if len(span) > 1 and not span[0].route[-1].startswith(RELAY_LINK):
            self.fetch_span(span, lambda errors: done(span, errors))
            return
        for op in span:
            self.fetch(op, lambda error, op=op: done((op,), (error,)))  # type: ignore[misc]

    def _release(self, ops: Sequence[Fetch]) -> None:
        for op in ops:
            self._staging.release(op.slot)

    def _lease(self, op: Fetch) -> bool:
        """Let the slot stand for the block in place, if it can be leased."""
        lease = self._pool.lease(op.key)
        if lease is None:
            return False
        if len(lease.view) != self._block_bytes:
            lease.release()
            return False
        self._staging.hold(op.slot, lease)
        return True

    def write(self, op: Save, done: Callable[[str | None], None]) -> None:
        """Store the block in the operation's slot; `done` gets None, or why it was not stored."""
        data = self._staging.slot(op.slot)
        ended = self._transfers.begin(op.op_id, op.slot, op.timeout_s, done)
        try:
            self._pool.write(op.block, data, op.timeout_s, lambda error: ended(_reason(error)))
        except Exception as error:  # noqa: BLE001 (the block's failure, not the control thread's)
            ended(_reason_of(error))

    def write_span(self, saves: Sequence[Saved]) -> None:
        """As `write` of each, written together."""
        if len(saves) == 1:
            self.write(*saves[0])
            return
        first, size = saves[0][0], self._block_bytes

        def done(reasons: Sequence[str | None]) -> None:
            for (_, end), reason in zip(saves, reasons, strict=True):
                end(reason)

        ended = self._transfers.begin_span(first.op_id, [op.slot for op, _ in saves], first.timeout_s, done)
        try:
            blocks = [op.block for op, _ in saves]
            datas = [self._staging.slot(op.slot) for op, _ in saves]
            assert all(block.size_bytes == size for block in blocks), "an engine's blocks have one size"
            self._pool.write_many(blocks, datas, first.timeout_s, lambda errors: ended(list(map(_reason, errors))))
        except Exception as error:  # noqa: BLE001 (the blocks' failure, not this thread's)
            ended((_reason_of(error),) * len(saves))

    def hand_over(self, op: Forward, done: Callable[[str | None], None]) -> None:
        """The slot may be a load's that is being uploaded, and several engines may get the block at once."""
        assert self._peers is not None and self._hand_offs is not None, "nobody to hand over to"
        peers, data = self._peers, self._staging.content(op.slot, self._block_bytes)

        def send() -> None:
            peers.hand_over(op.to, op.block, data, op.timeout_s, lambda error: done(_reason(error)))

        def failed(error: Exception) -> None:
            done(error.reason if isinstance(error, PoolError) else "device")

        if not self._hand_offs.put(send, failed):  # checksums take time
            done("dropped")

    def end_late(self) -> None:
        """Give up lookups and transfers that the pool did not end by their deadline."""
        self._lookups.end_late()
        self._transfers.end_late()

    @property
    def dead_thread(self) -> str | None:
        """The name of a thread that ended although nobody closed it."""
        worker = self._hand_offs
        return worker.name if worker is not None and not worker.alive else None

    def close(self) -> None:
        """Stop the threads that ask and hand over."""
        self._lookups.close()
        if self._hand_offs is not None:
            self._hand_offs.stop()


class FailedUpload:
    """Stands for a group that could not be prepared: a batch that waits for it fails."""

    def __init__(self, cause: BaseException) -> None:
        self._cause = cause

    def wait_layer(self, layer: int) -> None:
        """Raises RuntimeError with the cause."""
        raise RuntimeError(f"layer {layer} does not come: the upload failed to start: {self._cause}")


class RunnerStages:
    """Upload, compute and the first half of a save: everything that talks to the model runner. Each `done` is called
    once, from any thread; with an error when its thread is closed, or was asked for too much."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self._uploader = GuardedWorker("penstock-upload", WORK_WAITING_MAX)
        self._upload_ends = GuardedWorker("penstock-upload-end", WORK_WAITING_MAX)
        # Where copies run beside everything, one thread enqueues the next block while the other waits for one.
        savers = 2 if runner.uploads_are_enqueued else 1
        self._savers = tuple(GuardedWorker("penstock-save", WORK_WAITING_MAX) for _ in range(savers))
        self._next_saver = itertools.cycle(self._savers)  # the control thread's
        self._computer = GuardedWorker("penstock-compute", WORK_WAITING_MAX)

    def upload(
        self,
        blocks: Sequence[tuple[UploadSource, int]],
        followed: bool,
        done: Callable[[BaseException | None], None],
    ) -> UploadGroup:
        """Blocks whose upload cannot start count as misses; whoever waits for them fails at once. `followed`: a batch
        may follow layer by layer."""
        runner = self._runner
        try:
            group = runner.start_upload(blocks, followed)
        except Exception as error:  # noqa: BLE001 (the upload's failure, not the control thread's)
            done(error)
            return FailedUpload(error)
        if runner.uploads_are_enqueued:
            refused = self._put(self._uploader, lambda: self._begin_upload(group, done), done, says_end=False)
        else:
            refused = self._put(self._uploader, lambda: runner.upload(group), done)
        return group if refused is None else FailedUpload(refused)

    def _begin_upload(self, group: UploadGroup, done: Callable[[BaseException | None], None]) -> None:
        """The thread that waits for the end is another one, so that the next group is enqueued meanwhile."""
        self._runner.begin_upload(group)

        def end() -> None:
            try:
                self._runner.end_upload(group)
            except Exception as error:  # noqa: BLE001 (as in `_put`)
                done(error)
            else:
                done(None)

        if not self._upload_ends.put(end, lambda error: end()):
            end()  # whoever waits, its bytes are under way: they end before anybody hears of them

    def download(self, page: int, into: memoryview, done: Callable[[BaseException | None], None]) -> None:
        """Copy a page from the device into host memory, on a saver's thread."""
        self._put(next(self._next_saver), lambda: self._runner.download(page, into), done)

    @staticmethod
    def _put(
        worker: GuardedWorker,
        work: Callable[[], None],
        done: Callable[[BaseException | None], None],
        says_end: bool = True,
    ) -> Exception | None:
        """Queue work; the error that `done` got at once when there is no room. Without `says_end`, work that does not
        raise sees to `done` itself."""

        def run() -> None:
            try:
                work()
            except Exception as error:  # noqa: BLE001 (whatever the device raises ends the operation, not the thread)
                done(error)
            else:
                if says_end:
                    done(None)

        if worker.put(run, done):
            return None
        error = RuntimeError(f"{worker.name} is closed, or has {worker.waiting} pieces of work waiting")
        done(error)
        return error

    def compute(self, batch: Sequence[Chunk], done: Callable[[list[ChunkOutcome] | BaseException], None]) -> None:
        """`done` gets one outcome per chunk; an error only when nobody could run the batch at all."""

        def run() -> None:
            done(outcomes_of(self._runner.run, batch))

        if not self._computer.put(run, done):
            done(RuntimeError(f"{self._computer.name} is closed"))

    @property
    def dead_thread(self) -> str | None:
        """The name of a thread that ended although nobody closed it."""
        return next((worker.name for worker in self._workers if not worker.alive), None)

    @property
    def _workers(self) -> tuple[GuardedWorker, ...]:
        return self._uploader, self._upload_ends, *self._savers, self._computer

    def close(self, timeout_s: float) -> bool:
        """Stop the threads; False when one of them is stuck."""
        end = time.monotonic() + timeout_s
        for worker in self._workers:
            if worker is not self._upload_ends:  # which ends what the uploader began
                worker.stop()
        for worker in self._workers:
            worker.close(max(0.0, end - time.monotonic()))
        return not any(worker.alive for worker in self._workers)
