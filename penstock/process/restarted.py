"""A child process that is started again, after a pause, when it ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from typing import Any

POLL_S = 0.05
PAUSES_S = (0.5, 30.0)  # before a process is started again, doubling
STEADY_S = 30.0  # after so long without an end, pauses start from the shortest again
KILLED_S = 5.0  # until a killed process is gone


class RestartedProcess:
    """One process, which `_spawn` starts. Starts happen on the caller's thread, which must not end before the process:
    the kernel ends it then (`die_with_parent`)."""

    pauses_s = PAUSES_S

    def __init__(self, name: str) -> None:
        self.name = name
        self.restarts = 0
        self.pid = 0
        self._process: subprocess.Popen[Any] | None = None
        self._started_s = 0.0
        self._pause_s = self.pauses_s[0]
        self._again_s: float | None = None  # when it is to be started again
        self._terminated = False

    def _spawn(self) -> subprocess.Popen[Any]:
        """Start the process, as the leader of a session of its own. Raises OSError."""
        raise NotImplementedError

    def _say(self, line: str) -> None:
        """Tell the operator what became of the process."""
        raise NotImplementedError

    def begin(self) -> None:
        """Start the process. Raises OSError."""
        self._again_s, self._started_s = None, time.monotonic()
        self._process, self._terminated = self._spawn(), False
        self.pid = self._process.pid

    def begin_or_pause(self) -> None:
        """As `begin`, but `watch` tries again where it raises OSError."""
        try:
            self.begin()
        except OSError as error:  # no memory, or too many processes, at present
            self._pause(time.monotonic(), f"cannot be started: {error}")

    @property
    def alive(self) -> bool:
        """Whether the process was started and has not ended."""
        return self._process is not None and self._process.poll() is None

    @property
    def status(self) -> int | None:
        """The exit status of a process that has ended."""
        return None if self._process is None else self._process.poll()

    def watch(self, now: float) -> None:
        """Start a process that has ended again, after a pause."""
        if self.alive or (self._process is None and self._again_s is None):
            return
        if self._again_s is None:
            self._pause_s = self.pauses_s[0] if now - self._started_s > STEADY_S else self._pause_s
            self._pause(now, f"ended with status {self.status}")
        elif now >= self._again_s:
            self.begin_or_pause()
            self.restarts += self._again_s is None

    def _pause(self, now: float, why: str) -> None:
        self._again_s = now + self._pause_s
        self._say(f"{why}; again in {self._pause_s:g} s")
        self._pause_s = min(2 * self._pause_s, self.pauses_s[1])

    def send(self, number: int) -> None:
        """Send a signal to the process if it runs."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def terminate(self) -> None:
        """Send SIGTERM once if it runs (a second one would end a server at once); does not wait."""
        if not self._terminated:
            self._terminated = True
            self.send(signal.SIGTERM)

    def stop(self, timeout_s: float) -> None:
        """Send SIGTERM, then SIGKILL to the whole process group; it is not started again."""
        process, self._again_s = self._process, None
        if process is None:
            return
        self.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, timeout_s))
        if process.poll() is None:
            self._say(f"did not end within {timeout_s:.0f} s")
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(KILLED_S)
        self._process = None
