"""The brain of one engine: events and the time go in, operations for the stages come out.

`LoadScheduler` owns every decision about requests: their order, admission, loads, batches, saves, preemption, ends.
Bodies (the live engine, the simulator, plug-ins) call an event method for each thing that happened, then `decide`, and
carry out what it returns. It has no clock, no threads and no I/O, and one thread at a time may call it.

Invariants, checked by `check_integrity`:
  S1 a request is in exactly one state, and ends exactly once;
  S2 every page is free, private to one request or load, or cached; every slot is free or one load's or save's;
  S3 no block counts as ready before its upload or computation ended;
  S4 pages set aside are those that admitted requests may still take;
  S5 every queue and window is bounded.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence

from penstock.core.batching import Batching
from penstock.core.config import SchedulerConfig
from penstock.core.cost import CostModel
from penstock.core.feasibility import Job, put_off
from penstock.core.loading import Loading
from penstock.core.operations import BlockHit, Emit, FinishReason, Lookup, Operation, RequestSpec
from penstock.core.ordering import AGED, HOPELESS, ORDINARY, RankedQueue, policy_key
from penstock.core.request import NO_PAGE, LoadState, Request, State
from penstock.core.saving import Saving
from penstock.core.shared_state import SharedState

FEASIBILITY_HORIZON = 256  # requests of earliest deadline that `feasible` looks at
ADMISSION_LOOKAHEAD = 8  # requests looked at behind one that does not fit


class WaitingQueueFull(RuntimeError):
    """There are `max_waiting` requests already."""


class LoadScheduler:
    """See the module. All times are seconds of the caller's clock and never go backwards."""

    def __init__(self, config: SchedulerConfig, cost: CostModel) -> None:
        self.config = config
        self.cost = cost
        self._shared = SharedState(config, cost)
        self._shared.preempt_for = self._preempt_for
        self._saving = Saving(self._shared)
        self._loading = Loading(self._shared, self._changed)
        self._batching = Batching(self._shared, self._saving, self._loading.loads)
        self._policy = "fcfs" if config.mode == "coupled" else config.policy
        self._requests: dict[str, Request] = {}
        self._lookups: deque[Request] = deque()
        self._looking_up: dict[int, Request] = {}
        self._waiting: RankedQueue[Request] = RankedQueue()
        self._admitted: dict[Request, None] = {}
        self._prefills = 0
        self._admission_blocked = False
        self._timers: list[tuple[float, int, str, str]] = []  # time, sequence, kind, request_id
        self._feasibility_stale = False
        self._sequence = 0

    # -- events: requests ---------------------------------------------------------------------------------------

    def submit(self, spec: RequestSpec, now: float) -> None:
        """A request arrived. Raises WaitingQueueFull, or ValueError when it could never be served."""
        config = self.config
        if len(self._requests) - len(self._admitted) >= config.max_waiting:
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
        heapq.heappush(self._timers, (now + config.request_timeout_s, request.sequence, "timeout", spec.request_id))
        heapq.heappush(self._timers, (now + config.age_bound_s, request.sequence, "age", spec.request_id))
        self._shared.count("requests")
        self._shared.count("prompt_tokens", request.target)
        self._look_up(request, now)

    def cancel(self, request_id: str, now: float) -> None:
        """The client does not want the answer any more; unknown and ended requests are ignored."""
        request = self._requests.get(request_id)
        if request is not None:
            self._finish(request, "cancelled", None, now)

    def _hittable(self, request: Request) -> int:
        """How many leading blocks may be taken from a cache: the last token is always computed."""
        return (request.target - 1) // self.config.block_tokens

    def _look_up(self, request: Request, now: float) -> None:
        request.state = State.LOOKUP
        request.switch_label("lookup", now)
        if self.config.pool and self._hittable(request):
            self._lookups.append(request)
        else:
            self._enqueue(request, now)

    def lookup_done(self, op_id: int, hits: Sequence[BlockHit | None] | None, now: float) -> None:
        """The pool answered (None: it could not be asked; the request goes on without hits)."""
        request = self._looking_up.pop(op_id)
        if request.state is not State.LOOKUP:
            return
        if hits is None:
            self._shared.count("lookup_failures")
        else:
            size = self.config.block_bytes
            request.hits = {i: hit for i, hit in enumerate(hits) if hit is not None and hit.size_bytes == size}
        self._enqueue(request, now)

    def _enqueue(self, request: Request, now: float) -> None:
        """Costs and rank are known: the request waits for admission."""
        request.state = State.WAITING
        self._estimate(request)
        account = request.account
        if not account.preemptions:
            account.predicted_load_s = self._load_s(request)
            account.predicted_compute_s = request.compute_s
        self._set_rank(request, now)
        self._waiting.push(request)
        self._admission_blocked = False
        self._feasibility_stale = True
        self._relabel(request, now)

    def _estimate(self, request: Request) -> None:
        """What is to load and to compute, as L1 and the pool stand now."""
        size, block_bytes = self.config.block_tokens, self.config.block_bytes
        by_route: dict[tuple[str, ...], int] = {}
        cached = upload = 0
        for index in range(self._hittable(request)):
            if request.key_at(index) in self._shared.l1:
                cached += 1
            elif hit := request.hits.get(index):
                cached += 1
                upload += block_bytes
                by_route[hit.route] = by_route.get(hit.route, 0) + block_bytes
        request.bytes_by_route, request.upload_bytes = by_route, upload
        context = cached * size
        request.compute_s = self.cost.compute.seconds([(request.target - context, context)])

    def _load_s(self, request: Request) -> float:
        serial = self.config.mode == "coupled"
        return self.cost.load_s(request.bytes_by_route, request.upload_bytes, serial)

    # -- events: stages -----------------------------------------------------------------------------------------

    def fetched(self, op_id: int, error: str | None, now: float) -> None:
        """A Fetch ended; `error` is the reason label of a failure."""
        self._loading.fetched(op_id, error, now)

    def uploaded(self, op_id: int, now: float) -> None:
        """An Upload ended: its bytes are in L1."""
        self._loading.uploaded(op_id, now)

    def upload_failed(self, op_id: int, error: str, now: float) -> None:
        """An Upload came to nothing; `error` is the reason label. A batch that waits for it fails too."""
        self._loading.upload_failed(op_id, error, now)

    def downloaded(self, op_id: int) -> None:
        """The first half of a Save ended: the page's bytes are in its slot."""
        self._saving.downloaded(op_id)
        self._admission_blocked = False

    def saved(self, op_id: int, error: str | None) -> None:
        """A Save ended."""
        self._saving.saved(op_id, error)
        self._admission_blocked = False

    def computed(self, op_id: int, sampled: Sequence[int | None], now: float) -> None:
        """A Compute ended with one sampled token (or None) per chunk."""
        for request, token in self._batching.computed(op_id, sampled, now):
            if request.ending is not None:
                self._finish(request, *request.ending, now)
            elif token is None:
                self._changed(request, now)
            else:
                self._token(request, token, now)

    def compute_failed(self, op_id: int, error: str, now: float) -> None:
        """A Compute came to nothing: its requests end with an error. When it waited for uploads those may be the cause:
        then its requests start over, once."""
        requests, waited = self._batching.failed(op_id)
        for request in requests:
            if waited and not request.restarted and request.ending is None:
                request.restarted = True
                self._start_over(request, now)
            else:
                reason, text = request.ending or ("error", error)
                self._finish(request, reason, text, now)

    def _token(self, request: Request, token: int, now: float) -> None:
        account = request.account
        account.generated_tokens += 1
        request.tokens.append(token)
        request.chain.extend((token,))
        self._feasibility_stale = True
        if account.first_token_s is None:
            account.first_token_s = now
            self._observe_load(request)
        if request.state is State.PREFILL:
            request.state = State.DECODE
            self._prefills -= 1
            self._batching.start_decoding(request)
        if token in request.spec.eos_token_ids:
            self._finish(request, "stop", None, now, token)
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

    # -- rank and label -----------------------------------------------------------------------------------------

    def _set_rank(self, request: Request, now: float) -> None:
        load_s = self._load_s(request)
        if request.static_key is None:
            request.static_key = policy_key(
                self._policy, request.arrival_s, request.deadline_s, load_s, request.compute_s
            )
        if request.tier == AGED:
            key = request.arrival_s
        elif self._policy == "srpt" or request.tier == HOPELESS:
            key = load_s + request.compute_s
        else:
            key = request.static_key
        rank = (request.tier, key, request.sequence)
        if rank != request.rank:
            request.rank = rank
            for queue in request.queues:
                if request in queue:
                    queue.push(request)
            if request in self._waiting:
                self._waiting.push(request)

    def _sort_feasible(self, now: float) -> None:
        """Put off the requests that stand in the way of more deadlines than their own; the earliest deadlines first."""
        self._feasibility_stale = False
        open_requests = [
            request
            for request in self._requests.values()
            if request.state in (State.WAITING, State.PREFILL) and request.tier != AGED
        ]
        open_requests.sort(key=lambda request: request.deadline_s)
        del open_requests[FEASIBILITY_HORIZON:]
        jobs = [Job(request.deadline_s, self._stage_s(request)) for request in open_requests]
        late = put_off(jobs, now)
        for index, request in enumerate(open_requests):
            tier = HOPELESS if index in late else ORDINARY
            if tier != request.tier:
                request.tier = tier
                self._set_rank(request, now)

    def _stage_s(self, request: Request) -> tuple[float, float, float]:
        """Seconds that remain on fetch, upload and compute."""
        fetch_s = self.cost.load_s(request.bytes_by_route, 0, serial=False)
        return fetch_s, self.cost.upload.seconds(request.upload_bytes), request.compute_s

    def _changed(self, request: Request, now: float) -> None:
        """A block of the request moved, or a chunk of it was computed."""
        if request.state is State.PREFILL:
            self._batching.update_readiness(request)
        if request.tier != AGED and (self._policy == "srpt" or request.tier == HOPELESS):
            self._set_rank(request, now)
        self._relabel(request, now)

    def _relabel(self, request: Request, now: float) -> None:
        request.switch_label(self._label(request), now)

    def _label(self, request: Request) -> str:
        """The stage the request is in, or why it waits."""
        if request.state in (State.LOOKUP, State.DECODE):
            return request.state.value if request.state is State.LOOKUP else "decode"
        if request.batched:
            return "compute"
        counts = request.load_counts
        if counts[LoadState.FETCHING]:
            return "fetch"
        if request.state is State.WAITING:
            turn = self.config.mode == "coupled" or len(self._admitted) >= self.config.max_running
            return "wait_turn" if turn else "wait_l1"
        if counts[LoadState.WANTED]:
            return "wait_l2" if self._shared.l2.free_for_loads <= 0 else "wait_fetch_link"
        if counts[LoadState.UPLOADING]:
            return "upload"
        if counts[LoadState.STAGED]:
            return "wait_upload_link"
        return "wait_compute"

    # -- admission ----------------------------------------------------------------------------------------------

    def _admit(self, now: float) -> None:
        """Admit by rank while L1 has pages to set aside. One that does not fit lets later ones pass, unless aged."""
        config = self.config
        while len(self._waiting) and not self._admission_blocked and len(self._admitted) < config.max_running:
            if config.mode == "coupled" and self._prefills >= config.coupled_batch_requests:
                return
            for request in self._waiting.first(1 if config.mode == "coupled" else ADMISSION_LOOKAHEAD):
                if self._try_admit(request, now):
                    break
                if request.tier == AGED:
                    self._admission_blocked = True
                    return
            else:
                self._admission_blocked = True

    def _try_admit(self, request: Request, now: float) -> bool:
        shared = self._shared
        total = -(-request.target // self.config.block_tokens)
        unpinned, need = 0, total
        hittable = self._hittable(request)
        for index in range(hittable):
            key = request.key_at(index)
            if key in shared.l1:
                need -= 1
                unpinned += not shared.l1.is_pinned(key)
            elif (load := self._loading.loads.get(key)) is not None and load.page is not None:
                need -= 1
        if need + unpinned > shared.l1.available - shared.promised and not self._revoke(request, need + unpinned, now):
            return False
        self._waiting.discard(request)
        request.state = State.PREFILL
        self._admitted[request] = None
        self._prefills += 1
        request.pages = [NO_PAGE] * total
        request.ready = [False] * total
        need = total
        for index in range(hittable):
            key = request.key_at(index)
            if key in shared.l1:
                request.pages[index] = shared.l1.pin(key)
                request.ready[index] = True
                request.count_cached(self.config.block_tokens)
                need -= 1
            elif index in request.hits or key in self._loading.loads:
                if index not in request.loads:
                    self._loading.join(request, index, request.hits.get(index) or self._loading.loads[key].hit)
                need -= request.loads[index].page is not None
        shared.promise(request, need)
        self._count_loads(request)
        self._loading.enqueue(request)
        self._changed(request, now)
        return True

    def _count_loads(self, request: Request) -> None:
        """What is still to fetch and to upload, block by block."""
        request.bytes_by_route, request.upload_bytes = {}, 0
        for load in request.loads.values():
            size, route = load.hit.size_bytes, load.hit.route
            request.upload_bytes += size
            if load.state in (LoadState.WANTED, LoadState.FETCHING):
                request.bytes_by_route[route] = request.bytes_by_route.get(route, 0) + size

    def _revoke(self, request: Request, need: int, now: float) -> bool:
        """Make room for `need` pages by taking back the admission of requests of higher rank number that have taken
        nothing yet, the highest first; none of them if all of them together would not do."""
        if self.config.mode == "coupled":
            return False
        candidates = [
            other
            for other in self._admitted
            if other.rank > request.rank
            and other.state is State.PREFILL
            and not other.batched
            and not other.own_pages
            and other.position == 0
            and all(load.state is LoadState.WANTED for load in other.loads.values())
        ]
        shared = self._shared
        if need > shared.l1.available - shared.promised + sum(other.promise for other in candidates):
            return False
        for other in sorted(candidates, key=lambda other: other.rank, reverse=True):
            if need <= shared.l1.available - shared.promised:
                break
            self._back_to_waiting(other, now)
        return True

    def _prefetch_unadmitted(self, now: float) -> None:
        """Reactive: requests that L1 has no room for yet may fetch into a share of L2 meanwhile."""
        if self.config.mode == "coupled" or not self._admission_blocked:
            return
        for request in self._waiting.first(2):
            if request.reactive:
                continue
            request.reactive = True
            for index, hit in request.hits.items():
                if index < self._hittable(request) and request.key_at(index) not in self._shared.l1:
                    self._loading.join(request, index, hit)
            self._loading.enqueue(request)

    # -- leaving ------------------------------------------------------------------------------------------------

    def _release(self, request: Request) -> None:
        """Give back everything the request holds; blocks that became full stay cached."""
        l1 = self._shared.l1
        self._waiting.discard(request)
        self._batching.leave(request)
        held = [(page, index) for index, page in enumerate(request.pages) if page != NO_PAGE]
        for page, index in reversed(held):
            load = request.loads.get(index)
            if load is not None and load.page == page:
                continue  # the load's own, still going up
            if l1.is_cached(page):
                l1.unpin(page)
            else:
                l1.give_back(page)
        if request.state is State.PREFILL:
            self._prefills -= 1
        self._admitted.pop(request, None)
        self._shared.promise(request, -request.promise)
        request.state = State.DONE
        self._loading.leave(request)
        request.forget_blocks()
        self._admission_blocked = False
        self._feasibility_stale = True

    def _back_to_waiting(self, request: Request, now: float) -> None:
        """From PREFILL back to WAITING, with its hits known."""
        if not request.account.preemptions:
            request.account.cached_tokens = 0
        self._release(request)
        self._enqueue(request, now)

    def _preempt_for(self, request: Request, now: float) -> bool:
        """Make room for `request`: the admitted one of highest rank number gives up its pages and starts over (its full
        blocks stay cached or go to the pool). False when nobody can, or when it is `request` itself, decoding."""
        candidates = [other for other in self._admitted if other is not request and not other.batched]
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
        """Give up pages and progress, keep the tokens, and begin again with a lookup."""
        request.account.preemptions += 1
        self._release(request)
        request.hits = {}
        self._look_up(request, now)

    def _finish(
        self, request: Request, reason: FinishReason, error: str | None, now: float, token: int | None = None
    ) -> None:
        """End a request; one whose tokens are being computed right now ends when that batch does."""
        if request.batched:
            request.ending = request.ending or (reason, error)
            return
        self._release(request)
        del self._requests[request.request_id]
        request.switch_label("done", now)
        request.account.end_s = now
        self._shared.count(f"finished_{reason}")
        self._shared.count("cached_tokens", request.account.cached_tokens)
        self._shared.outbox.append(Emit(request.request_id, token, reason, error, request.account))

    # -- decide -------------------------------------------------------------------------------------------------

    def decide(self, now: float) -> list[Operation]:
        """The operations to carry out now, given all events so far."""
        self._run_timers(now)
        if self._feasibility_stale and self._policy == "feasible":
            self._sort_feasible(now)
        while self._lookups and len(self._looking_up) < self.config.lookup_window:
            request = self._lookups.popleft()
            if request.state is State.LOOKUP:
                op_id = self._shared.next_op()
                self._looking_up[op_id] = request
                keys = request.chain.keys[: self._hittable(request)]
                self._shared.outbox.append(Lookup(op_id, request.request_id, keys, self.config.lookup_timeout_s))
        self._admit(now)
        self._prefetch_unadmitted(now)
        self._loading.dispatch_fetches(now)
        self._loading.dispatch_uploads(now)
        for request in self._batching.dispatch(now):
            self._relabel(request, now)
        self._saving.dispatch()
        operations, self._shared.outbox = self._shared.outbox, []
        return operations

    def _run_timers(self, now: float) -> None:
        while self._timers and self._timers[0][0] <= now:
            _, sequence, kind, request_id = heapq.heappop(self._timers)
            request = self._requests.get(request_id)
            if request is None or request.sequence != sequence:
                continue
            if kind == "age" and request.account.first_token_s is not None:
                continue
            if kind == "timeout":
                self._finish(request, "timeout", f"no end after {self.config.request_timeout_s:g} s", now)
            elif self.config.mode == "penstock":
                request.tier = AGED
                if request.state is not State.LOOKUP:
                    self._set_rank(request, now)

    def next_wakeup_s(self) -> float | None:
        """When `decide` should be called although nothing happened; None: not before the next event."""
        return self._timers[0][0] if self._timers else None

    # -- views --------------------------------------------------------------------------------------------------

    @property
    def counters(self) -> dict[str, int]:
        """Counts since start, by name."""
        return self._shared.counters

    def gauges(self) -> dict[str, float]:
        """How things stand: requests by state, pages, slots, in-flight operations by link."""
        shared = self._shared
        found: dict[str, float] = {
            "requests_waiting": len(self._requests) - len(self._admitted),
            "requests_prefill": self._prefills,
            "requests_decoding": self._batching.decoding,
            "l1_pages_total": shared.l1.total,
            "l1_pages_available": shared.l1.available,
            "l1_pages_cached": shared.l1.cached,
            "l2_slots_total": shared.l2.total,
            "l2_slots_loads": shared.l2.loads,
            "l2_slots_saves": shared.l2.saves,
            "saves_queued": len(self._saving),
            "predicted_load_error": self.cost.load_error.mean,
            "predicted_compute_error": self.cost.compute_error.mean,
        }
        return found

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
        return len(self._admitted)

    @property
    def idle(self) -> bool:
        """No request, save or transfer is left."""
        return not (self._requests or len(self._saving) or self._loading.loads or self._batching.busy)

    def check_work_conserving(self) -> None:
        """Right after `decide`: no link is idle while an admitted request has a block for it and L2 has a slot."""
        self._loading.check_work_conserving()

    def check_integrity(self) -> None:
        """Assert the invariants S1 to S5 of this class and those of its parts. O(everything); for tests."""
        shared = self._shared
        private: list[int] = list(self._loading.reserved_pages())
        reserved = set(private)
        for request in self._requests.values():
            assert request.state is not State.DONE, "S1: an ended request is still known"
            assert (request in self._admitted) == (request.state in (State.PREFILL, State.DECODE)), "S1"
            assert (request in self._waiting) == (request.state is State.WAITING), "S1"
            assert request.promise >= 0
            for index, page in enumerate(request.pages):
                if page == NO_PAGE:
                    assert not request.ready[index], "S3: a block without a page is ready"
                elif not shared.l1.is_cached(page) and page not in reserved:
                    private.append(page)
                if index in request.loads:
                    assert not request.ready[index], "S3: a block is ready before it arrived"
        assert len(set(private)) == len(private), "S2: a private page has two owners"
        shared.l1.check_integrity(set(private))
        shared.l2.check_integrity(self._loading.slots_in_use() + self._saving.slots_in_use())
        assert shared.promised == sum(request.promise for request in self._admitted), "S4"
        assert self._prefills == sum(request.state is State.PREFILL for request in self._admitted)
        assert len(self._admitted) <= self.config.max_running, "S5"
        self._loading.check_integrity()
        self._batching.check_integrity()
