"""A thread's failure is noticed, a worker outlives the work that raises, and nothing waits for ever."""

import logging
import threading

import pytest

from penstock.process import guarded_thread
from penstock.process.guarded_thread import GuardedThread, GuardedWorker, WorkerClosedError, thread_failures
from penstock.process.rate_limited_log import SUBJECTS_MAX, RateLimitedLog

WAIT_S = 30.0


def raises() -> None:
    raise RuntimeError("as planned")


def test_a_thread_that_fails_says_so_and_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    before = thread_failures().get("test-loop", 0)
    told: list[Exception] = []
    thread = GuardedThread("test-loop-1", raises, failed=told.append, kind="test-loop")
    thread.start()
    thread.join(WAIT_S)
    assert not thread.alive
    assert [str(error) for error in told] == ["as planned"]
    assert thread_failures()["test-loop"] == before + 1
    assert "the thread test-loop-1 failed" in caplog.text


def test_a_loop_that_restarts_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guarded_thread, "RESTART_PAUSE_S", 0.0)
    rounds: list[int] = []
    ended = threading.Event()

    def run() -> None:
        rounds.append(1)
        if len(rounds) < 3:
            raises()
        ended.set()

    GuardedThread("test-restarts", run, restarts=True).start()
    assert ended.wait(WAIT_S)
    assert len(rounds) == 3


def test_a_worker_outlives_work_that_raises() -> None:
    worker = GuardedWorker("test-worker", 8)
    told: list[Exception] = []
    done = threading.Event()
    assert worker.put(raises, told.append)
    assert worker.put(raises, lambda error: raises())
    assert worker.put(done.set)
    assert done.wait(WAIT_S)
    assert [str(error) for error in told] == ["as planned"]
    worker.close(WAIT_S)
    assert not worker.alive
    assert not worker.put(done.set)


def test_a_worker_is_bounded_and_what_never_ran_is_told() -> None:
    worker = GuardedWorker("test-bounded", 2)
    started, go_on = threading.Event(), threading.Event()
    told: list[Exception] = []

    def hold() -> None:
        started.set()
        go_on.wait(WAIT_S)

    assert worker.put(hold)
    assert started.wait(WAIT_S)
    assert worker.put(raises, told.append)
    assert worker.put(raises, told.append)
    assert not worker.put(raises, told.append), "a third does not fit"
    worker.close(0.05)
    assert [type(error) for error in told] == [WorkerClosedError, WorkerClosedError]
    go_on.set()
    worker.join(WAIT_S)


def test_a_log_tells_once_and_counts_the_rest(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    log = RateLimitedLog(logging.getLogger("test"), 10.0, lambda: now[0])
    for _ in range(5):
        log.warning("full", "the node %s is full", "a")
    log.warning("other", "something else")
    assert [record.getMessage() for record in caplog.records] == ["the node a is full", "something else"]
    now[0] = 11.0
    log.warning("full", "the node %s is full", "a")
    assert caplog.records[-1].getMessage() == "the node a is full (and 4 more like it in the last 11 s)"
    for number in range(2 * SUBJECTS_MAX):
        log.warning(f"subject {number}", "one of many")
    assert sum(record.getMessage() == "one of many" for record in caplog.records) <= SUBJECTS_MAX
    now[0] = 30.0  # what was told an interval ago does not hide what is new
    log.warning("new", "a new fault")
    log.warning("newer", "another new fault")
    assert [record.getMessage() for record in caplog.records[-2:]] == ["a new fault", "another new fault"]
