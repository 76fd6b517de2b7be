"""The two loading stages: which block is fetched next on each route (L3 -> L2), which are uploaded next (L2 -> L1).

One dispatcher per stage and link; each issues while a block of the request of least rank is ready below and its
destination is allocated, and goes on to the next request that can use the link when the first cannot (CALVO,
mechanism). Issuing a fetch takes the L1 page at once (proactive); when L1 is short the page is taken at upload.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from penstock.core.handing import Handing
from penstock.core.keys import BlockKey
from penstock.core.operations import BlockHit, Drop, Fetch, Route, Upload
from penstock.core.ordering import Rank, RankedQueue
from penstock.core.request import NO_PAGE, BlockLoad, LoadState, Request, State
from penstock.core.shared_state import SharedState


class _LinkUse:
    """What is in flight on one link, and when it last finished something."""

    __slots__ = ("in_flight", "last_done_s")

    def __init__(self) -> None:
        self.in_flight = 0
        self.last_done_s = 0.0

    def finished(self, issued_s: float, now: float) -> float:
        """One operation ended; returns for how long it alone kept the link busy."""
        self.in_flight -= 1
        busy_s = now - max(issued_s, self.last_done_s)
        self.last_done_s = now
        return busy_s


class Loading:
    """Loads by key, shared by all requests that wait for them. `changed(request, now)` is called whenever a block of a
    request moved, so that its rank, label and readiness for compute follow."""

    def __init__(
        self, shared: SharedState, changed: Callable[[Request, float], None], handing: Handing | None = None
    ) -> None:
        self._shared = shared
        self._handing = handing
        self._changed = changed
        self.loads: dict[BlockKey, BlockLoad] = {}
        self._fetching: dict[int, BlockLoad] = {}
        self._uploading: dict[int, tuple[tuple[BlockLoad, ...], float]] = {}
        self._links: dict[str, _LinkUse] = {}
        self._upload_link = _LinkUse()
        self._admitted: dict[Route, RankedQueue[Request]] = {}
        self._reactive: dict[Route, RankedQueue[Request]] = {}
        self._reactive_slots = 0
        self._uploads: RankedQueue[Request] = RankedQueue()

    # -- joining and leaving ------------------------------------------------------------------------------------

    def join(self, request: Request, index: int, hit: BlockHit) -> None:
        """`request` waits for its block `index`, sharing the load when the block is on its way already."""
        key = request.key_at(index)
        load = self.loads.get(key)
        if load is None:
            load = self.loads[key] = BlockLoad(key, request.chain.parent_of(index), hit)
        elif load.waiters:
            self._shared.count("loads_shared")
        load.waiters[request] = index
        request.loads[index] = load
        request.load_counts[load.state] += 1
        if load.state is LoadState.WANTED:
            request.wanted.setdefault(load.hit.route, deque()).append(load)
        elif load.state is LoadState.STAGED:
            request.staged.append(load)
            self._hand_over(request, index, load)

    def _hand_over(self, request: Request, index: int, load: BlockLoad) -> None:
        if self._handing is not None and request.spec.hand_off is not None:
            self._handing.staged(request, index, load)

    def enqueue(self, request: Request) -> None:
        """Offer the request's wanted and staged blocks to the dispatchers."""
        queues = self._admitted if request.state is State.PREFILL else self._reactive
        for route in request.wanted:
            queue = queues.setdefault(route, RankedQueue())
            queue.push(request)
            if queue not in request.queues:
                request.queues.append(queue)
        if request.state is State.PREFILL:
            for queue in self._reactive.values():
                queue.discard(request)
            for index, load in request.loads.items():
                self._not_reactive(load)
                if load.state is LoadState.UPLOADING and load.page is not None:
                    request.pages[index] = load.page
            if request.staged:
                self._offer_upload(request)

    def _offer_upload(self, request: Request) -> None:
        self._uploads.push(request)
        if self._uploads not in request.queues:
            request.queues.append(self._uploads)

    def leave(self, request: Request) -> None:
        """The request does not wait any more. What nobody waits for is dropped, unless a transfer is under way."""
        for load in list(request.loads.values()):
            del load.waiters[request]
            self._release_if_unwanted(load)
        request.loads, request.wanted, request.staged = {}, {}, deque()
        request.load_counts = dict.fromkeys(LoadState, 0)
        for queue in request.queues:
            queue.discard(request)
        request.queues = []

    def forgo(self, request: Request, index: int) -> None:
        """The request does not wait for its block `index` any more."""
        load = request.loads.pop(index)
        del load.waiters[request]
        request.load_counts[load.state] -= 1
        request.upload_bytes -= load.hit.size_bytes
        if load.state in (LoadState.WANTED, LoadState.FETCHING):
            route = load.hit.route
            request.bytes_by_route[route] = request.bytes_by_route.get(route, 0) - load.hit.size_bytes
        if load in request.staged:
            request.staged.remove(load)
        self._release_if_unwanted(load)

    def _release_if_unwanted(self, load: BlockLoad) -> None:
        """After a waiter left: nobody may need the load any more, or only requests that are not admitted."""
        if load.state is LoadState.UPLOADING or any(waiter.state is State.PREFILL for waiter in load.waiters):
            return
        if load.page is not None:
            self._shared.l1.give_back(load.page)
            load.page = None
        if load.slot is not None and not load.reactive:
            load.reactive = True
            self._reactive_slots += 1
        if load.state is LoadState.STAGED:
            self._bound_reactive(load)
        if not load.waiters and load.state is not LoadState.FETCHING:
            if load.state is LoadState.STAGED:
                self._drop_staged(load)
            del self.loads[load.key]

    def _bound_reactive(self, load: BlockLoad) -> None:
        """A staged block beyond the share of reactive loads gives its slot back and is wanted again."""
        if not load.reactive or not load.waiters or self._reactive_slots <= self._shared.l2.reactive_limit:
            return
        self._drop_staged(load)
        self._want_again(load, load.hit)

    def _want_again(self, load: BlockLoad, hit: BlockHit) -> None:
        """The load is to be fetched after all, over the route of `hit`."""
        size, old, route = load.hit.size_bytes, load.hit.route, hit.route
        counted = load.state in (LoadState.WANTED, LoadState.FETCHING)
        self._move(load, LoadState.WANTED)
        load.hit = hit
        for waiter in load.waiters:
            if load in waiter.staged:
                waiter.staged.remove(load)
            if load in waiter.wanted.get(old, ()):
                waiter.wanted[old].remove(load)
            if counted:
                waiter.bytes_by_route[old] = waiter.bytes_by_route.get(old, 0) - size
            waiter.bytes_by_route[route] = waiter.bytes_by_route.get(route, 0) + size
            waiter.wanted.setdefault(route, deque()).append(load)
            queues = self._admitted if waiter.state is State.PREFILL else self._reactive
            queue = queues.setdefault(route, RankedQueue())
            queue.push(waiter)
            if queue not in waiter.queues:
                waiter.queues.append(queue)

    def reroute(self, request: Request, away_from: Callable[[Route], bool]) -> None:
        """Fetch what has not begun over such a route on the request's other side, where that can read it."""
        for index, load in request.loads.items():
            if load.state is LoadState.WANTED and away_from(load.hit.route) and index in request.alternates:
                self._want_again(load, request.alternates.pop(index))
                self._shared.count("rerouted_blocks")

    def _other_side(self, load: BlockLoad, error: str) -> bool:
        """A fetch failed: have the block fetched on the other side of a request that waits for it, if there is one."""
        hit = next((w.alternates.pop(i) for w, i in load.waiters.items() if i in w.alternates), None)
        if hit is None:
            return False
        for waiter in load.waiters:
            failures = waiter.account.load_failures
            failures[error] = failures.get(error, 0) + 1
        self._free_slot(load)
        self._want_again(load, hit)
        self._shared.count("rerouted_blocks")
        return True

    def _drop_staged(self, load: BlockLoad) -> None:
        load.kept = True  # the body holds its content until it is told
        self._free_slot(load)

    def _free_slot(self, load: BlockLoad) -> None:
        assert load.slot is not None
        if self._handing is not None and self._handing.keeps(load.slot):
            self._handing.adopt(load.slot)
        else:
            if load.kept:
                self._shared.outbox.append(Drop(load.slot))
            self._shared.l2.free_load(load.slot)
        load.slot, load.kept = None, False
        self._not_reactive(load)

    def _not_reactive(self, load: BlockLoad) -> None:
        """The load's slot no longer counts against the share of reactive loads."""
        if load.reactive:
            load.reactive = False
            self._reactive_slots -= 1

    def _move(self, load: BlockLoad, state: LoadState) -> None:
        for waiter in load.waiters:
            waiter.load_counts[load.state] -= 1
            waiter.load_counts[state] += 1
        load.state = state

    # -- fetch --------------------------------------------------------------------------------------------------

    def dispatch_fetches(self, now: float) -> None:
        """Issue fetches while links and L2 have room; admitted requests before reactive ones. Where routes share a
        link, the request of least rank goes first, and of its routes the one with the least in flight: so all devices
        behind that link are read at once."""
        for queues, reactive in ((self._admitted, False), (self._reactive, True)):
            while (found := self._next_fetch(queues, reactive)) is not None:
                load, request = found
                self._issue_fetch(load, request, reactive, now)

    def _next_fetch(
        self, queues: dict[Route, RankedQueue[Request]], reactive: bool
    ) -> tuple[BlockLoad, Request] | None:
        best: tuple[Rank, int] | None = None
        chosen: tuple[Route, Request] | None = None
        for route, queue in queues.items():
            if not len(queue) or not self._has_room(route, reactive):
                continue
            request = self._first_wanting(queue, route)
            if request is not None:
                key = request.rank, self._link(route[0]).in_flight
                if best is None or key < best:
                    best, chosen = key, (route, request)
        if chosen is None:
            return None
        route, request = chosen
        return request.wanted[route].popleft(), request

    def _first_wanting(self, queue: RankedQueue[Request], route: Route) -> Request | None:
        """The request of least rank with a block to fetch over the route: the first that it wants there."""
        while (request := queue.peek()) is not None:
            wanted = request.wanted.get(route)
            while wanted:
                if wanted[0].state is LoadState.WANTED and request in wanted[0].waiters:
                    return request
                wanted.popleft()
            queue.discard(request)
        return None

    def _has_room(self, route: Route, reactive: bool) -> bool:
        shared = self._shared
        if shared.l2.free_for_loads <= 0 or (reactive and self._reactive_slots >= shared.l2.reactive_limit):
            return False
        window = shared.config.fetch_window_blocks
        return all(self._link(name).in_flight < window for name in route)

    def _link(self, name: str) -> _LinkUse:
        use = self._links.get(name)
        if use is None:
            use = self._links[name] = _LinkUse()
        return use

    def _issue_fetch(self, load: BlockLoad, request: Request, reactive: bool, now: float) -> None:
        shared = self._shared
        load.slot = shared.l2.take_for_load()
        load.issued_s = now
        if reactive:
            load.reactive = True
            self._reactive_slots += 1
        elif shared.config.mode == "penstock" and load.page is None:
            self._reserve_page(load, shared.l1.take())
        self._move(load, LoadState.FETCHING)
        for name in load.hit.route:
            self._link(name).in_flight += 1
        op_id = shared.next_op()
        self._fetching[op_id] = load
        timeout_s = shared.config.fetch_timeout_s
        shared.outbox.append(Fetch(op_id, load.key, load.slot, load.hit.route, timeout_s))
        for waiter in load.waiters:
            self._changed(waiter, now)

    def _reserve_page(self, load: BlockLoad, page: int | None) -> None:
        if page is None:
            self._shared.count("reactive_allocations")
            return
        load.page = page
        for waiter in load.waiters:
            self._shared.keep_promise(waiter)

    def fetched(self, op_id: int, error: str | None, now: float) -> None:
        """A fetch ended: the block is in its slot, or `error` names why not."""
        load = self._fetching.pop(op_id)
        shared = self._shared
        busy_s = 0.0
        for name in load.hit.route:
            link_s = self._link(name).finished(load.issued_s, now)
            busy_s = max(busy_s, link_s)
            if error is None:
                shared.cost.link(name).observe(load.hit.size_bytes, link_s)
        if error is not None:
            shared.count("fetch_failures")
            if not self._other_side(load, error):
                self._load_failed(load, error, now)
            return
        shared.count("fetched_blocks")
        shared.count("fetched_bytes", load.hit.size_bytes)
        if not load.waiters:
            self._move(load, LoadState.STAGED)
            self._release_if_unwanted(load)
            return
        self._move(load, LoadState.STAGED)
        for waiter, index in list(load.waiters.items()):
            self._hand_over(waiter, index, load)
            account = waiter.account
            account.loaded_bytes += load.hit.size_bytes
            account.measured_fetch_s += busy_s
            route = load.hit.route
            waiter.bytes_by_route[route] = waiter.bytes_by_route.get(route, 0) - load.hit.size_bytes
            waiter.staged.append(load)
            if waiter.state is State.PREFILL:
                self._offer_upload(waiter)
            self._changed(waiter, now)
        self._bound_reactive(load)

    def _load_failed(self, load: BlockLoad, error: str, now: float) -> None:
        """The block becomes a miss for everybody who waits for it: its tokens are recomputed."""
        shared = self._shared
        del self.loads[load.key]
        self._free_slot(load)
        size = load.hit.size_bytes
        for waiter, index in load.waiters.items():
            del waiter.loads[index]
            waiter.hits.pop(index, None)
            waiter.load_counts[load.state] -= 1
            waiter.upload_bytes -= size
            if load.state is LoadState.FETCHING:
                route = load.hit.route
                waiter.bytes_by_route[route] = waiter.bytes_by_route.get(route, 0) - size
            failures = waiter.account.load_failures
            failures[error] = failures.get(error, 0) + 1
            waiter.account.recomputed_tokens += shared.config.block_tokens
            if waiter.state is State.PREFILL:
                waiter.pages[index] = NO_PAGE
                waiter.position = min(waiter.position, index * shared.config.block_tokens)
                shared.promise(waiter, 1 if load.page is not None else 0)
        if load.page is not None:
            shared.l1.give_back(load.page)
        for waiter in load.waiters:
            self._changed(waiter, now)

    # -- upload -------------------------------------------------------------------------------------------------

    def dispatch_uploads(self, now: float) -> None:
        """Issue uploads while the window has room: staged blocks of the request of least rank, in groups."""
        shared = self._shared
        while self._upload_link.in_flight < shared.config.upload_window_groups:
            request = self._uploads.peek()
            if request is None:
                return
            if shared.config.mode == "coupled" and not self._may_upload_coupled(request):
                return
            group = self._take_group(request, now)
            if group:
                self._issue_upload(group, request, now)
            elif request.staged:
                return  # no page for the request of least rank; wait until one is free
            else:
                self._uploads.discard(request)

    def _may_upload_coupled(self, request: Request) -> bool:
        """The baseline uploads when the whole batch is staged (or nothing more fits into L2)."""
        counts = request.load_counts
        if counts[LoadState.FETCHING]:
            return False
        return not counts[LoadState.WANTED] or self._shared.l2.free_for_loads <= 0

    def _take_group(self, request: Request, now: float) -> list[BlockLoad]:
        shared = self._shared
        counts = request.load_counts
        all_staged = not counts[LoadState.WANTED] and not counts[LoadState.FETCHING]
        limit = shared.config.upload_group_blocks
        if shared.config.layerwise and all_staged:
            limit = max(limit, len(request.staged))
        group: list[BlockLoad] = []
        while request.staged and len(group) < limit:
            load = request.staged[0]
            if load.state is not LoadState.STAGED or request not in load.waiters:
                request.staged.popleft()
                continue
            if load.page is None:
                page = shared.page_for(request, now)
                if page is None:
                    break
                self._reserve_page(load, page)
            group.append(request.staged.popleft())
        return group

    def _issue_upload(self, group: list[BlockLoad], request: Request, now: float) -> None:
        shared = self._shared
        op_id = shared.next_op()
        blocks = []
        kept = set()
        changed: dict[Request, None] = {}
        for load in group:
            assert load.slot is not None and load.page is not None
            blocks.append((load.slot, load.page))
            if self._handing is not None and self._handing.keeps(load.slot):
                load.kept = True
                kept.add(load.slot)
            load.upload_op = op_id
            self._move(load, LoadState.UPLOADING)
            for waiter, index in load.waiters.items():
                if waiter.state is State.PREFILL:
                    waiter.pages[index] = load.page
                changed[waiter] = None
        self._upload_link.in_flight += 1
        self._uploading[op_id] = (tuple(group), now)
        shared.outbox.append(Upload(op_id, tuple(blocks), frozenset(kept)))
        for waiter in changed:
            self._changed(waiter, now)

    def uploaded(self, op_id: int, now: float) -> None:
        """An upload ended: its blocks are in L1, cached for everybody."""
        shared = self._shared
        group, issued_s = self._uploading.pop(op_id)
        busy_s = self._upload_link.finished(issued_s, now)
        shared.cost.upload.observe(sum(load.hit.size_bytes for load in group), busy_s)
        changed: dict[Request, None] = {}
        for load in group:
            self._arrive(load)
            changed.update(dict.fromkeys(load.waiters))
        for waiter in changed:
            waiter.account.measured_upload_s += busy_s
            self._changed(waiter, now)

    def upload_failed(self, op_id: int, error: str, now: float) -> None:
        """An upload came to nothing: its blocks are misses."""
        group, issued_s = self._uploading.pop(op_id)
        self._upload_link.finished(issued_s, now)
        self._shared.count("upload_failures")
        for load in group:
            self._load_failed(load, error, now)

    def _arrive(self, load: BlockLoad) -> None:
        shared = self._shared
        l1, page = shared.l1, load.page
        assert page is not None
        del self.loads[load.key]
        self._free_slot(load)
        users = [(waiter, index) for waiter, index in load.waiters.items() if waiter.state is State.PREFILL]
        l1.insert(load.key, load.parent, page, pins=len(users))  # nobody caches a block that is being loaded
        for waiter, index in load.waiters.items():
            del waiter.loads[index]
            waiter.load_counts[LoadState.UPLOADING] -= 1
            waiter.upload_bytes -= load.hit.size_bytes
        for waiter, index in users:
            waiter.ready[index] = True
            waiter.count_cached(shared.config.block_tokens)
            if self._handing is not None:
                self._handing.in_l1(waiter, index)

    # -- for integrity and views --------------------------------------------------------------------------------

    def slots_in_use(self) -> list[int]:
        return [load.slot for load in self.loads.values() if load.slot is not None]

    def reserved_pages(self) -> set[int]:
        """Private pages that loads hold."""
        return {load.page for load in self.loads.values() if load.page is not None}

    def in_flight(self) -> dict[str, int]:
        """Operations in flight by link."""
        return {name: use.in_flight for name, use in self._links.items()} | {"upload": self._upload_link.in_flight}

    def check_work_conserving(self) -> None:
        """No route with room has a wanted block of an admitted request, and while the upload window has room no staged
        block of the request that goes up next has a page."""
        wanted = {
            load.hit.route
            for load in self.loads.values()
            if load.state is LoadState.WANTED and any(waiter.state is State.PREFILL for waiter in load.waiters)
        }
        for route in wanted:
            assert not self._has_room(route, False), f"{route} is idle although a block waits for it"
        request = self._uploads.peek()
        if request is None or self._upload_link.in_flight >= self._shared.config.upload_window_groups:
            return
        if self._shared.config.mode == "penstock" or self._may_upload_coupled(request):
            mine = [load for load in request.staged if load.state is LoadState.STAGED and request in load.waiters]
            assert all(load.page is None for load in mine[:1]), "upload is idle although a block waits for it"

    def check_integrity(self) -> None:
        """A load is under its key, holds a slot exactly from FETCHING on, and is waited for or in flight; waiters and
        loads agree; windows and the reactive share are kept."""
        fetching = list(self._fetching.values())
        uploading = [load for group, _ in self._uploading.values() for load in group]
        for key, load in self.loads.items():
            assert load.key == key
            assert (load.slot is not None) == (load.state is not LoadState.WANTED), "a slot out of turn"
            assert (load in fetching) == (load.state is LoadState.FETCHING)
            assert (load in uploading) == (load.state is LoadState.UPLOADING)
            assert load.state is not LoadState.UPLOADING or load.page is not None
            for waiter, index in load.waiters.items():
                assert waiter.loads.get(index) is load and waiter.key_at(index) == key
            assert load.waiters or load.state in (LoadState.FETCHING, LoadState.UPLOADING), "nobody waits for a load"
        window = self._shared.config.fetch_window_blocks
        assert all(0 <= use.in_flight <= window for use in self._links.values())
        assert 0 <= self._upload_link.in_flight <= self._shared.config.upload_window_groups
        assert self._reactive_slots == sum(load.reactive for load in self.loads.values())
