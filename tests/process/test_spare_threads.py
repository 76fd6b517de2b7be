"""Threads that rest: used again, bounded, ended; and work that fails ends its own thread alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from queue import SimpleQueue

import pytest

from penstock.process import spare_threads
from penstock.process.guarded_thread import GuardedThread, thread_failures
from penstock.process.spare_threads import SPARE_MAX, SpareThreads
from tests.pool.helpers import until

WAIT_S = 20.0
KIND = "test-spare"


@pytest.fixture
def threads() -> Iterator[SpareThreads]:
    made = SpareThreads(KIND)
    yield made
    made.close()
    until(lambda: not alive(), WAIT_S)


def alive() -> list[threading.Thread]:
    return [one for one in threading.enumerate() if one.name.startswith(KIND)]


def test_one_thread_does_one_piece_of_work_after_the_other(threads: SpareThreads) -> None:
    seen: SimpleQueue[tuple[int, str]] = SimpleQueue()
    for number in range(20):
        name = f"{KIND}-{number}"
        threads.run(name, lambda: seen.put((threading.get_ident(), threading.current_thread().name)))
        assert seen.get(timeout=WAIT_S)[1] == name
        until(lambda: threads.resting == 1, WAIT_S)
    assert len(alive()) == 1 and alive()[0].name == KIND


def test_work_at_the_same_time_has_a_thread_each_and_few_of_them_rest(threads: SpareThreads) -> None:
    go, begun = threading.Event(), threading.Semaphore(0)

    def work() -> None:
        begun.release()
        go.wait(WAIT_S)

    for number in range(3 * SPARE_MAX):
        threads.run(f"{KIND}-{number}", work)
    assert all(begun.acquire(timeout=WAIT_S) for _ in range(3 * SPARE_MAX)) and threads.resting == 0
    go.set()
    until(lambda: len(alive()) == SPARE_MAX == threads.resting, WAIT_S)


def test_a_thread_that_rests_for_long_ends(threads: SpareThreads, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spare_threads, "REST_S", 0.01)
    done = threading.Event()
    threads.run(f"{KIND}-1", done.set)
    assert done.wait(WAIT_S)
    until(lambda: not alive() and threads.resting == 0, WAIT_S)
    done.clear()
    threads.run(f"{KIND}-2", done.set)
    assert done.wait(WAIT_S)


def test_no_work_is_lost_where_rests_end_just_then(threads: SpareThreads, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spare_threads, "REST_S", 0.0005)
    done = threading.Semaphore(0)
    for number in range(300):
        threads.run(f"{KIND}-{number}", done.release)
        threading.Event().wait(0.0005 * (number % 3))
    assert all(done.acquire(timeout=WAIT_S) for _ in range(300))


def test_work_that_fails_is_counted_and_ends_its_thread(threads: SpareThreads) -> None:
    def fail() -> None:
        raise ValueError("a fault")

    before = thread_failures().get(KIND, 0)
    threads.run(f"{KIND}-1", fail)
    until(lambda: thread_failures().get(KIND, 0) == before + 1 and not alive(), WAIT_S)
    done = threading.Event()
    threads.run(f"{KIND}-2", done.set)
    assert done.wait(WAIT_S)


def test_without_a_spare_one_and_a_new_one_it_is_refused(
    threads: SpareThreads, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_thread(self: GuardedThread) -> None:
        raise RuntimeError("can't start new thread")

    done = threading.Event()
    threads.run(f"{KIND}-1", done.set)
    until(lambda: threads.resting == 1, WAIT_S)
    monkeypatch.setattr(GuardedThread, "start", no_thread)
    go, again = threading.Event(), threading.Event()

    def work() -> None:
        assert go.wait(WAIT_S)
        again.set()

    threads.run(f"{KIND}-2", work)
    with pytest.raises(RuntimeError, match="can't start"):
        threads.run(f"{KIND}-3", done.set)
    go.set()
    assert again.wait(WAIT_S)


def test_after_the_end_work_still_runs_and_nobody_rests(threads: SpareThreads) -> None:
    done = threading.Event()
    threads.run(f"{KIND}-1", done.set)
    until(lambda: threads.resting == 1, WAIT_S)
    threads.close()
    until(lambda: not alive(), WAIT_S)
    done.clear()
    threads.run(f"{KIND}-2", done.set)
    assert done.wait(WAIT_S)
    until(lambda: not alive(), WAIT_S)
