"""Loads by key, shared by all who wait for them: their states, their slots, and the share of reactive ones."""

from __future__ import annotations

from collections.abc import Sequence

from penstock.core.engine.kv_handoff import KVHandoff
from penstock.core.engine.request import Request
from penstock.core.engine.request_loads import BlockLoad, LoadState
from penstock.core.engine.shared_state import SharedState
from penstock.core.keys import BlockKey
from penstock.core.operations import BlockHit, Drop


class LoadTable:
    """A load is reactive while its slot is held for requests that are not admitted; those have a share of L2."""

    def __init__(self, shared: SharedState, handoff: KVHandoff | None) -> None:
        self._shared = shared
        self._handoff = handoff
        self.by_key: dict[BlockKey, BlockLoad] = {}
        self.reactive_slots = 0

    def move(self, load: BlockLoad, state: LoadState, hit: BlockHit | None = None) -> None:
        """To another state, for everybody who waits for it; `hit`: it is to be fetched as that says."""
        hit = load.hit if hit is None else hit
        for waiter in load.waiters:
            waiter.loads.move(load, state, hit)
            self._shared.revalued(waiter)
        load.state, load.hit = state, hit

    @staticmethod
    def waiters_of(loads: Sequence[BlockLoad]) -> dict[Request, list[BlockLoad]]:
        """Who waits for any of the loads, each with those, in order."""
        found: dict[Request, list[BlockLoad]] = {}
        for load in loads:
            for waiter in load.waiters:
                if waiter in found:
                    found[waiter].append(load)
                else:
                    found[waiter] = [load]
        return found

    def advance(self, loads: Sequence[BlockLoad], state: LoadState) -> dict[Request, list[BlockLoad]]:
        """Loads as `RequestLoads.advance` takes them reach a later state together, for everybody who waits for them;
        returns who that is, each with its loads."""
        waiters = self.waiters_of(loads)
        for waiter, own in waiters.items():
            waiter.loads.advance(own, state)
            self._shared.revalued(waiter)
        for load in loads:
            load.state = state
        return waiters

    def reserve_page(self, load: BlockLoad, page: int | None) -> None:
        """Give the load its page of L1. None: no page is free; it takes one when it is uploaded."""
        if page is None:
            self._shared.count("reactive_allocations")
            return
        load.page = page
        self._shared.l1.in_use.add(load.key)
        for waiter in load.waiters:
            self._shared.use_promise(waiter)

    def give_back_page(self, load: BlockLoad) -> None:
        """Free the load's page, if it has one."""
        if load.page is not None:
            self._shared.l1.in_use.discard(load.key)
            self._shared.l1.give_back(load.page)
            load.page = None

    def needed_after_upload(self, load: BlockLoad) -> bool:
        """Whether a hand-off still reads the slot after the upload."""
        return self._handoff is not None and load.slot is not None and self._handoff.needs_slot(load.slot)

    def hand_over(self, request: Request, index: int, load: BlockLoad) -> None:
        """The request's block `index` is in L2: send it to the decode engine, if the request has one."""
        if self._handoff is not None and request.spec.hand_off is not None:
            self._handoff.staged(request, index, load)

    def in_l1(self, request: Request, index: int) -> None:
        """The request's block `index` is in L1."""
        if self._handoff is not None:
            self._handoff.in_l1(request, index)

    def drop_staged(self, load: BlockLoad) -> None:
        """Give back the slot of a staged load; the driver forgets what is in it."""
        load.retained = True  # the driver holds its content until the Drop
        self.free_slot(load)

    def free_slot(self, load: BlockLoad) -> None:
        """Give back the load's slot, or leave it to the hand-off that still reads it."""
        assert load.slot is not None
        if self._handoff is not None and self._handoff.needs_slot(load.slot):
            self._handoff.adopt(load.slot)
        else:
            if load.retained:
                self._shared.outbox.append(Drop(load.slot))
            self._shared.l2.free_load(load.slot)
        load.slot, load.retained = None, False
        if load.reactive:
            self.not_reactive(load)

    def set_reactive(self, load: BlockLoad) -> None:
        """The load's slot counts against the share of reactive loads."""
        if not load.reactive:
            load.reactive = True
            self.reactive_slots += 1

    def not_reactive(self, load: BlockLoad) -> None:
        """The load's slot no longer counts against the share of reactive loads."""
        if load.reactive:
            load.reactive = False
            self.reactive_slots -= 1

    def slots_in_use(self) -> list[int]:
        """Slots of L2 that loads hold."""
        return [load.slot for load in self.by_key.values() if load.slot is not None]

    def reserved_pages(self) -> set[int]:
        """Private pages of L1 that loads hold."""
        return {load.page for load in self.by_key.values() if load.page is not None}

    def check_integrity(self, fetching: set[BlockLoad], uploading: set[BlockLoad]) -> None:
        """A load is under its key, holds a slot exactly from FETCHING on, and is waited for or in flight; waiters and
        loads agree; the reactive share is counted right."""
        for key, load in self.by_key.items():
            assert load.key == key
            assert (load.slot is not None) == (load.state is not LoadState.WANTED), "a slot out of turn"
            assert (load in fetching) == (load.state is LoadState.FETCHING)
            assert (load in uploading) == (load.state is LoadState.UPLOADING)
            assert load.state is not LoadState.UPLOADING or load.page is not None
            for waiter, index in load.waiters.items():
                assert waiter.loads.by_index.get(index) is load and waiter.key_at(index) == key
            assert load.waiters or load.state in (LoadState.FETCHING, LoadState.UPLOADING), "a load has no waiter"
        assert self.reactive_slots == sum(load.reactive for load in self.by_key.values())
