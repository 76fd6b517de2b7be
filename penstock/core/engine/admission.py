"""Admission: which requests may take pages of L1, by rank, so that every admitted one can finish its prefill."""

from __future__ import annotations

import math
from collections.abc import Callable

from penstock.core.engine.kv_handoff import KVHandoff
from penstock.core.engine.load_coordinator import LoadCoordinator
from penstock.core.engine.ranking import Ranking
from penstock.core.engine.recompute_prefix import prefix_to_compute
from penstock.core.engine.request import Request, State
from penstock.core.engine.request_loads import LoadState
from penstock.core.engine.shared_state import SharedState
from penstock.core.ordering import RankedQueue

LOOKAHEAD = 8  # requests looked at behind one that does not fit


class Admission:
    """Requests that wait, and those admitted (in PREFILL or DECODE). `blocked`: no waiting request fits; cleared when
    something changes or L1 has more room. `changed(request, now)` is called after each admission, and
    `back_to_waiting(request, now)` when one is revoked."""

    def __init__(
        self,
        shared: SharedState,
        loading: LoadCoordinator,
        handoff: KVHandoff,
        ranking: Ranking,
        changed: Callable[[Request, float], None],
        back_to_waiting: Callable[[Request, float], None],
    ) -> None:
        self._shared = shared
        self._loading = loading
        self._handoff = handoff
        self._ranking = ranking
        self._changed = changed
        self._back_to_waiting = back_to_waiting
        self.waiting: RankedQueue[Request] = RankedQueue()
        self.admitted: dict[Request, None] = {}
        self.prefills = 0
        self.blocked = False
        self._room_pages = 0  # when admission came to a stop
        self._prefetched = -1  # `waiting.changes` when it was looked at for requests that may fetch meanwhile
        self._held_up: Request | None = None  # the aged request that does not fit into L1
        self._passers: dict[Request, int] = {}  # requests admitted before it since then, and their pages
        self._passed_pages = 0  # of all of them

    def enqueue(self, request: Request) -> None:
        """The request waits for admission from now on."""
        request.state = State.WAITING
        self.waiting.push(request)
        request.queues[self.waiting] = None
        self.blocked = False

    def left(self, request: Request) -> None:
        """The request neither waits nor is admitted any more."""
        if request.state is State.PREFILL:
            self.prefills -= 1
        self.waiting.discard(request)
        self.admitted.pop(request, None)
        self._passed_pages -= self._passers.pop(request, 0)
        if request is self._held_up:
            self._hold_up(None)
        self.blocked = False

    def admit(self, now: float) -> None:
        """Admit by rank while L1 has pages to set aside. One that does not fit lets later ones pass, unless aged."""
        config = self._shared.config
        if self.blocked and self._room() > self._room_pages:  # pages were given back, for any reason
            self.blocked = False
        while len(self.waiting) and not self.blocked and len(self.admitted) < config.max_running:
            if config.mode == "coupled" and self.prefills >= config.coupled_batch_requests:
                return
            if not self._admit_one(LOOKAHEAD if config.mode == "penstock" else 1, now):
                self._stop()

    def _admit_one(self, lookahead: int, now: float) -> bool:
        """Admit the first of so many that fits and may go; False when there is none."""
        held_up: Request | None = None
        pass_until_s = math.inf  # requests that arrived later may not pass
        for request in self.waiting.first(lookahead):
            may_go = held_up is None or (request.arrival_s <= pass_until_s and self._leaves_room(held_up, request))
            if may_go and self._try_admit(request, now):
                if held_up is not None:
                    self._passers[request] = self._pages(request)
                    self._passed_pages += self._pages(request)
                return True
            if request.aged_s is not None:
                if held_up is None:
                    self._hold_up(request)
                    held_up = request
                pass_until_s = min(pass_until_s, request.aged_s)
        return False

    def _hold_up(self, request: Request | None) -> None:
        """The request, aged, is the first in line, and L1 has no room for it."""
        if request is not self._held_up:
            self._held_up, self._passers, self._passed_pages = request, {}, 0

    def _leaves_room(self, held_up: Request, request: Request) -> bool:
        """Whether all that pass `held_up`, including `request`, leave room for it. So once an aged request is first in
        line, it waits only for requests that were admitted before."""
        pages = self._pages(request) + self._passed_pages
        return pages + -(-held_up.target // self._shared.config.block_tokens) <= self._shared.l1.total

    def _pages(self, request: Request) -> int:
        """Pages of the request with all that it may generate."""
        return -(-(len(request.spec.prompt) + request.spec.max_tokens) // self._shared.config.block_tokens)

    def _stop(self) -> None:
        """Try no waiting request again until something changes."""
        self.blocked = True
        self._room_pages = self._room()

    def _room(self) -> int:
        """Pages of L1 that are not set aside."""
        return self._shared.l1.available - self._shared.promised

    def _try_admit(self, request: Request, now: float) -> bool:
        shared = self._shared
        total = -(-request.target // shared.config.block_tokens)
        need = total - shared.l1.in_use.count(request)  # what is cached and not pinned counts as room that it takes
        if need > self._room() and not self._revoke(request, need, now):
            return False
        request.counted = None
        self.waiting.discard(request)
        request.waiting_rank = request.rank
        request.state = State.PREFILL
        if request.account.admitted_s is None:
            request.account.admitted_s = now
        self.admitted[request] = None
        self.prefills += 1
        request.loads.begin(total)
        need = total
        front = prefix_to_compute(shared, request, self.admitted, self._loading.loads)
        shared.count("computed_instead_tokens", len(front) * shared.config.block_tokens)
        for index in range(request.hittable_blocks):
            key = request.key_at(index)
            if key in shared.l1:
                request.loads.set_page(index, shared.l1.pin(key), ready=True)
                request.count_cached(self._shared.config.block_tokens)
                self._handoff.in_l1(request, index)
                need -= 1
            elif (index in request.hits and index not in front) or key in self._loading.loads:
                if index not in request.loads:
                    self._loading.join(request, index, request.hits.get(index) or self._loading.loads[key].hit)
                need -= request.loads.by_index[index].page is not None
        shared.promise(request, need)
        self._ranking.count_loads(request)
        request.recompute_prefix_s = shared.cost.compute.rebuild_s(
            len(front) * shared.config.block_tokens, front.start * shared.config.block_tokens
        )
        self._loading.enqueue(request)
        self._changed(request, now)
        return True

    def _revoke(self, request: Request, need: int, now: float) -> bool:
        """Make room for `need` pages by taking back the admission of requests of higher rank number that have taken
        nothing yet, the highest first; none of them if all of them together would not do. The rank before admission
        counts too: an admitted request's known loads may worsen its rank, and two requests could replace each other for
        ever."""
        if self._shared.config.mode == "coupled" or need > self._room() + self._shared.promised:
            return False
        candidates = [
            other
            for other in self.admitted
            if min(other.rank, other.waiting_rank) > request.rank
            and other.state is State.PREFILL
            and not other.held
            and not other.own_pages
            and other.position == 0
            and other.loads.counts[LoadState.WANTED] == len(other.loads)
        ]
        if need > self._room() + sum(other.promise for other in candidates):
            return False
        for other in sorted(candidates, key=lambda other: other.rank, reverse=True):
            if need <= self._room():
                break
            self._back_to_waiting(other, now)
        return True

    def prefetch_unadmitted(self, now: float) -> None:
        """Reactive: requests that L1 has no room for yet may fetch into a share of L2 meanwhile."""
        if self._shared.config.mode == "coupled" or not self.blocked or self.waiting.changes == self._prefetched:
            return
        self._prefetched = self.waiting.changes
        for request in self.waiting.first(2):
            if request.reactive:
                continue
            request.reactive = True
            for index, hit in request.hits.items():
                if index < request.hittable_blocks and request.key_at(index) not in self._shared.l1:
                    self._loading.join(request, index, hit)
            self._loading.enqueue(request)
