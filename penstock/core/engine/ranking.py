"""The rank of requests: what each has to load and to compute, the policy's key, and deferral (`feasible`)."""

from __future__ import annotations

from collections.abc import Iterable
from heapq import nsmallest

from penstock.core.engine.feasibility import Job, tardy_jobs
from penstock.core.engine.request import Request, State
from penstock.core.engine.shared_state import SharedState
from penstock.core.ordering import AGED, DEFERRED, ORDINARY, policy_key

FEASIBILITY_HORIZON = 128  # requests of earliest deadline that `feasible` looks at
FEASIBILITY_SHARE = 8  # with many requests it looks once in as many decisions as this share of them
FEASIBILITY_OFTEN = 32  # up to so many requests it looks at every decision that may matter


class Ranking:
    """Updates the `rank` of each request as its costs change, and its place in the queues."""

    def __init__(self, shared: SharedState) -> None:
        self._shared = shared
        self.policy = "fcfs" if shared.config.mode == "coupled" else shared.config.policy
        self.version = 0  # how often a rank changed
        self.stale = False  # a request came, got its first token or ended since `sort_feasible`
        self._pause = 0  # decisions until `sort_feasible` looks again

    def estimate(self, request: Request) -> None:
        """What is to be loaded and computed, by the present content of L1 and the hits."""
        config, l1 = self._shared.config, self._shared.l1
        by_route: dict[tuple[str, ...], int] = {}
        cached = 0
        for index in range(request.hittable_blocks):
            if request.key_at(index) in l1:
                cached += 1
            elif hit := request.hits.get(index):
                cached += 1
                by_route[hit.route] = by_route.get(hit.route, 0) + config.block_bytes
        request.loads.estimate(by_route)
        context = cached * config.block_tokens
        request.recompute_prefix_s = 0.0
        request.compute_s = self._shared.cost.compute.seconds([(request.target - context, context)])
        self._shared.revalued(request)

    def count_loads(self, request: Request) -> None:
        """What is still to fetch and to upload, block by block."""
        request.loads.count()
        self._shared.revalued(request)

    def load_s(self, request: Request) -> float:
        """T_load of what remains."""
        serial = self._shared.config.mode == "coupled"
        return self._shared.cost.load_s(request.loads.bytes_by_route, request.loads.upload_bytes, serial)

    def set_rank(self, request: Request) -> None:
        """Rank the request by its present costs, and update its place in the queues."""
        load_s = self.load_s(request)
        if request.static_key is None:
            request.static_key = policy_key(
                self.policy, request.arrival_s, request.deadline_s, load_s, request.compute_s
            )
        if request.tier == AGED:
            key = request.arrival_s
        elif self.policy == "srpt" or request.tier == DEFERRED:
            key = load_s + request.compute_s
        else:
            key = request.static_key
        rank = (request.tier, key, request.sequence)
        if rank != request.rank:
            request.rank = rank
            self.version += 1
            self._shared.revalued(request)
            for queue in request.queues:
                if request in queue:
                    queue.push(request)

    def age(self, request: Request) -> None:
        """The request goes before all that have not aged, until its first token."""
        if request.account.first_token_s is None and request.tier != AGED:
            request.tier = AGED
            if request.state is not State.LOOKUP:
                self.set_rank(request)

    def progressed(self, request: Request) -> None:
        """Some of the request's load or compute is done; its rank follows where the policy looks at what remains."""
        if request.tier != AGED and (self.policy == "srpt" or request.tier == DEFERRED):
            self.set_rank(request)

    def sort_feasible(self, requests: Iterable[Request], now: float) -> None:
        """Defer requests that would make several others miss their deadlines. The earliest deadlines are considered
        first. Runs less often as the queue grows, to bound the cost per decision."""
        if not self.stale or self.policy != "feasible":
            return
        self._pause -= 1
        if self._pause > 0:
            return
        self.stale = False
        waiting = [r for r in requests if r.state in (State.WAITING, State.PREFILL) and r.tier != AGED]
        self._pause = len(waiting) // FEASIBILITY_SHARE if len(waiting) > FEASIBILITY_OFTEN else 0
        waiting = nsmallest(FEASIBILITY_HORIZON, waiting, key=lambda request: request.deadline_s)
        late = tardy_jobs([Job(request.deadline_s, self._stage_s(request)) for request in waiting], now)
        for index, request in enumerate(waiting):
            tier = DEFERRED if index in late else ORDINARY
            if tier != request.tier:
                request.tier = tier
                self.set_rank(request)
                request.waiting_rank = request.rank

    def _stage_s(self, request: Request) -> tuple[float, float, float]:
        """Seconds that remain on fetch, upload and compute."""
        cost = self._shared.cost
        fetch_s = cost.load_s(request.loads.bytes_by_route, 0, serial=False)
        return fetch_s, cost.upload.seconds(request.loads.upload_bytes), request.compute_s + request.recompute_prefix_s
