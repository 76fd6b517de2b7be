"""The uploading stage (L2 -> L1): which staged blocks go up next, in groups, those of the request of least rank first.

A page that could not be reserved when the block was fetched is taken here. The baseline (`coupled`) uploads only when
the whole batch is staged.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

from penstock.core.bandwidth import LinkUse
from penstock.core.engine.load_table import LoadTable
from penstock.core.engine.request import Request, State
from penstock.core.engine.request_loads import BlockLoad, LoadState
from penstock.core.engine.shared_state import SharedState
from penstock.core.operations import Upload
from penstock.core.ordering import RankedQueue


class Uploading:
    """One queue of admitted requests with staged blocks, and the groups in flight."""

    def __init__(self, shared: SharedState, loads: LoadTable, changed: Callable[[Request, float], None]) -> None:
        self._shared = shared
        self._loads = loads
        self._changed = changed
        self._queue: RankedQueue[Request] = RankedQueue()
        self._link = LinkUse()
        self._in_flight: dict[int, tuple[tuple[BlockLoad, ...], float]] = {}

    def offer(self, request: Request) -> None:
        """The request, an admitted one, has a staged block."""
        self._queue.push(request)
        request.queues[self._queue] = None

    def dispatch(self, now: float) -> None:
        """Issue uploads while the window has room: staged blocks of the request of least rank, in groups."""
        shared = self._shared
        while self._link.in_flight < shared.config.upload_window_groups:
            request = self._queue.peek()
            if request is None:
                return
            if shared.config.mode == "coupled" and not self._may_upload_coupled(request):
                return
            group = self._take_group(request, now)
            if group:
                self._issue(group, request, now)
            elif request.loads.staged:
                return  # no page for the request of least rank; wait until one is free
            else:
                self._queue.discard(request)

    def _may_upload_coupled(self, request: Request) -> bool:
        """The baseline uploads when the whole batch is staged (or nothing more fits into L2)."""
        counts = request.loads.counts
        if counts[LoadState.FETCHING]:
            return False
        return not counts[LoadState.WANTED] or self._shared.l2.free_for_loads <= 0

    def _is_followed(self, request: Request) -> bool:
        """Whether what goes up next is the last of the request's load, so that compute may follow it layer by layer."""
        counts = request.loads.counts
        return self._shared.config.layerwise and not counts[LoadState.WANTED] and not counts[LoadState.FETCHING]

    def _take_group(self, request: Request, now: float) -> list[BlockLoad]:
        shared = self._shared
        staged = request.loads.staged
        limit = shared.config.upload_group_blocks
        if self._is_followed(request):
            limit = max(limit, len(staged))
        group: list[BlockLoad] = []
        for load in islice(staged, limit):
            if load.page is None:
                page = shared.page_for(request, now)
                if page is None:
                    break
                self._loads.reserve_page(load, page)
            group.append(load)
        return group

    def _issue(self, group: list[BlockLoad], request: Request, now: float) -> None:
        shared = self._shared
        op_id = shared.next_op()
        followed = self._is_followed(request)
        blocks = []
        retained = set()
        for load in group:
            assert load.slot is not None and load.page is not None
            blocks.append((load.slot, load.page))
            if self._loads.needed_after_upload(load):
                load.retained = True
                retained.add(load.slot)
            load.upload_op = op_id
            for waiter, index in load.waiters.items():
                if waiter.state is State.PREFILL:
                    waiter.loads.set_page(index, load.page)
        waiters = self._loads.advance(group, LoadState.UPLOADING)
        self._link.in_flight += 1
        self._in_flight[op_id] = (tuple(group), now)
        shared.outbox.append(Upload(op_id, tuple(blocks), frozenset(retained), followed))
        for waiter in waiters:
            self._changed(waiter, now)

    def ended(self, op_id: int, now: float) -> tuple[tuple[BlockLoad, ...], float]:
        """An upload ended: its loads, and how many seconds it kept the link busy."""
        group, issued_s = self._in_flight.pop(op_id)
        return group, self._link.finished(issued_s, now)

    def loads_in_flight(self) -> set[BlockLoad]:
        """Blocks whose upload has begun and not ended."""
        return {load for group, _ in self._in_flight.values() for load in group}

    @property
    def in_flight(self) -> int:
        """Groups in flight."""
        return self._link.in_flight

    def check_work_conserving(self) -> None:
        """Assert that the link is not idle although the next request has a staged block with a page."""
        request = self._queue.peek()
        if request is None or self._link.in_flight >= self._shared.config.upload_window_groups:
            return
        if self._shared.config.mode == "penstock" or self._may_upload_coupled(request):
            first = next(iter(request.loads.staged), None)
            assert first is None or first.page is None, "upload is idle although a block waits for it"

    def check_integrity(self) -> None:
        """Assert that the window is not exceeded."""
        assert 0 <= self._link.in_flight <= self._shared.config.upload_window_groups
