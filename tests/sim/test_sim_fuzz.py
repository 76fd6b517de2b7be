"""Fuzz finds what is planted: each defect breaks the invariant it should, shrinks, and replays; the brain has none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from penstock.core import admission, loading, saving, scheduler
from penstock.core.ordering import AGED
from penstock.core.request import BlockLoad, Request
from penstock.sim.experiments.fuzz import run_seeds
from penstock.sim.fuzz_case import FuzzCase, random_case
from penstock.sim.fuzz_run import failure_of

SEEDS = 150
SEEDS_TO_FIND = 400
Plant = Callable[[pytest.MonkeyPatch], None]


def _slot_leaks(patch: pytest.MonkeyPatch) -> None:
    """One slot in twenty does not come back."""
    right, calls = loading.Loading._free_slot, [0]

    def wrong(self: loading.Loading, load: BlockLoad) -> None:
        calls[0] += 1
        if calls[0] % 20:
            right(self, load)

    patch.setattr(loading.Loading, "_free_slot", wrong)


def _ready_before_loaded(patch: pytest.MonkeyPatch) -> None:
    """A block counts as ready when its upload begins."""
    right = loading.Loading._issue_upload

    def wrong(self: loading.Loading, group: list[BlockLoad], request: Request, now: float) -> None:
        right(self, group, request, now)
        for load in group:
            for waiter, index in load.waiters.items():
                waiter.ready[index] = True

    patch.setattr(loading.Loading, "_issue_upload", wrong)


def _damage_is_used(patch: pytest.MonkeyPatch) -> None:
    """A fetch that failed counts as one that did not."""
    right = loading.Loading.fetched

    def wrong(self: loading.Loading, op_id: int, error: str | None, now: float) -> None:
        right(self, op_id, None, now)

    patch.setattr(loading.Loading, "fetched", wrong)


def _idle_link(patch: pytest.MonkeyPatch) -> None:
    """The last place of a fetch window stays empty."""

    def wrong(self: loading.Loading, route: tuple[str, ...], reactive: bool) -> bool:
        window = self._shared.config.fetch_window_blocks - 1 or 1
        return self._shared.l2.free_for_loads > 0 and all(self._link(name).in_flight < window for name in route)

    patch.setattr(loading.Loading, "dispatch_fetches", _dispatch_with(wrong))


def _dispatch_with(has_room: Callable[[Any, tuple[str, ...], bool], bool]) -> Callable[[Any, float], None]:
    right = loading.Loading.dispatch_fetches

    def dispatch(self: Any, now: float) -> None:
        self._has_room = has_room.__get__(self)
        right(self, now)
        del self._has_room

    return dispatch


def _second_end(patch: pytest.MonkeyPatch) -> None:
    """A cancelled request ends again when its batch does."""
    right = scheduler.LoadScheduler.cancel

    def wrong(self: scheduler.LoadScheduler, request_id: str, now: float) -> None:
        request = self._requests.get(request_id)
        right(self, request_id, now)
        if request is not None and request_id not in self._requests:
            self._requests[request_id] = request
            right(self, request_id, now)

    patch.setattr(scheduler.LoadScheduler, "cancel", wrong)


def _no_turn(patch: pytest.MonkeyPatch) -> None:
    """What is not admitted at once is never looked at again."""
    right = admission.Admission.admit

    def wrong(self: admission.Admission, now: float) -> None:
        held = [request for request in self.waiting if now > request.arrival_s + 1.0 and request.tier != AGED]
        for request in held:
            self.waiting.discard(request)
        right(self, now)

    patch.setattr(admission.Admission, "admit", wrong)


def _save_leaks(patch: pytest.MonkeyPatch) -> None:
    """A save that fails keeps its slot."""
    right = saving.Saving.saved

    def wrong(self: saving.Saving, op_id: int, error: str | None) -> None:
        if error is None:
            right(self, op_id, error)

    patch.setattr(saving.Saving, "saved", wrong)


PLANTS: list[tuple[Plant, str]] = [
    (_slot_leaks, ""),
    (_ready_before_loaded, ""),
    (_damage_is_used, ""),
    (_idle_link, "idle although a block waits"),
    (_second_end, ""),
    (_no_turn, ""),
    (_save_leaks, ""),
]


def first_failure() -> tuple[FuzzCase, str]:
    for seed in range(SEEDS_TO_FIND):
        case = random_case(seed)
        failure = failure_of(case)
        if failure is not None:
            return case, failure
    raise AssertionError(f"{SEEDS_TO_FIND} seeds do not find it")


@pytest.mark.parametrize(("plant", "text"), PLANTS, ids=lambda value: getattr(value, "__name__", "").strip("_"))
def test_a_planted_defect_is_found(plant: Plant, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    _, failure = first_failure()
    assert text in failure, failure
    print(failure)


def test_the_brain_keeps_its_invariants() -> None:
    events, failed = run_seeds(0, SEEDS)
    assert failed == [] and events > SEEDS * 10
