"""A process that is awaited until it says that it is ready, and started again, after a pause, when it dies."""

from __future__ import annotations

import logging
import re
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import IO

from penstock.process.child_python import child_environment
from penstock.process.die_with_parent import die_with_parent
from penstock.process.guarded_thread import GuardedThread
from penstock.process.rate_limited_log import RateLimitedLog
from penstock.process.restarted import POLL_S, RestartedProcess

log = logging.getLogger(__name__)
rare = RateLimitedLog(log)

LINES_KEPT = 40
LINE_CHARACTERS_MAX = 65_536  # a longer line is split


class StartFailed(RuntimeError):
    """A process did not become ready; the message has its last output line."""


class SupervisedProcess(RestartedProcess):
    """One process, and its last output lines. Starts and restarts happen on the caller's thread: the process gets
    `death_signal` when that thread ends."""

    death_signal = signal.SIGKILL

    def __init__(self, name: str, ready: str, on_line: Callable[[str, str], None]) -> None:
        """The process is ready once it prints a line that matches `ready`, whose groups are its addresses.
        `on_line(name, line)` is called with each output line, on other threads."""
        super().__init__(name)
        self.addresses: tuple[str, ...] = ()
        self.ready = threading.Event()
        self._ready = ready
        self._on_line = on_line
        self._lines: deque[str] = deque(maxlen=LINES_KEPT)

    def words(self) -> Sequence[str]:
        """The command to start the process with, now."""
        raise NotImplementedError

    def handles(self) -> Sequence[int]:
        """Files that the process is to inherit; asked for before each start."""
        return ()

    def _spawn(self) -> subprocess.Popen[str]:
        self.ready.clear()
        return subprocess.Popen(
            list(self.words()),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=partial(die_with_parent, self.death_signal),
            pass_fds=tuple(self.handles()),
            env=child_environment(),
        )

    def begin(self) -> None:
        """Start the process, and the threads that read its output. Raises OSError."""
        super().begin()
        assert self._process is not None
        for stream in (self._process.stdout, self._process.stderr):
            assert stream is not None
            GuardedThread(f"output-{self.name}", partial(self._read, stream), kind="output", restarts=True).start()

    def _pause(self, now: float, why: str) -> None:
        if self._process is None:  # it never started: what is said of it is all there is
            self._lines.append(why)
        super()._pause(now, why)

    def _read(self, stream: IO[str]) -> None:
        """Read until the process closes the stream: a process whose output is not read would block."""
        while line := stream.readline(LINE_CHARACTERS_MAX):
            line = line.rstrip("\n")
            self._lines.append(line)
            self._say(line)
            found = re.search(self._ready, line)
            if found and not self.ready.is_set():
                self.addresses = found.groups()
                self.ready.set()

    def _say(self, line: str) -> None:
        try:
            self._on_line(self.name, line)
        except Exception as error:  # noqa: BLE001 (the output is lost; the process goes on)
            rare.warning("output", "a line of %s could not be printed: %r", self.name, error)

    @property
    def last_line(self) -> str:
        """What the process printed last."""
        return self._lines[-1] if self._lines else "it said nothing"

    @property
    def failure(self) -> str | None:
        """Why it never became ready, with its last output line; None while it may, and after it did once."""
        if self.addresses:
            return None
        if self._process is None:
            return self.last_line if self._again_s is not None else None
        if self._process.poll() is None:
            return None
        time.sleep(POLL_S)  # for its last output
        return f"ended with status {self._process.returncode}: {self.last_line}"

    def await_ready(self, timeout_s: float, stopping: threading.Event) -> None:
        """Wait until the process is ready, or `stopping` is set. Raises StartFailed."""
        end_s = time.monotonic() + timeout_s
        while not self.ready.wait(POLL_S):
            if stopping.is_set():
                return
            why = self.failure
            if why is not None:
                raise StartFailed(f"{self.name} {why}")
            if time.monotonic() > end_s:
                raise StartFailed(f"{self.name} was not ready within {timeout_s:g} s")
