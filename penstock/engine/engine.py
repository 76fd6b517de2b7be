"""The live driver: one control thread feeds the scheduler core and passes its operations to the executors."""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Literal, TypeVar

from penstock.core.config import SchedulerConfig
from penstock.core.cost import CostModel
from penstock.core.engine.engine_load import EngineLoad
from penstock.core.engine.scheduler import LoadScheduler, WaitingQueueFull
from penstock.core.keys import BlockKey, root_key
from penstock.core.new_block import tenant_tag
from penstock.core.operations import BlockHit, Emit, Lookup, RequestSpec
from penstock.core.tenants import tenant_of
from penstock.engine.api import (
    EngineStats,
    GenerationRequest,
    InvalidRequest,
    OnEvent,
    Overloaded,
    TokenEvent,
    check_request,
    tell,
)
from penstock.engine.operation_dispatcher import OperationDispatcher
from penstock.engine.peers import Peers
from penstock.engine.reports import pool_series, report_of
from penstock.engine.runner import ModelRunner, SamplingParams
from penstock.engine.shaping import Past
from penstock.pool.api import Pool, PoolError
from penstock.pool.kv_events import KvEventLog
from penstock.pool.mac import PoolKey
from penstock.process.guarded_thread import GuardedThread
from penstock.process.rate_limited_log import RateLimitedLog
from penstock.process.switch_interval import switch_often

if TYPE_CHECKING:
    from penstock.device.accelerator import Accelerator

log = logging.getLogger(__name__)
rare = RateLimitedLog(log)

MAX_EVENTS_PER_DECISION = 256
IDLE_WAIT_S = 1.0
ANSWER_TIMEOUT_S = 5.0
POOL_STAT_TIMEOUT_S = 1.0
CLOSE_GRACE_S = 0.5
QUESTIONS_MAX = 64  # callers that may wait for answers of the control thread

Answer = TypeVar("Answer")


class Engine:
    """Serves requests with a runner (L1 and compute) and a pool (L3), deciding with `LoadScheduler`.

    Threading: public methods may be called from any thread. Only the control thread uses the core; executors and the
    pool put events into its inbox.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        cost: CostModel,
        runner: ModelRunner,
        pool: Pool | None,
        peers: Peers | None = None,
        pool_key: PoolKey | None = None,
        events: KvEventLog | None = None,
        lands_on: Accelerator | None = None,
    ) -> None:
        """`peers`: decode engines to which the KV of prompts may be sent (`config.hands_off`). With a `pool_key`, with
        which `pool` verifies blocks, block keys differ from those of engines with another pool key. `events` gets the
        pool's hits; `pool` itself adds the rest. `lands_on`: the runner's device, where blocks of pool nodes are to
        land in its memory (GPUDirect RDMA); not with `peers`. Raises ConfigError where it has none for them."""
        assert lands_on is None or peers is None
        assert config.pool == (pool is not None)
        assert config.hands_off == (peers is not None)
        self.config = config
        self.max_context_tokens = min(runner.max_context_tokens, config.l1_pages * config.block_tokens)
        self.vocab_size = runner.vocab_size
        self.eos_token_ids = runner.eos_token_ids
        self._pool = pool
        self._events = events
        # `submit` bounds the waiting requests; the scheduler core's bound is wider, as a preempted request waits again.
        self._scheduler = LoadScheduler(replace(config, max_waiting=config.max_waiting + config.max_running), cost)
        fingerprint = runner.layout.fingerprint(runner.model_id)
        self.fingerprint = pool_key.fingerprint(fingerprint) if pool_key is not None else fingerprint
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._clients: dict[str, tuple[GenerationRequest, OnEvent, Past | None]] = {}
        self._dispatcher = OperationDispatcher(
            config, self._scheduler, runner, pool, peers, self._inbox.put, self._sampling_of, self._looked_up, lands_on
        )
        self._seconds_by_label: defaultdict[str, float] = defaultdict(float)
        self._asked: set[tuple[str, str]] = set()  # (request_id, what) in the inbox: cancel, reroute
        self._questions = threading.BoundedSemaphore(QUESTIONS_MAX)
        self._clients_lock = threading.Lock()  # for changes of _clients, _asked, _stopping and _fatal
        self._admitted = 0
        self._stopping = False
        self._stop_by_s = 0.0
        self._fatal: str | None = None
        switch_often()
        self._thread = GuardedThread("penstock-control", self._run, failed=self._control_failed)
        self._thread.start()

    # -- callers ------------------------------------------------------------------------------------------------

    def submit(self, request: GenerationRequest, on_event: OnEvent) -> None:
        """See EngineAPI."""
        root = self.check(request)
        with self._clients_lock:
            if self._stopping or self._fatal:
                raise Overloaded(self._fatal or "the engine is stopping", retry_after_s=10.0)
            if request.request_id in self._clients:
                raise InvalidRequest(f"request_id {request.request_id!r} is in use")
            waiting = len(self._clients) - self._admitted
            if waiting >= self.config.max_waiting:
                raise Overloaded(f"{waiting} requests wait already; at most {self.config.max_waiting} may", 1.0)
            self._clients[request.request_id] = (request, on_event, _past_of(request))
            self._inbox.put(partial(self._submitted, request, root, time.monotonic() - request.waited_s))

    def check(self, request: GenerationRequest) -> BlockKey:
        """The request's root key. Raises InvalidRequest for a request that `submit` would refuse because of its
        content."""
        check_request(request, self.vocab_size, self.max_context_tokens)
        try:
            return root_key(self.fingerprint, request.tenant)
        except UnicodeEncodeError:
            raise InvalidRequest("tenant (cache_salt) is not valid Unicode text") from None

    def cancel(self, request_id: str) -> None:
        """See EngineAPI."""
        self._ask_once(request_id, "cancel", lambda: self._scheduler.cancel(request_id, time.monotonic()))

    def reroute(self, request_id: str, side: Literal["prefill", "decode"]) -> None:
        """The storage NIC of that side is down: remaining reads of this request move to the other side."""
        self._ask_once(request_id, side, lambda: self._scheduler.reroute(request_id, side, time.monotonic()))

    def _ask_once(self, request_id: str, what: str, event: Callable[[], None]) -> None:
        """Put an event of a known request into the inbox, unless the same one is already there: so the number of
        requests bounds the inbox."""
        asked = (request_id, what)
        with self._clients_lock:
            if request_id not in self._clients or asked in self._asked:
                return
            self._asked.add(asked)

        def happen() -> None:
            with self._clients_lock:
                self._asked.discard(asked)
            event()

        self._inbox.put(happen)

    def stats(self) -> EngineStats:
        """See EngineAPI. Raises TimeoutError when the control thread does not answer. A pool that does not answer is
        left out."""
        stats = self._ask(self._snapshot)
        if self._events is not None:
            stats.counters["kv_events_dropped"] = float(self._events.dropped)
        if self._pool is not None:
            try:
                stats.labelled.update(pool_series(self._pool.stat(POOL_STAT_TIMEOUT_S)))
            except PoolError as error:
                rare.warning("stat", "metrics without the pool's members: %s", error)
        return stats

    def _ask(self, question: Callable[[], Answer]) -> Answer:
        """Call it on the control thread and return its result. Raises TimeoutError when that does not answer, or too
        many callers wait."""
        answer: Future[Answer] = Future()
        if not self._thread.alive:
            raise TimeoutError("the engine has stopped")
        if not self._questions.acquire(timeout=ANSWER_TIMEOUT_S):
            raise TimeoutError(f"{QUESTIONS_MAX} callers wait for an answer of the engine already")
        try:
            self._inbox.put(partial(_answer, answer, question))
            return answer.result(timeout=ANSWER_TIMEOUT_S)
        except FutureTimeout:
            raise TimeoutError(f"the engine did not answer within {ANSWER_TIMEOUT_S:g} s") from None
        finally:
            self._questions.release()

    def healthy(self) -> tuple[bool, str]:
        """See EngineAPI."""
        if self._fatal:
            return False, self._fatal
        if not self._thread.alive:
            return False, "the control thread ended"
        stuck = self._dispatcher.stuck()
        return (False, stuck) if stuck else (True, "ok")

    def engine_load(self) -> EngineLoad:
        """The unfinished work of this engine. Raises TimeoutError when the control thread does not answer."""
        return self._ask(self._scheduler.engine_load)

    def gauges(self) -> dict[str, float]:
        """Gauges of the scheduler core. Raises TimeoutError when the control thread does not answer."""
        return self._ask(self._scheduler.gauges)

    def compute_cost(self) -> tuple[float, float, float]:
        """Coefficients a, b, c of the time of a batch (`core.cost.ComputeCost`): initial values, refined by each
        batch."""
        cost = self._scheduler.cost.compute
        return cost.a, cost.b, cost.c

    @property
    def preemptions(self) -> int:
        """How often requests started over for want of a page."""
        return int(self._scheduler.counters.get("preemptions", 0))

    def check_integrity(self) -> None:
        """Assert the core's invariants; for tests. Raises TimeoutError when the control thread does not answer."""
        self._ask(self._scheduler.check_integrity)

    def wait_idle(self, timeout_s: float) -> bool:
        """Wait until no request, load or save is left; False when `timeout_s` passed first. Raises TimeoutError when
        the engine has stopped."""
        end = time.monotonic() + timeout_s
        while not self._ask(lambda: self._scheduler.idle):
            if time.monotonic() > end:
                return False
            time.sleep(0.005)
        return True

    def close(self, timeout_s: float) -> None:
        """See EngineAPI. Does not close pool and runner: the caller owns them."""
        with self._clients_lock:
            self._stop_by_s = time.monotonic() + timeout_s
            self._stopping = True
            self._inbox.put(self._cancel_all)
        self._thread.join(timeout_s + CLOSE_GRACE_S)
        stopped = self._dispatcher.close(CLOSE_GRACE_S)
        if self._thread.alive or not stopped:
            log.error("an engine thread did not stop within %.1f s", timeout_s)
        self._fail_everything(f"the engine was closed and could not end the request within {timeout_s:g} s")

    # -- control thread -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopping or not (self._scheduler.idle or time.monotonic() > self._stop_by_s):
            self._step()

    def _control_failed(self, error: Exception) -> None:
        self._fail_everything(f"internal error: {error!r}")

    def _step(self) -> None:
        wakeup = self._scheduler.next_wakeup_s()
        wait_s = IDLE_WAIT_S if wakeup is None else min(max(wakeup - time.monotonic(), 0.0), IDLE_WAIT_S)
        if self._stopping:
            wait_s = min(wait_s, max(self._stop_by_s - time.monotonic(), 0.0))
        try:
            self._inbox.get(timeout=wait_s)()
            for _ in range(MAX_EVENTS_PER_DECISION):
                self._inbox.get_nowait()()
        except queue.Empty:
            pass
        self._dispatcher.end_late()
        self._dispatcher.carry_out(self._scheduler.decide(time.monotonic()), self._emit)
        self._dispatcher.say_losses()
        self._admitted = self._scheduler.admitted

    def _submitted(self, request: GenerationRequest, root: BlockKey, arrival_s: float) -> None:
        try:
            self._scheduler.submit(self._spec_of(request, root, arrival_s), arrival_s)
        except (WaitingQueueFull, ValueError) as error:
            self._end(request.request_id, TokenEvent(None, "error", str(error)))
        except Exception as error:  # only this request fails; the control thread goes on
            log.exception("request %s could not be added", request.request_id)
            self._end(request.request_id, TokenEvent(None, "error", f"internal error: {error!r}"))

    def _spec_of(self, request: GenerationRequest, root: BlockKey, arrival_s: float) -> RequestSpec:
        deadline_s = None if request.slo_ttft_s is None else arrival_s + request.slo_ttft_s
        return RequestSpec(
            request.request_id,
            request.prompt_tokens,
            request.sampling.max_tokens,
            root,
            deadline_s,
            request.sampling.end_tokens(self.eos_token_ids),
            tenant_tag(tenant_of(request.tenant)),
            request.hand_off,
            request.first_index,
            request.recompute_tokens,
        )

    def _sampling_of(self, request_id: str) -> tuple[SamplingParams, Past | None]:
        client = self._clients.get(request_id)  # None: it got its last event from `close`
        return (client[0].sampling, client[2]) if client is not None else (SamplingParams(), None)

    def _looked_up(self, op: Lookup, hits: Sequence[BlockHit | None]) -> None:
        """On a thread of lookups."""
        client = self._clients.get(op.request_id)
        if self._events is not None and client is not None:
            self._events.found(op.keys, hits, client[0].prompt_tokens, self.config.block_tokens)

    def _end(self, request_id: str, event: TokenEvent) -> None:
        """Send the client's last event, unless it was sent before."""
        with self._clients_lock:
            client = self._clients.pop(request_id, None)
        if client is not None:
            tell(client[1], event)

    def _cancel_all(self) -> None:
        for request_id in list(self._clients):
            self._scheduler.cancel(request_id, time.monotonic())

    def _fail_everything(self, error: str) -> None:
        with self._clients_lock:
            self._fatal = self._fatal or error
            left = list(self._clients)
        for request_id in left:
            self._end(request_id, TokenEvent(None, "error", error))

    def _emit(self, op: Emit) -> None:
        client = self._clients.get(op.request_id)
        if client is None:  # it got its last event from `close`
            return
        request, on_event, past = client
        logprobs = past.drawn(op.token) if past is not None and op.token is not None else None
        if op.finish_reason is None:
            tell(on_event, TokenEvent(op.token, logprobs=logprobs))
            return
        assert op.account is not None
        for label, start_s, end_s in op.account.spans:
            self._seconds_by_label[label] += end_s - start_s
        report = report_of(request, op.account, self.config)
        self._end(op.request_id, TokenEvent(op.token, op.finish_reason, op.error, report, logprobs))

    def _snapshot(self) -> EngineStats:
        scheduler = self._scheduler
        links = scheduler.links()
        return EngineStats(
            gauges=scheduler.gauges(),
            counters=dict(scheduler.counters),
            labelled={
                "request_seconds": dict(self._seconds_by_label),
                "load_failures": dict(self._dispatcher.load_failures),
                "save_failures": dict(self._dispatcher.save_failures),
                "hand_off_failures": dict(self._dispatcher.forward_failures),
                "link_blocks_in_flight": {name: count for name, (count, _) in links.items()},
                "link_bytes_per_s": {name: speed for name, (_, speed) in links.items()},
            },
            extra={
                "mode": self.config.mode,
                "policy": self.config.policy,
                "inbox": self._inbox.qsize(),
                "block_tokens": self.config.block_tokens,
            },
        )


def _past_of(request: GenerationRequest) -> Past | None:
    """The past tokens of a request, if its sampling needs them."""
    sampling, prompt = request.sampling, request.prompt_tokens
    if sampling.logprobs is None and not (sampling.shaping is not None and sampling.shaping.penalises):
        return None
    answered = len(prompt) - request.first_index
    return Past(prompt[:answered], prompt[answered:])


def _answer(answer: Future[Answer], question: Callable[[], Answer]) -> None:
    try:
        answer.set_result(question())
    except Exception as error:  # noqa: BLE001 (raised again at the caller; the control thread goes on)
        answer.set_exception(error)


_ids = itertools.count(1)


def new_request_id() -> str:
    """A request id that is unique in this process."""
    return f"req-{next(_ids)}"
