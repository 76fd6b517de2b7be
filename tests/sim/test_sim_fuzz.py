"""Fuzz finds what is planted: each defect breaks the invariant it should, shrinks, and replays; the core has none."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from penstock.cli import app
from penstock.core.cluster import inter_engine
from penstock.core.engine import (
    admission,
    device_pages,
    fetching,
    kv_handoff,
    load_coordinator,
    load_table,
    ranking,
    scheduler,
    uploading,
    write_back,
)
from penstock.core.engine.request import Request
from penstock.core.engine.request_loads import BlockLoad
from penstock.core.ordering import AGED, ORDINARY
from penstock.sim.commands.fuzz import run_seeds
from penstock.sim.fuzz.case import FuzzCase
from penstock.sim.fuzz.outcome import AnyCase, case_of, failure_of, read_case, shrunk, write_case

SEEDS = int(os.environ.get("PENSTOCK_FUZZ_SEEDS", "3000"))
FOLDER = Path(__file__).parent / "cases"
CASES = sorted(FOLDER.glob("*.json"))
SEEDS_TO_FIND = 600
Plant = Callable[[pytest.MonkeyPatch], None]


def _every(count: int, right: Callable[..., Any], wrong: Callable[..., Any]) -> Callable[..., Any]:
    """`right`, and `wrong` once in so many calls."""
    calls = [0]

    def method(*arguments: Any) -> Any:
        calls[0] += 1
        return (right if calls[0] % count else wrong)(*arguments)

    return method


def _nothing(*arguments: Any) -> None:
    pass


def _second_end(patch: pytest.MonkeyPatch) -> None:
    """A cancelled request ends again."""
    right = scheduler.LoadScheduler.cancel

    def wrong(self: scheduler.LoadScheduler, request_id: str, now: float) -> None:
        request = self._requests.get(request_id)
        right(self, request_id, now)
        if request is not None and request_id not in self._requests:
            self._requests[request_id] = request
            right(self, request_id, now)

    patch.setattr(scheduler.LoadScheduler, "cancel", wrong)


def _no_decision(patch: pytest.MonkeyPatch) -> None:
    """Two requests take each other's place in L1 for ever: what an admitted one's rank was while it waited is lost."""
    right = admission.Admission._try_admit  # noqa: SLF001 (a fault is put in here)

    def wrong(self: admission.Admission, request: Request, now: float) -> bool:
        admitted = right(self, request, now)
        request.waiting_rank = (AGED + 9, 0.0, 0)
        return admitted

    patch.setattr(admission.Admission, "_try_admit", wrong)


def _no_end(patch: pytest.MonkeyPatch) -> None:
    """What waited a second is never admitted."""
    right = admission.Admission._try_admit  # noqa: SLF001 (a fault is put in here)

    def wrong(self: admission.Admission, request: Request, now: float) -> bool:
        return now < request.arrival_s + 1.0 and right(self, request, now)

    patch.setattr(admission.Admission, "_try_admit", wrong)


def _ready_before_loaded(patch: pytest.MonkeyPatch) -> None:
    """A block counts as ready when its upload begins."""
    right = uploading.Uploading._issue  # noqa: SLF001 (a fault is put in here)

    def wrong(self: uploading.Uploading, group: list[BlockLoad], request: Request, now: float) -> None:
        right(self, group, request, now)
        for load in group:
            for waiter, index in load.waiters.items():
                if waiter.loads.ready:
                    waiter.loads.fill(index)

    patch.setattr(uploading.Uploading, "_issue", wrong)


def _damage_is_used(patch: pytest.MonkeyPatch) -> None:
    """A fetch that failed counts as one that did not."""
    right = load_coordinator.LoadCoordinator.fetched
    patch.setattr(
        load_coordinator.LoadCoordinator,
        "fetched",
        lambda self, op_ids, errors, now: right(self, op_ids, [None] * len(errors), now),
    )


def _handed_from_a_slot_of_others(patch: pytest.MonkeyPatch) -> None:
    """A slot is free although its block is still to be handed over."""
    patch.setattr(kv_handoff.KVHandoff, "needs_slot", lambda self, slot: False)


def _slot_leaks(patch: pytest.MonkeyPatch) -> None:
    right = load_table.LoadTable.free_slot
    patch.setattr(load_table.LoadTable, "free_slot", _every(20, right, _nothing))


def _page_leaks(patch: pytest.MonkeyPatch) -> None:
    right = device_pages.DevicePages.give_back
    patch.setattr(device_pages.DevicePages, "give_back", _every(20, right, _nothing))


def _page_twice(patch: pytest.MonkeyPatch) -> None:
    """A page is given back and used on."""
    right = uploading.Uploading._issue  # noqa: SLF001 (a fault is put in here)

    def wrong(self: uploading.Uploading, group: list[BlockLoad], request: Request, now: float) -> None:
        right(self, group, request, now)
        assert group[0].page is not None
        self._shared.l1.give_back(group[0].page)

    patch.setattr(uploading.Uploading, "_issue", _every(20, right, wrong))


def _save_leaks(patch: pytest.MonkeyPatch) -> None:
    """A save that fails keeps its slot."""
    right = write_back.WriteBackQueue.saved
    patch.setattr(
        write_back.WriteBackQueue,
        "saved",
        lambda self, op_id, error: right(self, op_id, error) if error is None else None,
    )


def _bound_broken(patch: pytest.MonkeyPatch) -> None:
    """Fetches go out beyond the windows."""
    patch.setattr(fetching.Fetching, "_room", lambda self, route, reactive: self._shared.l2.free_for_loads)


def _ageing_forgotten(patch: pytest.MonkeyPatch) -> None:
    """Who waited longest is ranked like everybody."""
    right = ranking.Ranking.set_rank

    def wrong(self: ranking.Ranking, request: Request) -> None:
        if request.tier == AGED:
            request.tier = ORDINARY
        right(self, request)

    patch.setattr(ranking.Ranking, "set_rank", wrong)


def _idle_link(patch: pytest.MonkeyPatch) -> None:
    """A fetch is put off now and then."""
    right = load_coordinator.LoadCoordinator.dispatch_fetches
    patch.setattr(load_coordinator.LoadCoordinator, "dispatch_fetches", _every(10, right, _nothing))


def _idle_upload(patch: pytest.MonkeyPatch) -> None:
    """An upload is put off now and then."""
    right = load_coordinator.LoadCoordinator.dispatch_uploads
    patch.setattr(load_coordinator.LoadCoordinator, "dispatch_uploads", _every(10, right, _nothing))


def _request_forgotten(patch: pytest.MonkeyPatch) -> None:
    """A request that lost its engine is not placed again."""
    right = inter_engine.InterEngineScheduler._start_over  # noqa: SLF001 (a fault is put in here)

    def wrong(self: inter_engine.InterEngineScheduler, request: Any, lost: str | None) -> None:
        right(self, request, lost)
        if request.entry is not None:
            self._leave_queue(request)
            del self._requests[request.request_id]

    patch.setattr(inter_engine.InterEngineScheduler, "_start_over", wrong)


def _tokens_leak(patch: pytest.MonkeyPatch) -> None:
    """A restart forgets the read it leaves."""
    right = inter_engine.InterEngineScheduler._read_off  # noqa: SLF001 (a fault is put in here)
    patch.setattr(inter_engine.InterEngineScheduler, "_read_off", _every(15, right, _nothing))


def _loss_ignored(patch: pytest.MonkeyPatch) -> None:
    """Requests of a lost node's engines stay where they are."""
    patch.setattr(inter_engine.InterEngineScheduler, "node_lost", _nothing)


def _attempts_unbounded(patch: pytest.MonkeyPatch) -> None:
    """Nobody counts how often a request is placed."""
    right = inter_engine.InterEngineScheduler._start_over  # noqa: SLF001 (a fault is put in here)

    def wrong(self: inter_engine.InterEngineScheduler, request: Any, lost: str | None) -> None:
        attempt, request.attempt = request.attempt, 0
        right(self, request, lost)
        request.attempt = attempt

    patch.setattr(inter_engine.InterEngineScheduler, "_start_over", wrong)


PLANTS: list[tuple[Plant, str]] = [
    (_second_end, "ended twice"),
    (_no_end, "FUZZ-1|FUZZ-5"),
    (_ready_before_loaded, "LOADS-3"),
    (_damage_is_used, "FUZZ-2"),
    (_handed_from_a_slot_of_others, "FUZZ-2|FUZZ-3|slot"),
    (_slot_leaks, "slot"),
    (_page_leaks, "page"),
    (_page_twice, "page"),
    (_save_leaks, "slot|FUZZ-3"),
    (_bound_broken, "FUZZ-4"),
    (_ageing_forgotten, "FUZZ-5"),
    (_idle_link, "idle although a block waits"),
    (_idle_upload, "upload is idle although a block waits"),
    (_request_forgotten, "CLUSTER-1"),
    (_tokens_leak, "CLUSTER-2"),
    (_loss_ignored, "CLUSTER-1"),
    (_attempts_unbounded, "CLUSTER-3|INTER-3"),
]


def first_failure() -> tuple[AnyCase, str]:
    for seed in range(SEEDS_TO_FIND):
        case = case_of(seed)
        failure = failure_of(case)
        if failure is not None:
            return case, failure
    raise AssertionError(f"{SEEDS_TO_FIND} seeds do not find it")


@pytest.mark.slow
@pytest.mark.parametrize(("plant", "words"), PLANTS, ids=lambda value: getattr(value, "__name__", "").strip("_"))
def test_a_planted_defect_is_found(plant: Plant, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    _, failure = first_failure()
    assert any(word in failure for word in words.split("|")), failure


@pytest.mark.slow
def test_the_command_finds_shrinks_and_replays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out, runner = tmp_path / "failure.json", CliRunner()
    with monkeypatch.context() as patch:
        _slot_leaks(patch)
        found = runner.invoke(app, ["sim", "fuzz", "--seeds", "200", "--processes", "1", "--out", str(out)])
        assert found.exit_code == 1
        assert "a slot leaked" in found.output and f"--replay {out}" in found.output
    small = read_case(out)
    assert isinstance(small, FuzzCase)
    with monkeypatch.context() as patch:
        _damage_is_used(patch)
        found = runner.invoke(app, ["sim", "fuzz", "--seeds", "200", "--processes", "1", "--out", str(out)])
        again = runner.invoke(app, ["sim", "fuzz", "--replay", str(out)])
        assert found.exit_code == again.exit_code == 1
        assert "fails: FUZZ-2" in again.output
    small = read_case(out)
    assert isinstance(small, FuzzCase) and len(small.requests) == 1 and not small.faults
    healed = runner.invoke(app, ["sim", "fuzz", "--replay", str(out)])
    assert healed.exit_code == 0 and "all invariants hold" in healed.output


def test_a_shrunk_cluster_fails_in_the_same_way_and_is_smaller(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _request_forgotten(monkeypatch)
    case, failure = first_failure()
    small = shrunk(case)
    assert not isinstance(case, FuzzCase) and not isinstance(small, FuzzCase)
    assert len(small.faults) <= 2 and len(small.agents) <= len(case.agents)
    write_case(tmp_path / "case.json", small)
    again = failure_of(read_case(tmp_path / "case.json"))
    assert again is not None and again[:9] == failure[:9] == "CLUSTER-1"


def test_a_file_that_holds_no_case_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "case.json"
    path.write_text('{"kind": "engine", "seed": 1}')
    refused = CliRunner().invoke(app, ["sim", "fuzz", "--replay", str(path)])
    assert refused.exit_code == 2 and refused.output.count("\n") == 1 and "dice" in refused.output


@pytest.mark.slow
def test_the_brain_keeps_its_invariants() -> None:
    """On all processors; five times the seeds in which each planted defect is found."""
    workers = min(4, len(os.sched_getaffinity(0)))
    starts = range(0, SEEDS, 250)
    with ProcessPoolExecutor(workers) as pool:
        done = list(pool.map(run_seeds, starts, [250] * len(starts)))
    assert [failed for _, failed in done if failed] == []
    assert sum(events for events, _ in done) > SEEDS * 20


@pytest.mark.slow
def test_two_requests_that_take_each_others_place_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by a seed: a block that only another request's load brings made an admitted request rank higher than it did
    while it waited. A scheduler core that comes to no decision is a failure like others."""
    case = read_case(FOLDER / "two_take_turns.json")
    assert failure_of(case) is None
    _no_decision(monkeypatch)
    assert "no end within" in str(failure_of(case))


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_a_history_that_once_failed(path: Path) -> None:
    """What seeds found: a link left idle after a preemption, an order of turns, and stale ends of reads and steps in a
    cluster."""
    assert failure_of(read_case(path)) is None
