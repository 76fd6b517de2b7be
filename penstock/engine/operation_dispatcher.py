"""Carries out the core's operations with the executors, and puts their outcomes into the control thread's inbox."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from penstock.core.config import SchedulerConfig
from penstock.core.engine.scheduler import LoadScheduler
from penstock.core.layout import staging_bytes
from penstock.core.operations import (
    BlockHit,
    ChunkOutcome,
    Compute,
    Discard,
    Drop,
    Emit,
    Fetch,
    Forward,
    Lookup,
    Operation,
    Save,
    Upload,
)
from penstock.core.spans import span_blocks, spans_of
from penstock.engine.device_staging import DeviceStaging
from penstock.engine.executors import PoolStages, RunnerStages, Staging
from penstock.engine.peers import Peers
from penstock.engine.runner import Chunk, ModelRunner, SamplingParams, UploadGroup
from penstock.engine.save_spans import SaveSpans
from penstock.engine.shaping import Past
from penstock.io.memory import aligned_buffer
from penstock.io.numa import bind_memory
from penstock.pool.api import Pool
from penstock.process.loss_log import LossLog
from penstock.process.rate_limited_log import RateLimitedLog

if TYPE_CHECKING:
    from penstock.device.accelerator import Accelerator

log = logging.getLogger(__name__)

STUCK_S = 120.0  # a batch, upload or download that takes longer makes the engine unhealthy

# Scheduler counters that mean a loss, with the text that is logged when one has grown.
LOSSES = {
    "saves_dropped": "blocks were not saved: the queue of saves was full, or their pages were needed",
    "hits_of_another_size": "hits of the pool are not used: those blocks have another size than this engine's",
    "distrusted_blocks": "blocks of the pool are dropped and computed again: their KV is not finite",
    "unusable_blocks": "blocks were not cached, saved or handed over: their KV is not finite",
}

Post = Callable[[Callable[[], None]], None]


class OperationDispatcher:
    """Owns staging memory and executors. All methods, except `close` and `stuck`, are for the control thread; outcomes
    go through `post` and run there too. `sampling_of` returns a request's sampling parameters, and its past tokens if
    the parameters need them."""

    def __init__(
        self,
        config: SchedulerConfig,
        scheduler: LoadScheduler,
        runner: ModelRunner,
        pool: Pool | None,
        peers: Peers | None,
        post: Post,
        sampling_of: Callable[[str], tuple[SamplingParams, Past | None]],
        looked_up: Callable[[Lookup, Sequence[BlockHit | None]], None],
        lands_on: Accelerator | None = None,
    ) -> None:
        """`looked_up` hears of the pool's answers, on a thread of lookups. `lands_on`: the runner's device, where
        blocks of pool nodes are to land in its memory. Raises ConfigError where that has none for them."""
        self._config = config
        self._span_blocks = span_blocks(config.fetch_window_blocks, config.block_bytes)
        self._scheduler = scheduler
        self._post = post
        self._sampling_of = sampling_of
        self._looked_up = looked_up
        slot_bytes = staging_bytes(config.block_bytes)
        size_bytes = slot_bytes * config.l2_slots
        memory = peers.allocate(size_bytes) if peers is not None else aligned_buffer(size_bytes)
        if (node := runner.host_node) is not None and (note := bind_memory(memory, node, strict=False)):
            log.warning("staging memory: %s; it lies where the kernel puts it", note)
        twin = DeviceStaging(lands_on, memory, slot_bytes, config.block_bytes) if lands_on is not None else None
        self._twin = twin
        self._staging = Staging(memory, slot_bytes, runner.page_lock, twin)
        runner.page_lock(memory)
        self._runner = runner
        self._runner_stages = RunnerStages(runner)
        self._pool_stages: PoolStages | None = None
        if pool is not None:
            pool.register(memory, twin)
            for buffer in pool.host_buffers():
                runner.page_lock(buffer)
            self._pool_stages = PoolStages(pool, self._staging, config.block_bytes, config.lookup_window, peers)
        self._save_spans = SaveSpans(self._span_blocks, lambda saves: self.stages.write_span(saves))
        self._uploads: dict[int, UploadGroup] = {}
        self._busy_since: dict[int, tuple[str, float]] = {}  # operation -> (kind, begin)
        self._rare = RateLimitedLog(log)
        self._losses = LossLog(log, LOSSES)
        self.load_failures: Counter[str] = Counter()
        self.save_failures: Counter[str] = Counter()
        self.forward_failures: Counter[str] = Counter()

    @property
    def stages(self) -> PoolStages:
        """The executors of pool operations; there must be a pool."""
        assert self._pool_stages is not None, "the scheduler core knows that there is no pool"
        return self._pool_stages

    def end_late(self) -> None:
        """Give up transfers that the pool has not ended by their deadline."""
        if self._pool_stages is not None:
            self._pool_stages.end_late()

    def say_losses(self) -> None:
        """Log the losses of the scheduler since the last call."""
        self._losses.look(self._scheduler.counters)

    def _failed(self, counter: Counter[str], reason: str, blocks: int, what: str) -> None:
        counter[reason] += blocks
        self._rare.warning(f"{what} {reason}", "%s: %s", what, reason)

    def stuck(self) -> str | None:
        """The first part that makes no progress (the device, a thread, or an operation that takes too long), or None;
        any thread."""
        if self._runner.lost is not None:
            return self._runner.lost
        dead = self._runner_stages.dead_thread or (self._pool_stages.dead_thread if self._pool_stages else None)
        if dead is not None:
            return f"the thread {dead} ended"
        now = time.monotonic()
        for what, since in list(self._busy_since.values()):
            if now - since > STUCK_S:
                return f"{what} has been under way for {now - since:.0f} s"
        return None

    def close(self, timeout_s: float) -> bool:
        """Stop the executors; False when one of them is stuck."""
        stopped = self._runner_stages.close(timeout_s)
        if self._pool_stages is not None:
            self._pool_stages.close()
        if self._twin is not None and stopped:  # an upload that is stuck still reads it
            self._twin.close()
        return stopped

    def carry_out(self, operations: Sequence[Operation], emit: Callable[[Emit], None]) -> None:
        """Begin the operations of one decision; `emit` is called with those of its kind. Fetches that follow each other
        on one route of the pool are begun as spans."""
        fetches: list[Fetch] = []
        for operation in operations:
            if isinstance(operation, Fetch):
                fetches.append(operation)
            elif isinstance(operation, Emit):
                emit(operation)
            else:
                self._begin(operation)
        for span in spans_of(fetches, self._span_blocks):
            self.stages.fetch_all(span, lambda ops, errors: self._post(partial(self._fetched, ops, errors)))

    def _begin(self, operation: Operation) -> None:
        if isinstance(operation, Upload):
            self._upload(operation)
        elif isinstance(operation, Compute):
            self._compute(operation)
        elif isinstance(operation, Save):
            self._save(operation)
        elif isinstance(operation, Forward):
            self._forward(operation)
        elif isinstance(operation, Lookup):
            self._lookup(operation)
        elif isinstance(operation, Drop):
            self._staging.release(operation.slot)
        elif isinstance(operation, Discard):
            self.stages.discard(operation)

    # -- loads --------------------------------------------------------------------------------------------------

    def _lookup(self, op: Lookup) -> None:
        def done(hits: list[BlockHit | None] | None) -> None:
            if hits is not None:
                self._looked_up(op, hits)
            self._post(lambda: self._scheduler.lookup_done(op.op_id, hits, time.monotonic()))

        self.stages.lookup(op, done)

    def _fetched(self, ops: Sequence[Fetch], errors: Sequence[str | None]) -> None:
        for error in errors:
            if error is not None:
                self._failed(self.load_failures, error, 1, "a block could not be loaded")
        self._scheduler.fetched_many([op.op_id for op in ops], errors, time.monotonic())

    def _upload(self, op: Upload) -> None:
        size = self._config.block_bytes
        blocks = [(self._staging.source(slot, size), page) for slot, page in op.blocks]
        self._busy_since[op.op_id] = ("an upload", time.monotonic())
        self._uploads[op.op_id] = self._runner_stages.upload(
            blocks, op.followed, lambda error: self._post(partial(self._uploaded, op, error))
        )

    def _uploaded(self, op: Upload, error: BaseException | None) -> None:
        del self._busy_since[op.op_id]
        del self._uploads[op.op_id]
        for slot, _ in op.blocks:
            if slot not in op.retained:
                self._staging.release(slot)
        if error is not None:
            log.error("an upload failed", exc_info=error)
            self._failed(self.load_failures, "device", len(op.blocks), "blocks could not be uploaded")
            self._scheduler.upload_failed(op.op_id, "device", time.monotonic())
        else:
            self._scheduler.uploaded(op.op_id, time.monotonic())

    # -- compute ------------------------------------------------------------------------------------------------

    def _compute(self, op: Compute) -> None:
        batch = []
        for chunk in op.chunks:
            sampling, past = self._sampling_of(chunk.request_id) if chunk.sample else (None, None)
            uploads = tuple(self._uploads[pending] for pending in chunk.pending)
            batch.append(
                Chunk(
                    chunk.request_id,
                    chunk.tokens,
                    chunk.start,
                    chunk.pages,
                    sampling,
                    chunk.sampled_index,
                    uploads,
                    past,
                )
            )
        self._busy_since[op.op_id] = ("a batch", time.monotonic())
        self._runner_stages.compute(batch, lambda result: self._post(partial(self._computed, op, result)))

    def _computed(self, op: Compute, result: list[ChunkOutcome] | BaseException) -> None:
        del self._busy_since[op.op_id]
        if isinstance(result, BaseException):
            log.error("a batch failed", exc_info=result)
            self._scheduler.compute_failed(op.op_id, f"compute failed: {result!r}", time.monotonic())
        else:
            self._scheduler.computed(op.op_id, result, time.monotonic())

    # -- out of L1 ----------------------------------------------------------------------------------------------

    def _save(self, op: Save) -> None:
        def saved(error: str | None) -> None:
            if error is not None:
                self._failed(self.save_failures, error, 1, "a block could not be saved")
            self._scheduler.saved(op.op_id, error)

        def ended(error: str | None) -> None:
            self._post(partial(saved, error))

        def failed(error: str | None) -> None:
            spans.copied(None)
            ended(error)

        spans = self._save_spans
        spans.copying()
        self._download(op.op_id, op.page, op.slot, lambda: spans.copied((op, ended)), failed)

    def _forward(self, op: Forward) -> None:
        def forwarded(error: str | None) -> None:
            if error is not None:
                self._failed(self.forward_failures, error, 1, "a block could not be handed over")
            self._scheduler.forwarded(op.op_id, error, time.monotonic())

        def ended(error: str | None) -> None:
            self._post(partial(forwarded, error))

        if op.page is None:
            self.stages.hand_over(op, ended)
        else:
            self._download(op.op_id, op.page, op.slot, lambda: self.stages.hand_over(op, ended), ended)

    def _download(
        self, op_id: int, page: int, slot: int, then: Callable[[], None], failed: Callable[[str | None], None]
    ) -> None:
        """Copy a page into a slot, report that to the scheduler core, then continue."""

        def left_l1() -> None:
            del self._busy_since[op_id]
            self._scheduler.downloaded(op_id, time.monotonic())

        def stayed() -> None:
            del self._busy_since[op_id]

        def downloaded(error: BaseException | None) -> None:
            if error is not None:
                log.error("a page could not be copied out", exc_info=error)
                self._post(stayed)
                failed("device")
                return
            self._post(left_l1)
            then()

        self._busy_since[op_id] = ("a download", time.monotonic())
        self._runner_stages.download(page, self._staging.slot(slot), downloaded)
