"""Threads whose failure is noticed: a loop that is guarded, and a worker with a bounded queue.

Every long-lived thread of Penstock is one of these two. An exception in one is logged with its traceback and counted
(`thread_failures`, a metric), and whoever waits for the thread's work is told, so that nothing waits for ever.
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

RESTART_PAUSE_S = 0.5  # doubles while a loop fails again and again
RESTART_PAUSE_S_MAX = 30.0

_failures = KindCounts()


class WorkerClosedError(Exception):
    """Work that still waited when its worker was closed."""


def thread_failures() -> dict[str, int]:
    """Exceptions that a thread's work did not handle itself, by kind of thread, since the process started."""
    return _failures.so_far()


def count_failure(kind: str) -> None:
    """Count an exception that a thread of this kind outlived, such as one in a callback of somebody else's."""
    _failures.add(kind)


class GuardedThread:
    """A daemon thread that runs `run` until it returns.

    When `run` raises, the exception is logged and counted, then `failed(error)` is called on the thread, which must end
    whatever waits for it. With `restarts`, `run` is then called again after a pause, which doubles up to
    RESTART_PAUSE_S_MAX while it fails again and again: for loops whose state lies with their owner, such as a watch
    over deadlines. `kind` names the thread's metric where `name` holds an address.
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
        """Raises RuntimeError or MemoryError where no thread can be had."""
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
        """Call `run` no more once it has ended."""
        self._ending.set()

    def join(self, timeout_s: float) -> None:
        """Wait for the end, at most `timeout_s` seconds; at once before `start` and on the thread itself."""
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
            except Exception as error:  # noqa: BLE001 (any failure ends in `failed`, not with a silent thread)
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
    except Exception:  # noqa: BLE001 (a handler's; there is nobody left to be called)
        _log_exception("what handles failures on the thread %s failed itself", thread)


def _log_exception(text: str, name: str) -> None:
    """With its traceback; where memory is too short for that, what follows is done all the same."""
    with contextlib.suppress(Exception):
        log.exception(text, name)


@dataclass(slots=True)
class _Work:
    run: Callable[[], object]
    failed: Callable[[Exception], None] | None


class GuardedWorker:
    """One thread that does one piece of work after the other, and outlives work that raises.

    At most `waiting_max` pieces wait. Work that raises is logged and counted, and its `failed(error)` is called in its
    place: work that has somebody waiting for it names one.
    """

    def __init__(self, name: str, waiting_max: int, kind: str | None = None) -> None:
        """`kind` names the worker's metric where `name` holds an address. Raises RuntimeError or MemoryError where no
        thread can be had."""
        if waiting_max < 1:
            raise ValueError(f"waiting_max is {waiting_max}; it must be at least 1")
        self.name = name
        self._kind = kind or name
        self._waiting_max = waiting_max
        self._waiting: deque[_Work] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, run: Callable[[], object], failed: Callable[[Exception], None] | None = None) -> bool:
        """Queue work. False, and nothing is queued, when `waiting_max` pieces wait already or after `stop`."""
        with self._changed:
            if self._closed or len(self._waiting) >= self._waiting_max:
                return False
            self._waiting.append(_Work(run, failed))
            self._changed.notify()
        return True

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def is_current(self) -> bool:
        """Whether the caller is the worker's thread."""
        return threading.current_thread() is self._thread

    @property
    def waiting(self) -> int:
        """Pieces of work that wait."""
        return len(self._waiting)

    def stop(self) -> None:
        """Take no more; the thread ends after what is queued."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def join(self, timeout_s: float) -> None:
        """Wait for the end, at most `timeout_s` seconds; at once on the worker's own thread."""
        if not self.is_current:
            self._thread.join(timeout_s)

    def close(self, timeout_s: float) -> None:
        """`stop`, and wait; what has not begun after `timeout_s` seconds fails with WorkerClosedError."""
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
            except Exception as error:  # noqa: BLE001 (one piece of work's; the thread goes on)
                count_failure(self._kind)
                _log_exception("work on the thread %s failed", self.name)
                _call_failed(work.failed, error, self.name)
            del work  # what it holds is free before the next piece comes

    def _take(self) -> _Work | None:
        with self._changed:
            while not self._waiting:
                if self._closed:
                    return None
                self._changed.wait()
            return self._waiting.popleft()
