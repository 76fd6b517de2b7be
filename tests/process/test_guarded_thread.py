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


def test_threads_of_one_worker_share_its_queue_and_end_together() -> None:
    before = thread_failures().get("test-shared", 0)
    worker = GuardedWorker("test-shared", 4, threads=2)
    both, go_on = threading.Barrier(3), threading.Event()
    failures: list[Exception] = []
    names: list[str] = []

    def hold() -> None:
        names.append(threading.current_thread().name)
        assert worker.is_current
        both.wait(WAIT_S)
        go_on.wait(WAIT_S)

    assert worker.put(hold) and worker.put(hold)
    both.wait(WAIT_S)  # each thread runs one piece at the same time as the other
    assert sorted(names) == ["test-shared-0", "test-shared-1"] and not worker.is_current
    assert all(worker.put(raises, failures.append) for _ in range(4))
    assert not worker.put(raises, failures.append) and worker.waiting == 4
    go_on.set()
    worker.close(WAIT_S)
    assert not worker.alive and not worker.waiting
    assert [str(error) for error in failures] == ["as planned"] * 4
    assert thread_failures()["test-shared"] == before + 4


def test_a_worker_whose_second_thread_cannot_start_leaves_none(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[GuardedThread] = []
    real = GuardedThread.start

    def start(self: GuardedThread) -> None:
        if started:
            raise RuntimeError("can't start new thread")
        real(self)
        started.append(self)

    monkeypatch.setattr(GuardedThread, "start", start)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        GuardedWorker("test-half", 4, threads=2)
    started[0].join(WAIT_S)
    assert not started[0].alive


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
