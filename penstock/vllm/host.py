"""The scheduler's side: owns brain, pool and staging; feeds the brain from vLLM's calls, the pool and the workers.

One control thread hands operations on, so that a fetch or an upload waits for no step of vLLM's loop. vLLM's scheduler
calls in from its own thread and gets its answer at once; a lock keeps the two apart, for as long as a decision takes.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from penstock.core.config import ConfigError, SchedulerConfig
from penstock.core.cost import ComputeCost, CostModel, LinkCost
from penstock.core.guest.records import Landed
from penstock.core.guest.scheduler import GuestOperation, GuestScheduler
from penstock.core.operations import BlockHit, Drop, Fetch, Lookup, RequestSpec, Save, Upload
from penstock.engine.executors import PoolStages
from penstock.pool.api import Pool
from penstock.pool.block_size import expect_blocks
from penstock.pool.open import link_bytes_per_s, open_pool
from penstock.transport.connect import connect_pool
from penstock.vllm import link as wire
from penstock.vllm.settings import Settings
from penstock.vllm.shared_staging import SPARE_SLOTS, SharedStaging, Unleased
from penstock.vllm.worker_links import WorkerLinks

if TYPE_CHECKING:
    from penstock.vllm.metrics import PenstockStats, StatsTaker

log = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 5.0
IDLE_WAIT_S = 0.25
EVENTS_PER_DECISION = 64
SWITCH_INTERVAL_S = 1e-3  # how long a thread may hold the interpreter while another, say a finished load, waits for it
UPLOAD_BYTES_PER_S = 4e9  # until it is measured
COMPUTE = ComputeCost(2e-3, 1e-4, 1e-9)  # until it is measured

Ids = list[list[int]]  # vLLM blocks of one pool block, by group; -1: not to be touched


@dataclass(slots=True)
class Activity:
    """Counts since start that the brain does not keep."""

    load_failures: Counter[str] = field(default_factory=Counter)
    save_failures: Counter[str] = field(default_factory=Counter)
    requests_without_pool: Counter[str] = field(default_factory=Counter)
    uploaded_bytes: int = 0
    saved_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Shape:
    """What the scheduler's side has to know of vLLM: tokens of a pool block, vLLM blocks of each group in it, how many
    pool blocks fit into vLLM's cache, and whether every rank holds the same bytes (MLA)."""

    engine_id: str
    ranks: int
    block_tokens: int
    rows: tuple[int, ...]
    l1_blocks: int
    same_on_all_ranks: bool
    loads: bool
    saves: bool


def _open(settings: Settings) -> Pool:
    """One pool node alone is spoken to directly; anything else is one pool of several members."""
    if len(settings.pool) == 1 and not settings.memory and not settings.slab:
        return connect_pool(settings.pool[0])
    return open_pool(settings.open_config())


class Host:
    """See the module. Threading: public methods are for vLLM's scheduler thread."""

    def __init__(self, settings: Settings, shape: Shape) -> None:
        """Connects to the workers and opens the pool. Raises LinkError, ConfigError, PoolError or OSError with one line
        that says what is wrong; nothing stays open then."""
        self.shape = shape
        self.settings = settings
        self.activity = Activity()
        self._lock = threading.Lock()
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._pages: dict[int, Ids] = {}
        self._grants: dict[str, tuple[int, list[int]]] = {}
        self._save_steps: dict[int, int] = {}
        self._last_page = 0
        self._epoch = 0  # counts `forget_all`
        self._stopping = False
        self.fatal: str | None = None
        with contextlib.ExitStack() as undo:
            self._workers = WorkerLinks(shape.engine_id, shape.rows, shape.ranks, shape.same_on_all_ranks)
            undo.callback(self._workers.close)
            self.layout, self.block_bytes = self._workers.layout, self._workers.block_bytes
            config = self._config()
            self._memory = self._workers.share(config.l2_slots + SPARE_SLOTS)
            self._pool = _open(settings)
            undo.callback(self._pool.close, CLOSE_TIMEOUT_S)
            self._pool.register(memoryview(self._memory))
            expect_blocks(self._pool, self.block_bytes)
            undo.pop_all()
        cost = CostModel(LinkCost(UPLOAD_BYTES_PER_S), COMPUTE)
        for name, rate in link_bytes_per_s(settings.open_config()).items():
            cost.links[name] = LinkCost(rate)
        self.brain = GuestScheduler(config, cost)
        self._staging = SharedStaging(memoryview(self._memory), self._workers.slot_bytes, config.l2_slots)
        self._stages = PoolStages(Unleased(self._pool), self._staging, self.block_bytes, config.lookup_window)
        self._thread = threading.Thread(target=self._run, name="penstock-control", daemon=True)
        if sys.getswitchinterval() > SWITCH_INTERVAL_S:
            sys.setswitchinterval(SWITCH_INTERVAL_S)
        self._workers.start(self._inbox.put)
        self._thread.start()

    # -- setting up ---------------------------------------------------------------------------------------------

    def _config(self) -> SchedulerConfig:
        settings, slot_bytes = self.settings, self._workers.slot_bytes
        slots = settings.staging_bytes // slot_bytes - SPARE_SLOTS
        if slots < 4:
            raise ConfigError(
                f"staging is {settings.staging_bytes} bytes; allowed: at least {4 + SPARE_SLOTS} blocks of "
                f"{slot_bytes} bytes"
            )
        return SchedulerConfig(
            block_tokens=self.shape.block_tokens,
            block_bytes=self.block_bytes,
            l1_pages=max(1, self.shape.l1_blocks),
            l2_slots=slots,
            policy=settings.policy,
            recompute=not settings.load_always,
            max_waiting=settings.max_waiting,
            fetch_window_blocks=settings.fetch_window_blocks,
            age_bound_s=settings.age_bound_s,
            age_delays=settings.age_delays,
            default_slo_ttft_s=settings.default_slo_ttft_s,
            lookup_timeout_s=settings.lookup_timeout_s,
            fetch_timeout_s=settings.fetch_timeout_s,
            save_timeout_s=settings.save_timeout_s,
        )

    # -- vLLM's scheduler ---------------------------------------------------------------------------------------

    def submit(self, spec: RequestSpec, held_tokens: int, load: bool) -> None:
        """A request arrived: its lookup begins now."""
        arrival_s = time.monotonic()
        with self._lock:
            self.brain.submit(spec, held_tokens, arrival_s, load and self.shape.loads)
        self._wake()

    def matched(self, request_id: str, held_tokens: int) -> int | None:
        with self._lock:
            found = self.brain.matched(request_id, held_tokens, time.monotonic())
        return found

    def allocated(self, request_id: str, first: int, ids: Sequence[Ids]) -> None:
        """vLLM gave blocks for the pool blocks from `first` on."""
        with self._lock:
            pages = [self._page(one) for one in ids]
            self._grants[request_id] = (first, pages)
            if self.fatal is None:
                self.brain.allocated(request_id, first, pages, time.monotonic())
        if self.fatal is not None:
            self._land(Landed(request_id, first))
        self._wake()

    def acknowledged(self, request_id: str) -> None:
        with self._lock:
            self.brain.acknowledged(request_id)

    def started(self, request_id: str) -> None:
        with self._lock:
            self.brain.started(request_id, time.monotonic())

    def prefilled(self, request_id: str) -> None:
        with self._lock:
            self.brain.prefilled(request_id, time.monotonic())

    def finish(self, request_id: str) -> None:
        with self._lock:
            self.brain.finish(request_id, time.monotonic())
        self._wake()

    def forget_all(self) -> None:
        """See `GuestScheduler.forget_all`. A save whose copy is under way ends unwritten."""
        with self._lock:
            self._epoch += 1
            if self.fatal is None:
                self.brain.forget_all(time.monotonic())
        self._wake()

    def drop_saves(self) -> None:
        """Saves that have not begun are dropped."""
        with self._lock:
            self.brain.press(None)
        self._wake()

    def extend(self, request_id: str, tokens: Sequence[int]) -> None:
        """The request's tokens so far; what the brain has not heard of is new."""
        with self._lock:
            known = len(tokens) if self.fatal else self.brain.known_tokens(request_id)
            if known < len(tokens):
                self.brain.extend(request_id, list(tokens[known:]))

    def offer(self, request_id: str, index: int, ids: Ids, step: int) -> tuple[int, bool]:
        """vLLM keeps the blocks `ids` of a full pool block that step `step` completes; returns their page, and whether
        there is room for a further one."""
        with self._lock:
            page = self._page(ids)
            self._save_steps[page] = step
            if self.fatal is None:
                self.brain.offer(request_id, index, page)
            return page, self.brain.can_keep

    def wants(self, request_id: str, index: int) -> bool:
        with self._lock:
            return self.brain.wants(request_id, index)

    @property
    def can_keep(self) -> bool:
        with self._lock:
            return self.brain.can_keep

    def not_saved(self, blocks: int) -> None:
        with self._lock:
            self.brain.not_saved(blocks)

    def released(self) -> list[int]:
        """Pages that `offer` returned and that vLLM may have back."""
        with self._lock:
            pages = self.brain.released() if self.fatal is None else list(self._save_steps)
            for page in pages:
                self._pages.pop(page, None)
                self._save_steps.pop(page, None)
        return pages

    def press(self, pages: int) -> None:
        """vLLM is short of blocks: give back so much of what is kept for saves that have not begun."""
        with self._lock:
            self.brain.press(pages)

    def stepped(self, spans: Sequence[tuple[int, int]], seconds: float) -> None:
        with self._lock:
            self.brain.stepped(spans, seconds)

    def take_stats(self, taker: StatsTaker) -> PenstockStats | None:
        """Counts of the interval since the last call."""
        activity = self.activity
        if self.fatal is not None:
            return None
        with self._lock:
            counters: dict[str, float] = dict(self.brain.counters)
            counters["uploaded_bytes"] = activity.uploaded_bytes
            counters["saved_bytes"] = activity.saved_bytes
            labelled: dict[str, dict[str, float]] = {
                "load_failures": dict(activity.load_failures),
                "save_failures": dict(activity.save_failures),
                "requests_without_pool": dict(activity.requests_without_pool),
            }
            links = {name: link.bytes_per_s for name, link in self.brain.cost.links.items()}
            links["upload"] = self.brain.cost.upload.bytes_per_s
            return taker.take(counters, labelled, self.brain.gauges(), self.brain.take_accounts(), links)

    def ask(self, question: Callable[[GuestScheduler], Any]) -> Any:
        """What the brain says to a question."""
        with self._lock:
            return question(self.brain)

    def wake(self) -> None:
        """Have the brain decide again."""
        self._wake()

    def _wake(self) -> None:
        if self.fatal is None:
            self._inbox.put(_nothing)

    def _page(self, ids: Ids) -> int:
        self._last_page += 1
        self._pages[self._last_page] = ids
        return self._last_page

    def close(self) -> None:
        """Stop; what is under way is given up."""
        self._stopping = True
        self._wake()
        self._thread.join(CLOSE_TIMEOUT_S)
        self._stages.close()
        self._pool.close(CLOSE_TIMEOUT_S)
        self._workers.close()

    # -- control thread -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._step()
        except Exception as error:
            log.exception("Penstock's control thread failed; requests go on without it")
            self._give_up(f"internal error: {error!r}")

    def _give_up(self, reason: str) -> None:
        """From now on vLLM computes everything: it gets back what it keeps for saves, and loads under way have failed,
        as soon as no worker writes to their pages any more."""
        with self._lock:
            self.fatal = reason
            self.brain = GuestScheduler(replace(self.brain.config, pool=False), self.brain.cost)
        while self._workers.writing and not self._stopping:
            with contextlib.suppress(Exception):  # what the copies were for is gone
                self._inbox.get(timeout=IDLE_WAIT_S)()
        with self._lock:
            loading = [(request_id, first) for request_id, (first, _) in self._grants.items()]
        for request_id, first in loading:
            self._land(Landed(request_id, first))

    def _step(self) -> None:
        wakeup = self.brain.next_wakeup_s()
        wait_s = IDLE_WAIT_S if wakeup is None else min(max(wakeup - time.monotonic(), 0.0), IDLE_WAIT_S)
        events: list[Callable[[], None]] = []
        with contextlib.suppress(queue.Empty):
            events.append(self._inbox.get(timeout=wait_s))
            while len(events) < EVENTS_PER_DECISION:
                events.append(self._inbox.get_nowait())
        with self._lock:
            for event in events:
                event()
            self._stages.end_late()
            operations = self.brain.decide(time.monotonic())
            work = [self._prepare(operation) for operation in operations]
        for do in work:
            do()

    def _prepare(self, operation: GuestOperation) -> Callable[[], None]:
        """What to do for an operation, once the lock is released."""
        if isinstance(operation, Fetch):
            return partial(self._fetch, operation)
        if isinstance(operation, Upload):
            blocks = [(slot, self._pages[page]) for slot, page in operation.blocks]
            return partial(self._upload, operation, blocks)
        if isinstance(operation, Lookup):
            return partial(self._lookup, operation)
        if isinstance(operation, Save):
            page = operation.page
            return partial(self._save, operation, self._pages[page], self._save_steps[page], self._epoch)
        if isinstance(operation, Landed):
            return partial(self._land, operation)
        assert isinstance(operation, Drop), operation
        return _nothing  # slots of a guest hold no lease

    def _lookup(self, op: Lookup) -> None:
        def done(hits: list[BlockHit | None] | None) -> None:
            self._inbox.put(lambda: self.brain.lookup_done(op.op_id, hits, time.monotonic()))

        self._stages.lookup(op, done)

    def _fetch(self, op: Fetch) -> None:
        def ended(error: str | None) -> None:
            if error is not None:
                self.activity.load_failures[error] += 1
            self.brain.fetched(op.op_id, error, time.monotonic())

        if self._staging.place(op.slot) is None:
            self._inbox.put(partial(ended, "device"))
            return
        self._stages.fetch(op, lambda error: self._inbox.put(partial(ended, error)))

    def _upload(self, op: Upload, blocks: list[tuple[int, Ids]]) -> None:
        def ended(error: str | None) -> None:
            if error is not None:
                self.activity.load_failures["device"] += len(op.blocks)
                self.brain.upload_failed(op.op_id, "device", time.monotonic())
            else:
                self.activity.uploaded_bytes += len(op.blocks) * self.block_bytes
                self.brain.uploaded(op.op_id, time.monotonic())

        places = [(self._staging.place(slot), ids) for slot, ids in blocks]
        found = [(place, ids) for place, ids in places if place is not None]
        assert len(found) == len(places), "a block was fetched into a slot that is out of use"
        self._workers.upload(wire.Upload(op.op_id, found), ended)

    def _save(self, op: Save, ids: Ids, step: int, epoch: int) -> None:
        def ended(error: str | None) -> None:
            if error is not None:
                self._saved(op, "device")
                return
            if epoch != self._epoch:
                self._saved(op, "reset")
                return
            self.brain.downloaded(op.op_id)
            self._stages.write(op, lambda reason: self._inbox.put(partial(self._saved, op, reason)))

        place = self._staging.place(op.slot)
        if place is None:
            self._inbox.put(partial(self._saved, op, "device"))
            return
        self._workers.download(wire.Download(op.op_id, place, ids, step), ended)

    def _saved(self, op: Save, error: str | None) -> None:
        if error is None:
            self.activity.saved_bytes += self.block_bytes
        else:
            self.activity.save_failures[error] += 1
        self.brain.saved(op.op_id, error)

    def _land(self, notice: Landed) -> None:
        """Tell the workers, and so vLLM, that a load is over."""
        with self._lock:
            first, pages = self._grants.pop(notice.request_id, (0, []))
            ids = [self._pages.pop(page) for page in pages]
        if not ids:
            return  # told already
        invalid: list[int] = []
        failed = notice.hole is not None
        if notice.hole is not None and len(self.shape.rows) == 1:
            invalid = [place for one in ids[notice.hole - first :] for place in one[0] if place >= 0]
            failed = not invalid  # vLLM then asks again
        self._workers.tell(wire.Finished(notice.request_id, invalid, failed))


def _nothing() -> None:
    return None
