"""Threads whose failure is noticed: `GuardedThread` runs a loop, `GuardedWorker` works off a bounded queue.

Every long-lived thread of Penstock is one of these two. An exception in one is logged with its traceback and counted
(`thread_failures`, a metric), and `failed` ends what waits for the thread's work, so that nothing waits for ever.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from penstock.process.kind_counts import KindCounts

log = logging.getLogger(__name__)

RESTART_PAUSE_S = 0.5  # doubles with each further failure of a loop
RESTART_PAUSE_S_MAX = 30.0

_failures = KindCounts()


class WorkerClosedError(Exception):
    """The work was still queued when its worker was closed."""


def thread_failures() -> dict[str, int]:
    """Count of exceptions that reached the top of a thread or a callback, by kind, since the process started."""
    return _failures.so_far()


def count_failure(kind: str) -> None:
    """Count an exception that did not end its thread, such as one in a caller's callback."""
    _failures.add(kind)


class GuardedThread:
    """A daemon thread that runs `run` until it returns.

    When `run` raises, the exception is logged and counted, then `failed(error)` is called on the thread; it must end
    whatever waits for the thread. With `restarts`, `run` is then called again after a pause, which doubles up to
    RESTART_PAUSE_S_MAX while the failures continue: for loops that keep no state of their own, such as one that watches
    deadlines. `kind` names the thread's metric where `name` holds an address.
    """

    def __init__(
        self,
        name: str,
        run: Callable[[], None],
        *,
        failed: Callable[[Exception], None] | None = None,
        restarts: bool = False,
        kind: str | None = None,
    ) -> None:
        self.name = name
        self._kind = kind or name
        self._run = run
        self._failed = failed
        self._restarts = restarts
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._guard, name=name, daemon=True)

    def start(self) -> None:
        """Raises RuntimeError or MemoryError where the operating system starts no thread."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def is_current(self) -> bool:
        """Whether the caller is this thread."""
        return threading.current_thread() is self._thread

    def stop_restarting(self) -> None:
        """Do not call `run` again once it has ended."""
        self._ending.set()

    def join(self, timeout_s: float) -> None:
        """Wait until the thread ends, at most `timeout_s` seconds. Returns at once before `start`, and on the thread
        itself."""
        self._ending.set()
        if self._thread.is_alive() and not self.is_current:
            self._thread.join(timeout_s)

    def _guard(self) -> None:
        pause_s = RESTART_PAUSE_S
        while True:
            begin_s = time.monotonic()
            try:
                self._run()
                return
            except Exception as error:  # noqa: BLE001 (every failure reaches `failed`; no thread ends silently)
                count_failure(self._kind)
                _log_exception("the thread %s failed", self.name)
                _call_failed(self._failed, error, self.name)
            if time.monotonic() - begin_s > RESTART_PAUSE_S_MAX:
                pause_s = RESTART_PAUSE_S
            if not self._restarts or self._ending.wait(pause_s):
                return
            pause_s = min(2 * pause_s, RESTART_PAUSE_S_MAX)


def _call_failed(failed: Callable[[Exception], None] | None, error: Exception, thread: str) -> None:
    if failed is None:
        return
    try:
        failed(error)
    except Exception:  # noqa: BLE001 (of the handler; nothing further can be called)
        _log_exception("the failure handler of the thread %s failed", thread)


def _log_exception(text: str, name: str) -> None:
    """Log with the traceback; when memory is too short for that, the caller continues all the same."""
    with contextlib.suppress(Exception):
        log.exception(text, name)


@dataclass(slots=True)
class _Work:
    run: Callable[[], object]
    failed: Callable[[Exception], None] | None


class GuardedWorker:
    """A bounded queue of work, and the daemon thread that does it in order; or `threads` of them that share the queue.

    At most `waiting_max` pieces wait. Work that raises is logged and counted, its `failed(error)` is called, and the
    thread goes on: work that somebody waits for must name a `failed`.
    """

    def __init__(self, name: str, waiting_max: int, kind: str | None = None, threads: int = 1) -> None:
        """`kind` names the worker's metric where `name` holds an address. Raises ValueError, and RuntimeError or
        MemoryError where the operating system starts no thread."""
        if waiting_max < 1 or threads < 1:
            raise ValueError(f"waiting_max is {waiting_max}, threads {threads}; each must be at least 1")
        self.name = name
        self._kind = kind or name
        self._waiting_max = waiting_max
        self._waiting: deque[_Work] = deque()
        self._changed = threading.Condition()
        self._closed = False
        names = [name] if threads == 1 else [f"{name}-{number}" for number in range(threads)]
        self._threads = [GuardedThread(one, self._run, kind=self._kind) for one in names]
        try:
            for thread in self._threads:
                thread.start()
        except BaseException:
            self.stop()  # those that were started end
            raise

    def put(self, run: Callable[[], object], failed: Callable[[Exception], None] | None = None) -> bool:
        """Queue work. Returns False, and queues nothing, when `waiting_max` pieces wait already or after `stop`."""
        with self._changed:
            if self._closed or len(self._waiting) >= self._waiting_max:
                return False
            self._waiting.append(_Work(run, failed))
            self._changed.notify()
        return True

    @property
    def alive(self) -> bool:
        """Whether a thread runs."""
        return any(thread.alive for thread in self._threads)

    @property
    def is_current(self) -> bool:
        """Whether the caller is one of the worker's threads."""
        return any(thread.is_current for thread in self._threads)

    @property
    def waiting(self) -> int:
        """Pieces of work that wait."""
        return len(self._waiting)

    def stop(self) -> None:
        """Accept no more work; the threads end after what is queued."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def join(self, timeout_s: float) -> None:
        """Wait until the threads end, at most `timeout_s` seconds; returns at once on a thread of the worker."""
        deadline_s = time.monotonic() + timeout_s
        if not self.is_current:
            for thread in self._threads:
                thread.join(max(0.0, deadline_s - time.monotonic()))

    def close(self, timeout_s: float) -> None:
        """`stop` and `join`; work that has not begun after `timeout_s` seconds fails with WorkerClosedError."""
        self.stop()
        self.join(timeout_s)
        if self.is_current:
            return
        with self._changed:
            rest = list(self._waiting)
            self._waiting.clear()
        for work in rest:
            _call_failed(work.failed, WorkerClosedError(f"{self.name} was closed"), self.name)

    def _run(self) -> None:
        while (work := self._take()) is not None:
            try:
                work.run()
            except Exception as error:  # noqa: BLE001 (of one piece of work; the thread goes on)
                count_failure(self._kind)
                _log_exception("work on the thread %s failed", self.name)
                _call_failed(work.failed, error, self.name)
            del work  # free its memory before waiting for the next piece

    def _take(self) -> _Work | None:
        with self._changed:
            while not self._waiting:
                if self._closed:
                    return None
                self._changed.wait()
            return self._waiting.popleft()
