"""The scheduler core of one engine: events and the time go in, operations for the stages come out.

`LoadScheduler` owns every decision about requests: their order, admission, loads, batches, saves, preemption, ends.
Drivers (the live engine, the simulator) call one event method for each thing that happened, then `decide`, and execute
what it returns. It has no clock, no threads and no I/O. One thread at a time may call it.

Invariants:
  SCHED-1 A request is in exactly one state, and ends exactly once.
  SCHED-2 Every page is free, private to one request or load, or cached; every slot is free or used by one transfer.
  SCHED-3 No block counts as ready before its upload or computation ended (LOADS-3).
  SCHED-4 The pages set aside are those that admitted requests may still take.
  SCHED-5 Every queue and window is bounded.
Verification: `check_integrity`, after every event, in tests/core/engine and `penstock sim fuzz`.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from typing import Literal

from penstock.core.config import SchedulerConfig
from penstock.core.cost import CostModel
from penstock.core.engine.admission import Admission
from penstock.core.engine.ageing import Ageing
from penstock.core.engine.batching import Batching
from penstock.core.engine.engine_load import EngineLoad, engine_load
from penstock.core.engine.kv_handoff import KVHandoff
from penstock.core.engine.load_coordinator import LoadCoordinator
from penstock.core.engine.ranking import Ranking
from penstock.core.engine.read_paths import assign_read_paths, is_remote
from penstock.core.engine.request import Ending, Request, State
from penstock.core.engine.request_loads import NO_PAGE, LoadState
from penstock.core.engine.shared_state import SharedState
from penstock.core.engine.write_back import WriteBackQueue
from penstock.core.operations import BlockHit, ChunkOutcome, Discard, Emit, FinishReason, Lookup, Operation, RequestSpec


class WaitingQueueFull(RuntimeError):
    """There are `max_waiting` requests already."""


class LoadScheduler:
    """See the module. All times are seconds of the caller's clock and never go backwards."""

    def __init__(self, config: SchedulerConfig, cost: CostModel) -> None:
        self.config = config
        self.cost = cost
        self._shared = SharedState(config, cost)
        self._shared.preempt_for = self._preempt_for
        self._saving = WriteBackQueue(self._shared)
        self._ranking = Ranking(self._shared)
        self._handoff = KVHandoff(self._shared, self._settled)
        self._loading = LoadCoordinator(self._shared, self._changed, self._handoff)
        self._admission = Admission(
            self._shared, self._loading, self._handoff, self._ranking, self._changed, self._back_to_waiting
        )
        self._batching = Batching(self._shared, self._saving, self._handoff, self._loading.loads)
        self._requests: dict[str, Request] = {}
        self._lookups: deque[Request] = deque()
        self._looking_up: dict[int, Request] = {}
        self._ageing = Ageing(config.age_bound_s, config.age_delays)
        self._timeouts: list[tuple[float, int, str]] = []  # time, sequence, request_id
        self._sequence = 0

    # -- events: requests ---------------------------------------------------------------------------------------

    def submit(self, spec: RequestSpec, now: float) -> None:
        """A request arrived. Raises WaitingQueueFull, or ValueError when it could never be served."""
        config = self.config
        if len(self._requests) - len(self._admission.admitted) >= config.max_waiting:
            raise WaitingQueueFull(f"{config.max_waiting} requests are waiting already")
        if spec.request_id in self._requests:
            raise ValueError(f"request_id {spec.request_id!r} is in use")
        if not spec.prompt or spec.max_tokens < 1:
            raise ValueError("a request needs at least one prompt token and max_tokens of at least 1")
        pages = -(-(len(spec.prompt) + spec.max_tokens) // config.block_tokens)
        if pages > config.l1_pages:
            raise ValueError(f"prompt and max_tokens need {pages} blocks of L1; it has {config.l1_pages}")
        self._sequence += 1
        deadline_s = spec.ttft_deadline_s
        if deadline_s is None:
            deadline_s = now + config.default_slo_ttft_s
        request = Request(spec, self._sequence, now, config.block_tokens, deadline_s)
        self._requests[spec.request_id] = request
        heapq.heappush(self._timeouts, (now + config.request_timeout_s, request.sequence, spec.request_id))
        self._ageing.arrived(request)
        self._shared.count("requests")
        self._shared.count("prompt_tokens", request.target)
        self._look_up(request, now)

    def cancel(self, request_id: str, now: float) -> None:
        """The client does not want the answer any more; unknown and ended requests are ignored."""
        request = self._requests.get(request_id)
        if request is not None:
            self._finish(request, "cancelled", None, now)

    def _look_up(self, request: Request, now: float) -> None:
        request.state = State.LOOKUP
        request.switch_label("lookup", now)
        if self.config.pool and request.hittable_blocks and not request.distrusts_pool:
            self._lookups.append(request)
        else:
            self._enqueue(request, now)

    def lookup_done(self, op_id: int, hits: Sequence[BlockHit | None] | None, now: float) -> None:
        """The pool answered (None: it could not be asked; the request goes on without hits)."""
        request = self._looking_up.pop(op_id)
        if request.state is not State.LOOKUP:
            return
        size = self.config.block_bytes
        if hits is None:
            self._shared.count("lookup_failures")
            hits = []
        own = [hit if hit is not None and hit.size_bytes == size else None for hit in hits]
        if refused := sum(hit is not None and hit.size_bytes != size for hit in hits):
            self._shared.count("hits_of_another_size", refused)
        hand_off = request.spec.hand_off
        if hand_off is not None:
            request.hits, request.alternates = assign_read_paths(own, hand_off, size, request.hittable_blocks)
        else:
            request.hits = {i: hit for i, hit in enumerate(own) if hit is not None}
        for index in range(request.spec.recompute_tokens // self.config.block_tokens):
            request.hits.pop(index, None)
        self._enqueue(request, now)

    def _enqueue(self, request: Request, now: float) -> None:
        """Costs and rank are known: the request waits for admission."""
        self._ranking.estimate(request)
        account = request.account
        if not account.preemptions:
            account.predicted_load_s = self._ranking.load_s(request)
            account.predicted_compute_s = request.compute_s
            self._ageing.estimated(request)
        self._ranking.set_rank(request)
        self._admission.enqueue(request)
        self._ranking.stale = True
        self._relabel(request, now)

    def reroute(self, request_id: str, side: Literal["prefill", "decode"], now: float) -> None:
        """The storage NIC of that side is gone: what it was still to read is read on the other side, where that can."""
        request = self._requests.get(request_id)
        hand_off = request.spec.hand_off if request is not None else None
        if request is not None and hand_off is not None:
            remote = side == "decode"
            self._loading.reroute(request, lambda route: is_remote(route, hand_off) == remote)
            self._changed(request, now)

    # -- events: stages -----------------------------------------------------------------------------------------

    def fetched(self, op_id: int, error: str | None, now: float) -> None:
        """A Fetch ended; `error` is the reason label of a failure."""
        self._loading.fetched((op_id,), (error,), now)

    def fetched_many(self, op_ids: Sequence[int], errors: Sequence[str | None], now: float) -> None:
        """Fetches on one route, issued one after the other, ended together, each with its own error or None."""
        self._loading.fetched(op_ids, errors, now)

    def uploaded(self, op_id: int, now: float) -> None:
        """An Upload ended: its bytes are in L1."""
        self._loading.uploaded(op_id, now)

    def upload_failed(self, op_id: int, error: str, now: float) -> None:
        """An Upload failed; `error` is the reason label. A batch that waits for it fails too."""
        self._loading.upload_failed(op_id, error, now)

    def downloaded(self, op_id: int, now: float = 0.0) -> None:
        """The first half of a Save or a Forward ended: the page's bytes are in its slot."""
        if not self._handoff.downloaded(op_id, now):
            self._saving.downloaded(op_id)
        self._admission.blocked = False

    def forwarded(self, op_id: int, error: str | None, now: float) -> None:
        """A Forward ended: the decode engine has the block, or `error` is the reason label of a failure."""
        self._handoff.forwarded(op_id, error, now)
        self._admission.blocked = False

    def _settled(self, request: Request, now: float) -> None:
        """The decode engine has one more block of the request, or its pages are no longer being read."""
        if request.state is State.DONE or request.held:
            return
        if request.ending is not None:
            self._finish_late(request, request.ending, now)
        elif request.state is State.HANDOFF and not request.forwarding:
            self._finish(request, "handed_over", None, now)

    def saved(self, op_id: int, error: str | None) -> None:
        """A Save ended."""
        self._saving.saved(op_id, error)
        self._admission.blocked = False

    def computed(self, op_id: int, outcomes: Sequence[ChunkOutcome], now: float) -> None:
        """A Compute ended with one outcome per chunk. A failed chunk ends its own request only."""
        for request, outcome, waited in self._batching.computed(op_id, outcomes, now):
            if outcome.error is not None:
                if not self._recompute(request, outcome.unusable, now):
                    self._failed(request, outcome.error, waited, now)
            elif request.ending is not None:
                self._finish_late(request, request.ending, now)
            elif outcome.token is None:
                self._changed(request, now)
            else:
                self._token(request, outcome.token, now)

    def compute_failed(self, op_id: int, error: str, now: float) -> None:
        """A Compute failed as a whole, for an unknown reason: its requests end with an error, or start over."""
        requests, waited = self._batching.failed(op_id)
        for request in requests:
            self._failed(request, error, waited, now)

    def _recompute(self, request: Request, unusable: frozenset[int], now: float) -> bool:
        """A chunk failed because cached blocks hold values that are not finite: drop them and start over without the
        pool, once per request; else return False. Such blocks came from the pool: blocks computed here are checked
        before they are cached."""
        l1 = self._shared.l1
        pages = {i: request.loads.pages[i] for i in unusable if i < len(request.loads.pages)}
        keys = tuple(request.key_at(i) for i, page in sorted(pages.items()) if page != NO_PAGE and l1.is_cached(page))
        if not keys or request.distrusts_pool or request.ending is not None or request.downloading:
            return False
        self._shared.count("distrusted_blocks", len(keys))
        request.distrusts_pool = True
        self._start_over(request, now)
        for key in keys:
            l1.discard(key)
        if self.config.pool:
            self._shared.outbox.append(Discard(keys))
        return True

    def _failed(self, request: Request, error: str, waited: bool, now: float) -> None:
        """A chunk of the request failed. If the batch `waited` for uploads, they may be the cause: then the request
        starts over, once."""
        if waited and not request.restarted and request.ending is None and not request.downloading:
            request.restarted = True
            self._start_over(request, now)
        else:
            self._finish_late(request, request.ending or ("error", error, None), now)

    def _token(self, request: Request, token: int, now: float) -> None:
        account = request.account
        account.generated_tokens += 1
        request.tokens.append(token)
        request.chain.extend((token,))
        if account.first_token_s is None:
            account.first_token_s = now
            self._ageing.first_token(request)
            self._ranking.stale = True
            self._observe_load(request)
        hands_off = request.spec.hand_off is not None
        if request.state is State.PREFILL:
            request.state = State.HANDOFF if hands_off else State.DECODE
            self._admission.prefills -= 1
            if not hands_off:
                self._batching.start_decoding(request)
        if token in request.spec.eos_token_ids:
            self._finish(request, "stop", None, now, token)
        elif hands_off:
            self._shared.outbox.append(Emit(request.request_id, token))
            self._relabel(request, now)
            self._handoff.finish(request)
            self._settled(request, now)
        elif account.generated_tokens >= request.spec.max_tokens:
            self._finish(request, "length", None, now, token)
        else:
            self._shared.outbox.append(Emit(request.request_id, token))
            self._relabel(request, now)

    def _observe_load(self, request: Request) -> None:
        account = request.account
        if account.loaded_bytes and not account.preemptions:
            fetch_s, upload_s = account.measured_fetch_s, account.measured_upload_s
            measured_s = fetch_s + upload_s if self.config.mode == "coupled" else max(fetch_s, upload_s)
            self.cost.load_error.observe(account.predicted_load_s, measured_s)

    def _changed(self, request: Request, now: float) -> None:
        """A block of the request moved, or a chunk of it was computed."""
        if request.state is State.PREFILL and request.ending is None:
            self._batching.update_readiness(request)
        self._ranking.progressed(request)
        self._relabel(request, now)

    def _relabel(self, request: Request, now: float) -> None:
        request.switch_label(self._label(request), now)

    def _label(self, request: Request) -> str:
        """The stage the request is in, or why it waits."""
        if request.state in (State.LOOKUP, State.DECODE, State.HANDOFF):
            return str(request.state.value)
        if request.batched:
            return "compute"
        counts = request.loads.counts
        if counts[LoadState.FETCHING]:
            return "fetch"
        if request.state is State.WAITING:
            turn = self.config.mode == "coupled" or len(self._admission.admitted) >= self.config.max_running
            return "wait_turn" if turn else "wait_l1"
        if counts[LoadState.WANTED]:
            return "wait_l2" if self._shared.l2.free_for_loads <= 0 else "wait_fetch_link"
        if counts[LoadState.UPLOADING]:
            return "upload"
        if counts[LoadState.STAGED]:
            return "wait_upload_link"
        return "wait_compute"

    # -- leaving ------------------------------------------------------------------------------------------------

    def _release(self, request: Request) -> None:
        """Give back everything the request holds; blocks that became full stay cached."""
        l1 = self._shared.l1
        assert not request.downloading
        self._handoff.leave(request)
        self._batching.leave(request)
        held = [(page, index) for index, page in enumerate(request.loads.pages) if page != NO_PAGE]
        for page, index in reversed(held):
            load = request.loads.by_index.get(index)
            if load is not None and load.page == page:
                continue  # the load's own, still going up
            if l1.is_cached(page):
                l1.unpin(page)
            else:
                l1.give_back(page)
        self._admission.left(request)
        self._shared.promise(request, -request.promise)
        request.state = State.DONE
        self._loading.leave(request)
        request.forget_blocks()
        self._ranking.stale = True

    def _back_to_waiting(self, request: Request, now: float) -> None:
        """From PREFILL back to WAITING, with its hits known."""
        if not request.account.preemptions:
            request.account.cached_tokens = 0
        self._release(request)
        self._enqueue(request, now)

    def _preempt_for(self, request: Request, now: float) -> bool:
        """Make room for `request`: the admitted one of highest rank number gives up its pages and starts over (its full
        blocks stay cached or go to the pool). False when none can, or when `request` itself (decoding) was."""
        candidates = [
            other
            for other in self._admission.admitted
            if other is not request and not other.held and other.state is not State.HANDOFF
        ]
        if not candidates:
            return False
        victim = max(candidates, key=lambda other: other.rank)
        if victim.rank < request.rank:
            if request.state is not State.DECODE:
                return False
            victim = request
        self._shared.count("preemptions")
        self._start_over(victim, now)
        return victim is not request

    def _start_over(self, request: Request, now: float) -> None:
        """Give up pages and progress but not the tokens, and begin again with a lookup."""
        request.account.preemptions += 1
        self._release(request)
        request.hits = {}
        self._look_up(request, now)

    def _finish(
        self, request: Request, reason: FinishReason, error: str | None, now: float, token: int | None = None
    ) -> None:
        """End a request; one whose pages a batch or a download uses right now ends when that does."""
        if request.held:
            request.ending = request.ending or (reason, error, token)
            self._batching.leave(request)
            return
        self._release(request)
        self._ageing.ended(request)
        del self._requests[request.request_id]
        request.switch_label("done", now)
        request.account.end_s = now
        self._shared.count(f"finished_{reason}")
        self._shared.count("cached_tokens", request.account.cached_tokens)
        self._shared.outbox.append(Emit(request.request_id, token, reason, error, request.account))

    def _finish_late(self, request: Request, ending: Ending, now: float) -> None:
        reason, error, token = ending
        self._finish(request, reason, error, now, token)

    # -- decide -------------------------------------------------------------------------------------------------

    def decide(self, now: float) -> list[Operation]:
        """The operations to carry out now, given all events so far."""
        self._run_timers(now)
        self._ranking.sort_feasible(self._requests.values(), now)
        preemptions = self._shared.counters.get("preemptions", 0)
        self._dispatch_lookups()
        self._admission.admit(now)
        self._admission.prefetch_unadmitted(now)
        self._loading.dispatch_fetches(now)
        self._loading.dispatch_uploads(now)
        for request in self._batching.dispatch(now):
            self._relabel(request, now)
        if self._shared.counters.get("preemptions", 0) > preemptions:  # slots became free after the fetches were issued
            self._dispatch_lookups()
            self._loading.dispatch_fetches(now)
        self._handoff.dispatch()
        self._saving.dispatch(self._batching.busy)
        operations, self._shared.outbox = self._shared.outbox, []
        return operations

    def _dispatch_lookups(self) -> None:
        while self._lookups and len(self._looking_up) < self.config.lookup_window:
            request = self._lookups.popleft()
            if request.state is State.LOOKUP:
                op_id = self._shared.next_op()
                self._looking_up[op_id] = request
                keys = request.chain.keys[: request.hittable_blocks]
                self._shared.outbox.append(Lookup(op_id, request.request_id, keys, self.config.lookup_timeout_s))

    def _run_timers(self, now: float) -> None:
        while self._timeouts and self._timeouts[0][0] <= now:
            _, sequence, request_id = heapq.heappop(self._timeouts)
            timed_out = self._requests.get(request_id)
            if timed_out is not None and timed_out.sequence == sequence:
                self._finish(timed_out, "timeout", f"no end after {self.config.request_timeout_s:g} s", now)
        for request in self._ageing.due(now):
            if self.config.mode == "penstock":
                self._ranking.age(request)

    def next_wakeup_s(self) -> float | None:
        """When `decide` should be called although nothing happened; None: not before the next event."""
        times_s = [self._ageing.next_s, self._timeouts[0][0] if self._timeouts else None]
        return min((time_s for time_s in times_s if time_s is not None), default=None)

    # -- views --------------------------------------------------------------------------------------------------

    @property
    def counters(self) -> dict[str, int]:
        """Counts since start, by name."""
        return self._shared.counters

    def gauges(self) -> dict[str, float]:
        """Current numbers: requests by state, pages, slots, errors of predictions."""
        shared = self._shared
        found: dict[str, float] = {
            "requests_waiting": len(self._requests) - len(self._admission.admitted),
            "requests_prefill": self._admission.prefills,
            "requests_decoding": self._batching.decoding,
            "l1_pages_total": shared.l1.total,
            "l1_pages_available": shared.l1.available,
            "l1_pages_cached": shared.l1.cached,
            "l2_slots_total": shared.l2.total,
            "l2_slots_loads": shared.l2.loads,
            "l2_slots_saves": shared.l2.saves,
            "saves_queued": len(self._saving),
            "requests_handing_over": sum(r.state is State.HANDOFF for r in self._admission.admitted),
            "l2_slots_forwards": shared.l2.forwards,
            "predicted_load_error": self.cost.load_error.mean,
            "predicted_compute_error": self.cost.compute_error.mean,
        }
        return found

    def engine_load(self) -> EngineLoad:
        """Load snapshot for the router."""
        return engine_load(self._requests.values())

    def links(self) -> dict[str, tuple[int, float]]:
        """Each link's blocks in flight and observed bytes/s."""
        known = self.cost.links
        return {
            name: (count, known[name].bytes_per_s if name in known else self.cost.upload.bytes_per_s)
            for name, count in self._loading.in_flight().items()
        }

    @property
    def admitted(self) -> int:
        """Requests past admission."""
        return len(self._admission.admitted)

    @property
    def idle(self) -> bool:
        """No request, save or transfer is left."""
        in_flight = len(self._saving) or len(self._handoff) or self._loading.loads or self._batching.busy
        return not (self._requests or in_flight)

    def check_work_conserving(self) -> None:
        """Right after `decide`: no link is idle while an admitted request has a block for it and L2 has a slot."""
        self._loading.check_work_conserving()

    def check_integrity(self) -> None:
        """Assert SCHED-1 to SCHED-5 and the invariants of the parts. O(everything); for tests."""
        shared = self._shared
        private: list[int] = list(self._loading.reserved_pages())
        reserved = set(private)
        for request in self._requests.values():
            assert request.state is not State.DONE, "SCHED-1: an ended request is still known"
            admitted = request.state in (State.PREFILL, State.DECODE, State.HANDOFF)
            assert (request in self._admission.admitted) == admitted, "SCHED-1"
            assert (request in self._admission.waiting) == (request.state is State.WAITING), "SCHED-1"
            assert request.promise >= 0
            request.loads.check_integrity(counted=admitted)
            pages = (page for page in request.loads.pages if page != NO_PAGE)
            private += [page for page in pages if not shared.l1.is_cached(page) and page not in reserved]
        assert len(set(private)) == len(private), "SCHED-2: a private page has two owners"
        shared.l1.check_integrity(set(private), self._loading.reserved_keys())
        slots = self._loading.slots_in_use() + self._saving.slots_in_use() + self._handoff.slots_in_use()
        shared.l2.check_integrity(slots)
        assert shared.promised == sum(request.promise for request in self._admission.admitted), "SCHED-4"
        assert self._admission.prefills == sum(request.state is State.PREFILL for request in self._admission.admitted)
        assert len(self._admission.admitted) <= self.config.max_running, "SCHED-5"
        self._loading.check_integrity()
        self._handoff.check_integrity()
        self._batching.check_integrity()
        self._ageing.check_integrity()
