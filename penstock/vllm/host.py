"""The scheduler's side: owns scheduler core, pool and staging memory, and passes the core all events of vLLM, the pool
and the workers.

One control thread executes operations, so that a fetch or an upload does not wait for a step of vLLM's loop. vLLM's
scheduler calls from its own thread and gets its answer at once; a lock separates the two for the length of a decision.
"""

from __future__ import annotations

import contextlib
import logging
import math
import queue
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from penstock.cluster.agent_wire import Replan
from penstock.cluster.handoff.link_meter import LinkMeter, MeteredPool
from penstock.core.bandwidth import LinkCost
from penstock.core.connector.records import HandedOver, Landed
from penstock.core.connector.scheduler import ConnectorOperation, ConnectorScheduler
from penstock.core.cost import ComputeCost, CostModel
from penstock.core.operations import BlockHit, Drop, Fetch, Forward, Lookup, RequestSpec, Save, Upload
from penstock.core.spans import span_blocks, spans_of
from penstock.engine.executors import PoolStages
from penstock.engine.save_spans import Saved, SaveSpans
from penstock.pool.announced import AnnouncedPool
from penstock.pool.authenticated import NO_POOL_KEY, authenticated
from penstock.pool.block_size import expect_blocks
from penstock.pool.kv_events import KvEventLog
from penstock.pool.net import ways
from penstock.pool.setup.open import link_bytes_per_s
from penstock.process.guarded_thread import GuardedThread, GuardedWorker
from penstock.process.loss_log import LossLog
from penstock.process.rate_limited_log import RateLimitedLog
from penstock.vllm import link as wire
from penstock.vllm.hand_offs import HandOffs
from penstock.vllm.losses import LOSSES, PREFIX
from penstock.vllm.notices import Notices
from penstock.vllm.settings import Settings
from penstock.vllm.shape import Shape, check_frees, open_pool_of, scheduler_config
from penstock.vllm.shared_staging import SPARE_SLOTS, LeaselessPool, SharedStaging
from penstock.vllm.worker_links import LATE_S, WorkerLinks, WorkerLostError

if TYPE_CHECKING:
    from penstock.vllm.metrics import PenstockStats, StatsTaker

log = logging.getLogger(__name__)
warnings = RateLimitedLog(log)
T = TypeVar("T")

CLOSE_TIMEOUT_S = 5.0
IDLE_WAIT_S = 0.25
LOCK_TIMEOUT_S = 5.0  # how long vLLM's scheduler waits for the lock, once; then Penstock gives up
EVENTS_PER_DECISION = 64
# how long a thread may hold the interpreter lock while another waits, for example to end a load
SWITCH_INTERVAL_S = 1e-3
UPLOAD_BYTES_PER_S = 4e9  # initial value until one is measured
COMPUTE = ComputeCost(2e-3, 1e-4, 1e-9)  # initial value until one is measured

Ids = list[list[int]]  # vLLM blocks of one pool block, by group; -1: must not be written


@dataclass(slots=True)
class Activity:
    """Counts since start that the scheduler core does not have."""

    load_failures: Counter[str] = field(default_factory=Counter)
    save_failures: Counter[str] = field(default_factory=Counter)
    requests_without_pool: Counter[str] = field(default_factory=Counter)
    uploaded_bytes: int = 0
    saved_bytes: int = 0
    counts: Counter[str] = field(
        default_factory=Counter
    )  # losses before the scheduler core hears of them: see `losses`


class Host:
    """See the module. Threading: public methods are for vLLM's scheduler thread."""

    def __init__(self, settings: Settings, shape: Shape, events: KvEventLog | None = None) -> None:
        """Connects to the workers and opens the pool, whose contents `events` gets. On LinkError, ConfigError,
        PoolError or OSError (with a one-line message) nothing stays open."""
        self.shape = shape
        self.settings = settings
        self.events = events
        self.activity = Activity()
        self._lock = threading.Lock()
        # bounded by the operations that are under way
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._events: deque[Callable[[], None]] = deque()  # taken from the inbox; used by the control thread only
        self._waking = False
        self._broken: str | None = None
        self._next_look_s = 0.0
        self._pages: dict[int, Ids] = {}
        self._grants: dict[str, tuple[int, list[int]]] = {}
        self._load_steps: dict[int, int] = {}  # page of a load -> the step after which it may start
        self._save_steps: dict[int, int] = {}
        self._notices = Notices()
        self._news = threading.Event()
        self._losses = LossLog(log, LOSSES, PREFIX)
        self._last_page = 0
        self.pool_key = settings.read_pool_key()
        self._storage = LinkMeter(0.0)
        self._epoch = 0  # number of `forget_all` calls
        self._stopping = False
        self.fatal: str | None = None
        with contextlib.ExitStack() as undo:
            self._workers = WorkerLinks(shape.engine_id, shape.rows, shape.ranks, shape.readers)
            undo.callback(self._workers.close)
            self.layout, self.block_bytes = self._workers.layout, self._workers.block_bytes
            check_frees(shape, self._workers.defers_frees)
            config = scheduler_config(settings, shape, self.block_bytes, self._workers.slot_bytes)
            self._memory = self._workers.share(config.l2_slots + SPARE_SLOTS)
            if self.pool_key is None and (settings.pool or settings.slab or settings.pool_config):
                log.warning("%s", NO_POOL_KEY)
            pool = open_pool_of(settings)
            if settings.agent is not None:
                pool = MeteredPool(pool, self._storage)
            self._pool = authenticated(pool if events is None else AnnouncedPool(pool, events), self.pool_key)
            undo.callback(self._pool.close, CLOSE_TIMEOUT_S)
            self._pool.register(memoryview(self._memory))
            expect_blocks(self._pool, self.block_bytes)
            self.hand_offs = self._open_hand_offs()
            undo.pop_all()
        cost = CostModel(LinkCost(UPLOAD_BYTES_PER_S), COMPUTE)
        profiled = link_bytes_per_s(settings.open_config())
        self.storage_bytes_per_s = max(
            (rate for name, rate in profiled.items() if name.startswith("net@")), default=0.0
        )
        for name, rate in profiled.items():
            cost.links[name] = LinkCost(rate)
        self.scheduler = ConnectorScheduler(config, cost)
        self._staging = SharedStaging(memoryview(self._memory), self._workers.slot_bytes, config.l2_slots)
        peers = self.hand_offs.peers if self.hand_offs is not None else None
        pool = LeaselessPool(self._pool)
        self._stages = PoolStages(pool, self._staging, self.block_bytes, config.lookup_window, peers)
        self._span_blocks = span_blocks(config.fetch_window_blocks, self.block_bytes)
        self._save_spans = self._spans_of_saves(self._epoch)
        self._writer = GuardedWorker("penstock-write", config.save_window_blocks)
        self._thread = GuardedThread("penstock-control", self._run, failed=self._failed)
        if sys.getswitchinterval() > SWITCH_INTERVAL_S:
            sys.setswitchinterval(SWITCH_INTERVAL_S)
        self._workers.start(self._inbox.put, self._worker_lost)
        self._thread.start()

    # -- vLLM's scheduler ---------------------------------------------------------------------------------------

    def _call(self, question: Callable[[], T], default: T) -> T:
        """The core's answer, on vLLM's scheduler thread: it never waits long, and never fails because of Penstock."""
        if self._broken is not None:
            return default
        if not self._lock.acquire(timeout=LOCK_TIMEOUT_S):
            self._break(f"the control thread held the lock longer than {LOCK_TIMEOUT_S:g} s")
            return default
        try:
            return default if self.fatal is not None else question()
        except Exception as error:
            log.exception("Penstock failed on vLLM's scheduler thread")
            self._break(f"internal error: {error!r}")
            return default
        finally:
            self._lock.release()

    def _break(self, reason: str) -> None:
        """Make the control thread end Penstock in this engine."""
        self._broken = self._broken or reason
        self._inbox.put(_nothing)

    def submit(self, spec: RequestSpec, held_tokens: int, load: bool, send_s_max: float = math.inf) -> None:
        """A request arrived: start its lookup. Its hand-off, if any, ends after at most `send_s_max` seconds. Raises
        ValueError if its id is in use."""
        arrival_s = time.monotonic()

        def submit() -> ValueError | None:
            try:
                self.scheduler.submit(spec, held_tokens, arrival_s, load and self.shape.loads, send_s_max)
            except ValueError as error:
                return error
            return None

        refused = self._call(submit, None)
        if refused is not None:
            raise refused
        self.wake()

    def matched(self, request_id: str, held_tokens: int) -> int | None:
        """Tokens that will be loaded beyond the `held_tokens` of vLLM; None while unknown."""
        computed: int | None = 0
        return self._call(lambda: self.scheduler.matched(request_id, held_tokens, time.monotonic()), computed)

    def allocated(self, request_id: str, first: int, ids: Sequence[Ids], after_step: int = -1) -> None:
        """vLLM allocated blocks for the pool blocks from `first` on. They are not written before step `after_step` has
        begun, because that step may zero them."""

        pages = [self._page(one) for one in ids]
        self._load_steps.update(dict.fromkeys(pages, after_step))
        self._grants[request_id] = (first, pages)

        def allocated() -> bool:
            self.scheduler.allocated(request_id, first, pages, time.monotonic())
            return True

        if not self._call(allocated, False) and self.fatal is not None:
            self._land(Landed(request_id, first))  # before `fatal` is set, `_give_up` does this
        self.wake()

    def refuse(self, request_id: str) -> None:
        """vLLM allocated blocks for a load that does not begin: report it as failed, so that vLLM computes the
        request."""
        notice = self._notices.new(wire.Finished(request_id, [], True))
        self._inbox.put(lambda: self._workers.notify(notice))

    def acknowledged(self, request_id: str) -> None:
        """vLLM knows that the request's load has ended."""
        self._notices.acknowledged(request_id)
        self._call(lambda: self.scheduler.acknowledged(request_id), None)

    def notices(self) -> list[wire.Notice]:
        """Notices for the workers to be sent with the next step, because their links may have lost them."""
        return [] if self.fatal is None else self._notices.open()

    def started(self, request_id: str) -> None:
        """vLLM schedules the request for the first time."""
        self._call(lambda: self.scheduler.started(request_id, time.monotonic()), None)

    def prefilled(self, request_id: str) -> None:
        """The request has its first token."""
        self._call(lambda: self.scheduler.prefilled(request_id, time.monotonic()), None)

    def finish(self, request_id: str, cancelled: bool = True) -> None:
        """The request ended, or is no longer followed. Unless it was `cancelled`, what is on its way to its decode
        engine still goes there."""
        self._call(lambda: self.scheduler.finish(request_id, time.monotonic(), cancelled), None)
        self.wake()

    def forget_all(self) -> None:
        """See `ConnectorScheduler.forget_all`. A save that is being copied, or waits for others to be written with it,
        ends without being written."""
        self._save_spans = self._spans_of_saves(self._epoch + 1)
        self._epoch += 1
        self._call(lambda: self.scheduler.forget_all(time.monotonic()), None)
        self.wake()

    def extend(self, request_id: str, tokens: Sequence[int]) -> None:
        """The request's tokens so far; those unknown to the scheduler core are new."""

        def extend() -> None:
            known = self.scheduler.known_tokens(request_id)
            if known < len(tokens):
                self.scheduler.extend(request_id, list(tokens[known:]))

        self._call(extend, None)

    def offer(self, request_id: str, index: int, ids: Ids, step: int) -> tuple[int, bool]:
        """vLLM pins the blocks `ids` of a full pool block that step `step` completes. Returns their page, and whether
        there is room for another. The save starts at once."""
        page = self._page(ids)
        self._save_steps[page] = step

        def offer() -> bool:
            self.scheduler.offer(request_id, index, page)
            return self.scheduler.can_pin

        room = self._call(offer, False)
        self.wake()
        return page, room

    def wants(self, request_id: str, index: int) -> bool:
        """Whether to save the request's full block `index`: the pool may lack it, and no save of it is under way."""
        return self._call(lambda: self.scheduler.wants(request_id, index), False)

    def sends(self, request_id: str, index: int) -> bool:
        """Whether the request's full block `index` is to be sent to its decode engine, saved or not."""
        return self._call(lambda: self.scheduler.sends(request_id, index), False)

    def unsendable(self, request_id: str, index: int) -> None:
        """vLLM does not have the whole block that `sends` asked for."""
        self._call(lambda: self.scheduler.unsendable(request_id, index), None)

    @property
    def can_keep(self) -> bool:
        """Whether vLLM may pin another block for a save."""
        return self._call(lambda: self.scheduler.can_pin, False)

    def not_saved(self, blocks: int) -> None:
        """Count full blocks that are not saved, for lack of room."""
        self._call(lambda: self.scheduler.not_saved(blocks), None)

    def lost(self, name: str, count: int = 1) -> None:
        """Count a hit or save that is lost before the scheduler core knows of it; `name` is one of `losses.LOSSES`."""
        self.activity.counts[name] += count

    def released(self) -> list[int]:
        """Pages that `offer` returned and that vLLM may reuse now."""
        everything = self.fatal is not None  # after a failure, the results of reads from these pages are discarded
        none: list[int] = []
        pages = list(self._save_steps) if everything else self._call(lambda: self.scheduler.released(), none)
        for page in pages:
            self._pages.pop(page, None)
            self._save_steps.pop(page, None)
        return pages

    def press(self, pages: int | None) -> None:
        """vLLM lacks blocks: release this many (None: all) pinned for saves that have not started."""
        self._call(lambda: self.scheduler.press(pages), None)

    def wait_for_news(self, timeout_s: float) -> None:
        """Wait until something happened to a load, unless vLLM is still to hear of one that ended: for a scheduler that
        has nothing else to do."""
        if self.fatal is None and not self._notices.open():
            self._news.wait(timeout_s)
        self._news.clear()

    def stepped(self, spans: Sequence[tuple[int, int]], seconds: float) -> None:
        """A step took this many seconds for these (query tokens, context tokens): refine the compute cost."""
        self._call(lambda: self.scheduler.stepped(spans, seconds), None)

    def take_stats(self, taker: StatsTaker) -> PenstockStats | None:
        """Statistics of the interval since the last call."""
        activity = self.activity
        if self.fatal is not None:
            return taker.take({**activity.counts, "given_up": 1}, {}, {}, [], {})

        def counted() -> PenstockStats | None:
            counters: dict[str, float] = {**self.scheduler.counters, **activity.counts}
            counters["uploaded_bytes"] = activity.uploaded_bytes
            counters["saved_bytes"] = activity.saved_bytes
            labelled: dict[str, dict[str, float]] = {
                "load_failures": dict(activity.load_failures),
                "save_failures": dict(activity.save_failures),
                "requests_without_pool": dict(activity.requests_without_pool),
                "pool_read_bytes": {way: count for way, count in ways.read_bytes().items() if count},
                "pool_written_bytes": {way: count for way, count in ways.written_bytes().items() if count},
            }
            links = {name: link.bytes_per_s for name, link in self.scheduler.cost.links.items()}
            links["upload"] = self.scheduler.cost.upload.bytes_per_s
            return taker.take(counters, labelled, self.scheduler.gauges(), self.scheduler.take_accounts(), links)

        return self._call(counted, None)

    def _open_hand_offs(self) -> HandOffs | None:
        if self.settings.agent is None:
            return None
        return HandOffs(
            self.settings,
            self.shape.saves,
            self._storage,
            self.ask,
            lambda: self.fatal,
            self._reroute,
            self._cancel_hand_off,
            lambda: bool(getattr(self._pool, "up", True)),
            memoryview(self._memory),
            self._workers.descriptor,
        )

    def _reroute(self, request_id: str, order: Replan) -> None:
        self.ask(lambda scheduler: scheduler.reroute(request_id, order.side, time.monotonic()))
        self.wake()

    def _cancel_hand_off(self, request_id: str) -> None:
        self.ask(lambda scheduler: scheduler.cancel_hand_off(request_id))
        self.wake()

    def query(self, question: Callable[[ConnectorScheduler], T], default: T) -> T:
        """The scheduler core's answer to a question; `default` after Penstock failed."""
        return self._call(lambda: question(self.scheduler), default)

    def ask(self, question: Callable[[ConnectorScheduler], Any]) -> Any:
        """As `query`, but waits for the lock and raises the question's exceptions: for tests and views."""
        with self._lock:
            return question(self.scheduler)

    @property
    def queued_events(self) -> int:
        """Number of events that the control thread has not taken."""
        return self._inbox.qsize()

    def wake(self) -> None:
        """Make the scheduler core decide again."""
        if self.fatal is None and not self._waking:
            self._waking = True
            self._inbox.put(self._woken)

    def _woken(self) -> None:
        self._waking = False

    def _page(self, ids: Ids) -> int:
        self._last_page += 1
        self._pages[self._last_page] = ids
        return self._last_page

    def close(self) -> None:
        """Stop; operations under way are abandoned."""
        self._stopping = True
        self._inbox.put(_nothing)
        self._thread.join(CLOSE_TIMEOUT_S)
        self._writer.close(CLOSE_TIMEOUT_S)
        self._stages.close()
        if self.hand_offs is not None:
            self.hand_offs.close()
        self._pool.close(CLOSE_TIMEOUT_S)
        self._workers.close()

    # -- control thread -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._step()
        except WorkerLostError as error:
            self._give_up(str(error), logging.INFO if error.in_order else logging.ERROR)

    def _failed(self, error: Exception) -> None:
        self._give_up(f"internal error: {error!r}")

    def _worker_lost(self, error: WorkerLostError) -> None:
        raise error

    def _give_up(self, reason: str, level: int = logging.ERROR) -> None:
        """From now on vLLM computes everything. It gets back the blocks pinned for saves, and loads under way fail as
        soon as no worker writes to their pages."""
        if self._stopping:
            return
        log.log(
            level,
            "Penstock has stopped in this engine; vLLM goes on without it, loading and saving nothing: %s",
            reason,
        )
        with self._lock:
            self.fatal = reason
            self.scheduler = ConnectorScheduler(replace(self.scheduler.config, pool=False), self.scheduler.cost)
        while self._workers.writing and not self._stopping:
            self._say_late()
            with contextlib.suppress(Exception):  # the copies' purpose is gone
                (self._events.popleft() if self._events else self._inbox.get(timeout=IDLE_WAIT_S))()
        for request_id, (first, _) in list(self._grants.items()):
            self._land(Landed(request_id, first))
        if self.hand_offs is not None:
            self.hand_offs.end_all("closed")

    def _step(self) -> None:
        wakeup = self.scheduler.next_wakeup_s()
        wait_s = IDLE_WAIT_S if wakeup is None else min(max(wakeup - time.monotonic(), 0.0), IDLE_WAIT_S)
        with contextlib.suppress(queue.Empty):
            self._events.append(self._inbox.get(timeout=wait_s))
            while len(self._events) < EVENTS_PER_DECISION:
                self._events.append(self._inbox.get_nowait())
        if self._broken is not None:
            raise WorkerLostError(self._broken)
        news = bool(self._events)
        with self._lock:
            while self._events:  # if one raises, `_give_up` processes the rest
                self._events.popleft()()
            self._stages.end_late()
            if self.hand_offs is not None:
                self.hand_offs.peers.end_late()
            operations = self.scheduler.decide(time.monotonic())
            work = [self._prepare(operation) for operation in operations if not isinstance(operation, Fetch)]
        for do in work:
            do()
        for span in spans_of((one for one in operations if isinstance(one, Fetch)), self._span_blocks):
            self._fetch(span)
        if news:
            self._news.set()
        self._say_losses()

    def _say_losses(self) -> None:
        now_s = time.monotonic()
        if now_s >= self._next_look_s:
            self._next_look_s = now_s + IDLE_WAIT_S
            self._say_late()
            self._losses.look({**self.scheduler.counters, **self.activity.counts})

    def _say_late(self) -> None:
        for op_id, ranks in self._workers.late():
            self.activity.counts["copies_late"] += 1
            text = "worker ranks %s have not ended copy %d for %g s; its pages stay in use until they end it or exit"
            warnings.warning("late", text, ranks, op_id, LATE_S)

    def _prepare(self, operation: ConnectorOperation) -> Callable[[], None]:
        """The action for an operation, to run after the lock is released."""
        if isinstance(operation, Upload):
            blocks = [(slot, self._pages[page]) for slot, page in operation.blocks]
            after = max(self._load_steps.get(page, -1) for _, page in operation.blocks)
            return partial(self._upload, operation, blocks, after)
        if isinstance(operation, Lookup):
            return partial(self._lookup, operation, self.scheduler.tokens_of(operation.request_id))
        if isinstance(operation, Save):
            page = operation.page
            return partial(self._save, operation, self._pages[page], self._save_steps[page], self._epoch)
        if isinstance(operation, Forward):
            source = None
            if operation.page is not None:
                source = self._pages[operation.page], self._save_steps[operation.page]
            return partial(self._forward, operation, source, self._epoch)
        if isinstance(operation, HandedOver):
            assert self.hand_offs is not None
            return partial(self.hand_offs.handed_over, operation)
        if isinstance(operation, Landed):
            return partial(self._land, operation)
        assert isinstance(operation, Drop), operation
        return _nothing  # a connector's slots have no lease

    def _lookup(self, op: Lookup, tokens: Sequence[int]) -> None:
        def done(hits: list[BlockHit | None] | None) -> None:
            if self.events is not None and hits is not None:
                self.events.found(op.keys, hits, tokens, self.scheduler.config.block_tokens)
            self._inbox.put(lambda: self.scheduler.lookup_done(op.op_id, hits, time.monotonic()))

        self._stages.lookup(op, done)

    def _fetch(self, span: Sequence[Fetch]) -> None:
        def ended(ops: Sequence[Fetch], errors: Sequence[str | None]) -> None:
            self.activity.load_failures.update(error for error in errors if error is not None)
            self.scheduler.fetched_many([op.op_id for op in ops], errors, time.monotonic())

        def end(ops: Sequence[Fetch], errors: Sequence[str | None]) -> None:
            self._inbox.put(partial(ended, ops, errors))

        for op in span:
            if self._staging.place(op.slot) is None:
                end((op,), ("device",))
        if found := [op for op in span if self._staging.place(op.slot) is not None]:
            self._stages.fetch_all(found, end)

    def _upload(self, op: Upload, blocks: list[tuple[int, Ids]], after: int) -> None:
        def ended(error: str | None) -> None:
            if error is not None:
                self.activity.load_failures["device"] += len(op.blocks)
                warnings.warning("upload", "blocks could not be copied into vLLM's cache, and are computed: %s", error)
                self.scheduler.upload_failed(op.op_id, "device", time.monotonic())
            else:
                self.activity.uploaded_bytes += len(op.blocks) * self.block_bytes
                self.scheduler.uploaded(op.op_id, time.monotonic())

        places = [(self._staging.place(slot), ids) for slot, ids in blocks]
        found = [(place, ids) for place, ids in places if place is not None]
        assert len(found) == len(places), "a block was fetched into a slot that is out of use"
        self._workers.upload(wire.Upload(op.op_id, found, after), ended)

    def _save(self, op: Save, ids: Ids, step: int, epoch: int) -> None:
        def end(reason: str | None) -> None:
            self._inbox.put(partial(self._saved, op, reason))

        def failed(reason: str) -> None:
            spans.copied(None)
            self._saved(op, reason)

        spans = self._save_spans
        spans.copying()
        self._download(op, (ids, step), epoch, lambda: spans.copied((op, end)), failed)

    def _spans_of_saves(self, epoch: int) -> SaveSpans:
        return SaveSpans(self._span_blocks, partial(self._write, epoch))

    def _write(self, epoch: int, saves: Sequence[Saved]) -> None:
        """Write blocks that were copied out of vLLM's cache in this epoch, on a separate thread: the pool computes the
        checksum, 0.6 ms per MB, before it returns."""
        if epoch != self._epoch:
            _end_all(saves, "reset")
        elif not self._writer.put(partial(self._stages.write_span, saves), lambda error: _end_all(saves, "device")):
            _end_all(saves, "closed")

    def _forward(self, op: Forward, source: tuple[Ids, int] | None, epoch: int) -> None:
        """Send a block to the decode engine, from a slot or from vLLM's blocks `source`, which that step computes."""

        def send() -> None:
            self._stages.hand_over(op, lambda reason: self._inbox.put(partial(self._forwarded, op, reason)))

        if source is None:
            send()
        else:
            self._download(op, source, epoch, send, partial(self._forwarded, op))

    def _forwarded(self, op: Forward, error: str | None) -> None:
        if self.fatal is None:
            self.scheduler.forwarded(op.op_id, error, time.monotonic())

    def _download(
        self,
        op: Save | Forward,
        source: tuple[Ids, int],
        epoch: int,
        then: Callable[[], None],
        failed: Callable[[str], None],
    ) -> None:
        """Copy blocks of vLLM into the operation's slot, then continue; `failed` gets the reason why that was not
        done."""

        def ended(error: str | None) -> None:
            if self.fatal is not None:
                return  # vLLM may have reused the page meanwhile
            if error is not None:
                warnings.warning("save", "a block could not be copied out of vLLM's cache: %s", error)
                failed("device")
            elif epoch != self._epoch:
                failed("reset")
            else:
                self.scheduler.downloaded(op.op_id, time.monotonic())
                then()

        place = self._staging.place(op.slot)
        if place is None:
            self._inbox.put(partial(failed, "device"))
            return
        ids, step = source
        self._workers.download(wire.Download(op.op_id, place, ids, step), ended)

    def _saved(self, op: Save, error: str | None) -> None:
        if error is None:
            self.activity.saved_bytes += self.block_bytes
        else:
            self.activity.save_failures[error] += 1
        self.scheduler.saved(op.op_id, error)

    def _land(self, notice: Landed) -> None:
        """Report to the workers, and so to vLLM, that a load has ended."""
        first, pages = self._grants.pop(notice.request_id, (0, []))
        ids = [self._pages.pop(page) for page in pages]
        for page in pages:
            self._load_steps.pop(page, None)
        if not ids:
            return  # reported already
        invalid: list[int] = []
        failed = notice.hole is not None
        if notice.hole is not None and len(self.shape.rows) == 1:
            invalid = [place for one in ids[notice.hole - first :] for place in one[0] if place >= 0]
            failed = not invalid  # vLLM then asks again
        self._workers.notify(self._notices.new(wire.Finished(notice.request_id, invalid, failed)))


def _end_all(saves: Sequence[Saved], reason: str) -> None:
    for _, end in saves:
        end(reason)


def _nothing() -> None:
    return None
