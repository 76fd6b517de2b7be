"""Loading, from L3 to L1: which request waits for which block, and what follows when it arrives, fails or is dropped.

A block is fetched and uploaded once for all requests that wait for it. The two stages, each with a dispatcher of its
own, are in `fetching.py` and `uploading.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from penstock.core.engine.fetching import Fetching
from penstock.core.engine.kv_handoff import KVHandoff
from penstock.core.engine.load_table import LoadTable
from penstock.core.engine.request import Request, State
from penstock.core.engine.request_loads import NO_PAGE, BlockLoad, LoadState
from penstock.core.engine.shared_state import SharedState
from penstock.core.engine.uploading import Uploading
from penstock.core.keys import BlockKey
from penstock.core.operations import BlockHit, Route


class LoadCoordinator:
    """`changed(request, now)` is called whenever a block of a request moved, so that its rank, label and readiness for
    compute follow; before that `lost(request, index)` for a block that became a miss."""

    def __init__(
        self,
        shared: SharedState,
        changed: Callable[[Request, float], None],
        handoff: KVHandoff | None = None,
        lost: Callable[[Request, int], None] = lambda request, index: None,
    ) -> None:
        self._shared = shared
        self._changed = changed
        self._lost = lost
        self._table = LoadTable(shared, handoff)
        self._fetching = Fetching(shared, self._table, changed)
        self._uploading = Uploading(shared, self._table, changed)
        self.loads = self._table.by_key

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
        request.loads.add(index, load)
        if load.state is LoadState.STAGED:
            self._table.hand_over(request, index, load)

    def enqueue(self, request: Request) -> None:
        """Offer the request's wanted and staged blocks to the stages."""
        for route in request.loads.wanted:
            self._fetching.offer(request, route)
        if request.state is State.PREFILL:
            self._fetching.not_reactive(request)
            for index, load in request.loads.by_index.items():
                if load.reactive:
                    self._table.not_reactive(load)
                if load.state is LoadState.UPLOADING and load.page is not None:
                    request.loads.set_page(index, load.page)
            if request.loads.staged:
                self._uploading.offer(request)

    def leave(self, request: Request) -> None:
        """The request waits for nothing any more. Loads without waiters are dropped, unless in transfer."""
        for load in request.loads.by_index.values():
            del load.waiters[request]
            self._release_if_unwanted(load)
        request.loads.clear()
        for queue in request.queues:
            queue.discard(request)
        request.queues = {}

    def forgo(self, request: Request, index: int) -> None:
        """The request does not wait for its block `index` any more."""
        load = request.loads.remove(index)
        del load.waiters[request]
        self._shared.revalued(request)
        self._release_if_unwanted(load)

    def _release_if_unwanted(self, load: BlockLoad) -> None:
        """A waiter left. Drop the load if it was the last one; free its page if no admitted request waits."""
        if load.waiters and load.page is None and load.slot is None:
            return  # it holds nothing, and a request still waits for it
        if load.state is LoadState.UPLOADING or any(waiter.state is State.PREFILL for waiter in load.waiters):
            return
        self._table.give_back_page(load)
        if load.slot is not None:
            self._table.set_reactive(load)
        if load.state is LoadState.STAGED:
            self._bound_reactive(load)
        if not load.waiters and load.state is not LoadState.FETCHING:
            if load.state is LoadState.STAGED:
                self._table.drop_staged(load)
            del self.loads[load.key]

    def _bound_reactive(self, load: BlockLoad) -> None:
        """Where reactive loads exceed their share of L2, this staged block gives its slot back and is wanted again."""
        if not load.reactive or not load.waiters or self._table.reactive_slots <= self._shared.l2.reactive_limit:
            return
        self._table.drop_staged(load)
        self._want_again(load, load.hit)

    def _want_again(self, load: BlockLoad, hit: BlockHit) -> None:
        """The load is to be fetched after all, over the route of `hit`."""
        self._table.move(load, LoadState.WANTED, hit)
        for waiter in load.waiters:
            self._fetching.offer(waiter, hit.route)

    def reroute(self, request: Request, away_from: Callable[[Route], bool]) -> None:
        """Blocks whose fetch over such a route has not begun are fetched by the other side, if it can read them."""
        for index, load in request.loads.by_index.items():
            if load.state is LoadState.WANTED and away_from(load.hit.route) and index in request.alternates:
                self._want_again(load, request.alternates.pop(index))
                self._shared.count("rerouted_blocks")

    # -- fetches ------------------------------------------------------------------------------------------------

    def dispatch_fetches(self, now: float) -> None:
        """Issue fetches while links and L2 have room."""
        self._fetching.dispatch(now)

    def fetched(self, op_ids: Sequence[int], errors: Sequence[str | None], now: float) -> None:
        """Fetches on one route ended together: each block is in its slot, or its error names why not."""
        shared = self._shared
        failed = len(errors) - errors.count(None)
        loads, busy_s = self._fetching.ended(op_ids, failed, now)
        if arrived := len(loads) - failed:
            shared.count("fetched_blocks", arrived)
            shared.count("fetched_bytes", arrived * loads[0].hit.size_bytes)
        staged = [load for load, error in zip(loads, errors, strict=True) if error is None] if failed else loads
        waiters = self._staged(staged, now) if staged else {}
        for load, error in zip(loads, errors, strict=True) if failed else ():
            if error is not None:
                shared.count("fetch_failures")
                if not self._other_side(load, error):
                    self._failed(load, error, now)
        for waiter in waiters:
            waiter.account.measured_fetch_s += busy_s
            if waiter.state is State.PREFILL:
                self._uploading.offer(waiter)
            self._changed(waiter, now)
        for load in staged:
            if load.reactive and load.state is LoadState.STAGED:
                self._bound_reactive(load)

    def _staged(self, loads: Sequence[BlockLoad], now: float) -> dict[Request, list[BlockLoad]]:
        """Blocks of one size that came over one route are in their slots; returns the requests that wait for them, each
        with its loads."""
        route, issued_s = loads[0].hit.route, loads[0].issued_s
        waiters = self._table.advance(loads, LoadState.STAGED)
        for load in loads:
            if not load.waiters:
                self._release_if_unwanted(load)
        for waiter, own in waiters.items():
            size_bytes = len(own) * loads[0].hit.size_bytes
            waiter.account.loaded_bytes += size_bytes
            waiter.account.read_over(route, size_bytes, issued_s, now)
            if waiter.spec.hand_off is not None:
                for load in own:
                    self._table.hand_over(waiter, load.waiters[waiter], load)
        return waiters

    def _other_side(self, load: BlockLoad, error: str) -> bool:
        """A fetch failed: have the block fetched on the other side of a request that waits for it, if there is one."""
        hit = next((w.alternates.pop(i) for w, i in load.waiters.items() if i in w.alternates), None)
        if hit is None:
            return False
        for waiter in load.waiters:
            failures = waiter.account.load_failures
            failures[error] = failures.get(error, 0) + 1
        self._table.free_slot(load)
        self._want_again(load, hit)
        self._shared.count("rerouted_blocks")
        return True

    def _failed(self, load: BlockLoad, error: str, now: float) -> None:
        """The block becomes a miss for everybody who waits for it: its tokens are recomputed."""
        shared = self._shared
        del self.loads[load.key]
        self._table.free_slot(load)
        for waiter, index in load.waiters.items():
            waiter.loads.remove(index)
            waiter.hits.pop(index, None)
            self._lost(waiter, index)
            self._shared.revalued(waiter)
            failures = waiter.account.load_failures
            failures[error] = failures.get(error, 0) + 1
            waiter.account.recomputed_tokens += shared.config.block_tokens
            if waiter.state is State.PREFILL:
                waiter.loads.set_page(index, NO_PAGE)
                waiter.position = min(waiter.position, index * shared.config.block_tokens)
                shared.promise(waiter, 1 if load.page is not None else 0)
        self._table.give_back_page(load)
        for waiter in load.waiters:
            self._changed(waiter, now)

    # -- uploads ------------------------------------------------------------------------------------------------

    def dispatch_uploads(self, now: float) -> None:
        """Issue uploads while the window has room."""
        self._uploading.dispatch(now)

    def uploaded(self, op_id: int, now: float) -> None:
        """An upload ended: its blocks are in L1, cached for everybody."""
        group, busy_s = self._uploading.ended(op_id, now)
        self._shared.cost.upload.observe(len(group) * group[0].hit.size_bytes, busy_s)
        for waiter in self._arrive(group):
            waiter.account.measured_upload_s += busy_s
            self._changed(waiter, now)

    def upload_failed(self, op_id: int, error: str, now: float) -> None:
        """An upload failed: its blocks count as misses."""
        group, _ = self._uploading.ended(op_id, now)
        self._shared.count("upload_failures")
        for load in group:
            self._failed(load, error, now)

    def _arrive(self, group: Sequence[BlockLoad]) -> dict[Request, list[BlockLoad]]:
        """Blocks are in L1, each pinned for those who wait for it and are admitted; returns all who wait."""
        shared = self._shared
        l1 = shared.l1
        for load in group:
            assert load.page is not None
            del self.loads[load.key]
            self._table.free_slot(load)
            users = 0
            for waiter in load.waiters:
                users += waiter.state is State.PREFILL
            if not users:
                l1.in_use.discard(load.key)
            l1.insert(load.key, load.parent, load.page, pins=users)  # nobody else caches a block that is being loaded
        waiters = self._table.waiters_of(group)
        for waiter, own in waiters.items():
            admitted = waiter.state is State.PREFILL
            indexes = [load.waiters[waiter] for load in own]
            waiter.loads.uploaded(indexes, ready=admitted)
            if admitted:
                waiter.count_cached(len(own) * shared.config.block_tokens)
                for index in indexes if waiter.spec.hand_off is not None else ():
                    self._table.in_l1(waiter, index)
        return waiters

    # -- for integrity and views --------------------------------------------------------------------------------

    def slots_in_use(self) -> list[int]:
        """Slots of L2 that loads hold."""
        return self._table.slots_in_use()

    def reserved_pages(self) -> set[int]:
        """Private pages that loads hold."""
        return self._table.reserved_pages()

    def reserved_keys(self) -> set[BlockKey]:
        """Blocks of loads that hold pages."""
        return {key for key, load in self.loads.items() if load.page is not None}

    def in_flight(self) -> dict[str, int]:
        """Operations in flight by link."""
        return self._fetching.in_flight() | {"upload": self._uploading.in_flight}

    def check_work_conserving(self) -> None:
        """No link is idle while a runnable block for it exists."""
        self._fetching.check_work_conserving()
        self._uploading.check_work_conserving()

    def check_integrity(self) -> None:
        """Assert that loads, waiters, slots, pages and windows agree."""
        self._table.check_integrity(self._fetching.loads_in_flight(), self._uploading.loads_in_flight())
        self._fetching.check_integrity()
        self._uploading.check_integrity()
