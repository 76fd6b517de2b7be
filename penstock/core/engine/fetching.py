"""The fetching stage (L3 -> L2): which block is read next on which route.

One dispatcher per route. While L2 has a slot it issues what the request of least rank wants there, a span at a time
(`core.spans`); when that request cannot use the route, it goes on to the next one (CALVO, mechanism). Issuing a fetch
takes the L1 page at once (proactive)."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from itertools import islice

from penstock.core.bandwidth import LinkUse
from penstock.core.engine.load_table import LoadTable
from penstock.core.engine.request import Request, State
from penstock.core.engine.request_loads import BlockLoad, LoadState
from penstock.core.engine.shared_state import SharedState
from penstock.core.operations import Fetch, Route
from penstock.core.ordering import Rank, RankedQueue
from penstock.core.spans import span_blocks

LINKS_IDLE_MAX = 256  # idle links that are remembered
LINK_FORGET_S = 600.0  # an idle link unused for longer is forgotten when a new one is used
QUEUES_MAX = 64  # including empty ones


class Fetching:
    """Queues of requests by route, admitted ones apart from reactive ones, and what is in flight on each link."""

    def __init__(self, shared: SharedState, loads: LoadTable, changed: Callable[[Request, float], None]) -> None:
        self._shared = shared
        self._loads = loads
        self._changed = changed
        self._admitted: dict[Route, RankedQueue[Request]] = {}
        self._reactive: dict[Route, RankedQueue[Request]] = {}
        self._links: dict[str, LinkUse] = {}
        self._in_flight: dict[int, BlockLoad] = {}
        self._span_blocks = span_blocks(shared.config.fetch_window_blocks, shared.config.block_bytes)
        self._now = 0.0

    def offer(self, request: Request, route: Route) -> None:
        """The request wants a block over the route."""
        queues = self._admitted if request.state is State.PREFILL else self._reactive
        queue = queues.setdefault(route, RankedQueue())
        queue.push(request)
        request.queues[queue] = None

    def not_reactive(self, request: Request) -> None:
        """The request was admitted: its fetches no longer count as reactive."""
        for queue in self._reactive.values():
            queue.discard(request)

    def dispatch(self, now: float) -> None:
        """Issue fetches while links and L2 have room; admitted requests before reactive ones. Where routes share a
        link, the request of least rank goes first, and of its routes the one with the least in flight: so all devices
        behind that link are read at once."""
        self._now = now
        for queues, reactive in ((self._admitted, False), (self._reactive, True)):
            if len(queues) > QUEUES_MAX:  # nodes and decode engines come and go
                for route in [route for route, queue in queues.items() if not len(queue)]:
                    del queues[route]
            self._dispatch(queues, reactive, now)

    def _dispatch(self, queues: dict[Route, RankedQueue[Request]], reactive: bool, now: float) -> None:
        """Issue spans: the route of least (rank, in flight) first. Ranks do not change meanwhile, and what is in flight
        only grows; so a route whose turn comes is placed anew only if spans were issued since it was placed."""
        turns: list[tuple[Rank, int, int, int, Route, Request]] = []
        for number, (route, queue) in enumerate(queues.items()):
            if len(queue) and (request := self._due(queue, route, reactive)) is not None:
                turns.append((request.rank, self._link(route[0]).in_flight, number, 0, route, request))
        heapq.heapify(turns)
        issued = 0
        while turns:
            _, _, number, placed_at, route, request = turns[0]
            if placed_at == issued:
                self._issue_span(request, route, reactive, now)
                issued += 1
            due = self._due(queues[route], route, reactive)
            if due is None:
                heapq.heappop(turns)
            else:
                heapq.heapreplace(turns, (due.rank, self._link(route[0]).in_flight, number, issued, route, due))

    def _due(self, queue: RankedQueue[Request], route: Route, reactive: bool) -> Request | None:
        """The request whose block goes over the route next; None: nothing can be issued there."""
        return self._first_wanting(queue, route) if self._room(route, reactive) > 0 else None

    def _issue_span(self, request: Request, route: Route, reactive: bool, now: float) -> None:
        """Issue the first blocks that the request wants on the route, as far as there is room."""
        at_most = min(self._span_blocks, self._room(route, reactive))
        span = list(islice(request.loads.wanted[route], at_most))
        shared = self._shared
        for name in route:
            self._link(name).in_flight += len(span)
        for load, slot in zip(span, shared.l2.take_for_loads(len(span)), strict=True):
            load.slot, load.issued_s = slot, now
            if reactive:
                self._loads.set_reactive(load)
            elif load.page is None and shared.config.mode == "penstock":
                self._loads.reserve_page(load, shared.l1.take())
            op_id = shared.next_op()
            self._in_flight[op_id] = load
            shared.outbox.append(Fetch(op_id, load.key, slot, route, shared.config.fetch_timeout_s))
        for waiter in self._loads.advance(span, LoadState.FETCHING):
            self._changed(waiter, now)

    def _first_wanting(self, queue: RankedQueue[Request], route: Route) -> Request | None:
        """The request of least rank with a block to fetch over the route: the first that it wants there."""
        while (request := queue.peek()) is not None:
            if request.loads.wanted.get(route):
                return request
            queue.discard(request)
        return None

    def _room(self, route: Route, reactive: bool) -> int:
        """How many blocks may be issued on the route now."""
        l2 = self._shared.l2
        room = l2.free_for_loads
        if reactive:
            room = min(room, l2.reactive_limit - self._loads.reactive_slots)
        if room <= 0:
            return room
        window = self._shared.config.fetch_window_blocks
        for name in route:
            if (use := self._links.get(name)) is not None:
                room = min(room, window - use.in_flight)
        return min(room, window)

    def _link(self, name: str) -> LinkUse:
        use = self._links.get(name)
        if use is None:
            self._forget_links()
            use = self._links[name] = LinkUse()
        return use

    def _forget_links(self) -> None:
        """Forget idle links and their measured cost: a node or decode engine that restarts has another address. A
        forgotten link that is used again is measured anew."""
        idle = sorted((use.last_done_s, name) for name, use in self._links.items() if not use.in_flight)
        spare = len(idle) - LINKS_IDLE_MAX
        for number, (last_done_s, name) in enumerate(idle):
            if number < spare or (self._now - last_done_s > LINK_FORGET_S and last_done_s):
                del self._links[name]
                self._shared.cost.forget(name)

    def ended(self, op_ids: Sequence[int], failed: int, now: float) -> tuple[list[BlockLoad], float]:
        """Fetches on one route ended together, `failed` of them without their block: their loads, and how many seconds
        they kept their slowest link busy."""
        loads = [self._in_flight.pop(op_id) for op_id in op_ids]
        first = loads[0]
        arrived_bytes = first.hit.size_bytes * (len(loads) - failed)
        busy_s = 0.0
        for name in first.hit.route:
            link_s = self._link(name).finished(first.issued_s, now, len(loads))
            busy_s = max(busy_s, link_s)
            if arrived_bytes:
                self._shared.cost.link(name).observe(arrived_bytes, link_s)
        return loads, busy_s

    def loads_in_flight(self) -> set[BlockLoad]:
        """Blocks whose read has begun and not ended."""
        return set(self._in_flight.values())

    def in_flight(self) -> dict[str, int]:
        """Fetches in flight by link."""
        return {name: use.in_flight for name, use in self._links.items()}

    def check_work_conserving(self) -> None:
        """No route with room has a wanted block of an admitted request."""
        wanted = {
            load.hit.route
            for load in self._loads.by_key.values()
            if load.state is LoadState.WANTED and any(waiter.state is State.PREFILL for waiter in load.waiters)
        }
        for route in wanted:
            assert self._room(route, False) <= 0, f"{route} is idle although a block waits for it"

    def check_integrity(self) -> None:
        """Assert that no window is exceeded."""
        window = self._shared.config.fetch_window_blocks
        assert all(0 <= use.in_flight <= window for use in self._links.values())
