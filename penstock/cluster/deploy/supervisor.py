"""Processes of this host: started in order, awaited until ready, restarted when they die, ended in order."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import IO

from penstock.cluster.deploy.cluster_config import READY, Kind, ProcessSpec
from penstock.process.child_python import child_environment, python_command
from penstock.process.die_with_parent import die_with_parent
from penstock.process.guarded_thread import GuardedThread
from penstock.process.rate_limited_log import RateLimitedLog

log = logging.getLogger(__name__)
rare = RateLimitedLog(log)

READY_S = 300.0
STOP_S = 30.0
POLL_S = 0.05
PAUSES_S = (0.5, 30.0)  # before a dead process is restarted, doubling
STEADY_S = 30.0  # after so long without an end, pauses start from the shortest again
LINES_KEPT = 40
LINE_CHARACTERS_MAX = 65_536  # a longer line is split
_ENDING_ORDER: tuple[Kind, ...] = ("router", "engine", "pool")


class StartFailed(RuntimeError):
    """A process did not become ready; the message has its last output line."""


class Child:
    """One process, and its last output line. Starts and restarts happen on the caller's thread: the process dies with
    that thread."""

    def __init__(self, spec: ProcessSpec, on_line: Callable[[str, str], None]) -> None:
        self.spec = spec
        self.restarts = 0
        self.addresses: tuple[str, ...] = ()
        self.ready = threading.Event()
        self.pid = 0
        self._on_line = on_line
        self._lines: deque[str] = deque(maxlen=LINES_KEPT)
        self._process: subprocess.Popen[str] | None = None
        self._command: list[str] = []
        self._started_s = 0.0
        self._pause_s = PAUSES_S[0]
        self._again_s: float | None = None  # when it is to be started again

    @property
    def address(self) -> str:
        """The address for clients; empty before the process was ready once."""
        return self.addresses[-1] if self.addresses else ""

    def start(self, command: Sequence[str]) -> None:
        """`command`: the arguments after `penstock`. Raises OSError."""
        self._command = list(command)
        self._start()

    def start_or_pause(self, command: Sequence[str]) -> None:
        """As `start`, but `watch` tries again where it raises OSError."""
        try:
            self.start(command)
        except OSError as error:
            self._lines.append(f"cannot be started: {error}")
            self._pause(time.monotonic(), self._lines[-1])

    @property
    def failure(self) -> str | None:
        """Why it never became ready, with its last output line; None while it may, and after it did once."""
        process = self._process
        if self.addresses:
            return None
        if process is None:
            return self._lines[-1] if self._again_s is not None else None
        if process.poll() is None:
            return None
        time.sleep(POLL_S)  # for its last output
        return f"ended with status {process.returncode}: {self._lines[-1] if self._lines else 'it said nothing'}"

    def _start(self) -> None:
        self.ready.clear()
        process = subprocess.Popen(
            python_command("-m", "penstock", *self._command, interpreter=self.spec.python),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=die_with_parent,
            env=child_environment(),
        )
        self._process, self.pid = process, process.pid
        self._again_s = None
        self._started_s = time.monotonic()
        for stream in (process.stdout, process.stderr):
            assert stream is not None
            GuardedThread(f"output-{self.spec.name}", partial(self._read, stream), kind="output", restarts=True).start()

    def _read(self, stream: IO[str]) -> None:
        """Read until the process closes the stream: a process whose output is not read would block."""
        while line := stream.readline(LINE_CHARACTERS_MAX):
            line = line.rstrip("\n")
            self._lines.append(line)
            self._say(line)
            found = re.search(READY[self.spec.kind], line)
            if found and not self.ready.is_set():
                self.addresses = found.groups()
                self.ready.set()

    def _say(self, line: str) -> None:
        try:
            self._on_line(self.spec.name, line)
        except Exception as error:  # noqa: BLE001 (the output is lost; the process goes on)
            rare.warning("output", "a line of %s could not be printed: %r", self.spec.name, error)

    def await_ready(self, timeout_s: float, stopping: threading.Event) -> None:
        """Wait until the process is ready, or `stopping` is set. Raises StartFailed."""
        end_s = time.monotonic() + timeout_s
        while not self.ready.wait(POLL_S):
            if stopping.is_set():
                return
            why = self.failure
            if why is not None:
                raise StartFailed(f"{self.spec.name} {why}")
            if time.monotonic() > end_s:
                raise StartFailed(f"{self.spec.name} was not ready within {timeout_s:g} s")
        self.keep_port()

    def keep_port(self) -> None:
        """Make a restart use the same port, which others know."""
        flag = self.spec.listen_flag
        if flag is not None and self.address:
            words, option = self._command, "--" + flag.replace("_", "-")
            if option in words:
                words[words.index(option) + 1] = self.address

    def watch(self, now: float) -> None:
        """Restart a dead process, after a pause."""
        process = self._process
        if (process is None and self._again_s is None) or (process is not None and process.poll() is None):
            return
        if self._again_s is None:
            assert process is not None
            self._pause_s = PAUSES_S[0] if now - self._started_s > STEADY_S else self._pause_s
            self._pause(now, f"ended with status {process.returncode}")
        elif now >= self._again_s:
            try:
                self._start()
            except OSError as error:  # no memory, or too many processes, at present
                self._pause(now, f"cannot be started: {error}")
            else:
                self.restarts += 1

    def _pause(self, now: float, why: str) -> None:
        self._again_s = now + self._pause_s
        self._say(f"{why}; again in {self._pause_s:g} s")
        self._pause_s = min(2 * self._pause_s, PAUSES_S[1])

    def terminate(self) -> None:
        """Send SIGTERM if it runs; does not wait."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()

    def stop(self, timeout_s: float) -> None:
        """Send SIGTERM, then SIGKILL to the whole process group."""
        process, self._again_s = self._process, None
        if process is None:
            return
        self.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, timeout_s))
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5.0)
        self._process = None


class Supervisor:
    """All processes of a cluster on this host. All calls, except `stopping.set()`, on one thread."""

    def __init__(self, processes: Sequence[ProcessSpec], on_line: Callable[[str, str], None]) -> None:
        """`on_line(name, line)` is called with each output line of a process, on other threads."""
        self.children = {spec.name: Child(spec, on_line) for spec in processes}
        self.stopping = threading.Event()

    @property
    def url(self) -> str:
        """URL of the router's API."""
        return next(child.addresses[0] for child in self.children.values() if child.spec.kind == "router")

    def start(self, ready_s: float = READY_S) -> None:
        """Start pools, then the router, then all engines at once; returns when they are ready, or `stopping` is set.
        Raises StartFailed; all processes have ended then."""
        end_s = time.monotonic() + ready_s
        try:
            for kinds in (("pool",), ("router",), ("engine",)):
                group = [child for child in self.children.values() if child.spec.kind in kinds]
                for child in group:
                    if self.stopping.is_set():
                        return
                    try:
                        child.start(child.spec.command(self._addresses()))
                    except OSError as error:
                        raise StartFailed(f"{child.spec.name} cannot be started: {error}") from None
                for child in group:
                    child.await_ready(max(1.0, end_s - time.monotonic()), self.stopping)
        except BaseException:
            self.stop()
            raise

    def _addresses(self) -> dict[str, list[str]]:
        """The addresses that engines get: of the router and of all pools."""
        found: dict[str, list[str]] = {}
        for child in self.children.values():
            if child.address and child.spec.kind in ("pool", "router"):
                found.setdefault(child.spec.kind, []).append(child.address)
        return found

    def run(self) -> None:
        """Restart processes that die, until `stopping` is set."""
        while not self.stopping.wait(POLL_S):
            self.watch()

    def watch(self) -> None:
        """Restart dead processes; an error with one process does not stop the restarts of the others."""
        for child in self.children.values():
            try:
                child.watch(time.monotonic())
            except Exception as error:  # noqa: BLE001 (the other processes must be watched too)
                rare.exception(f"watch {child.spec.name}", "%s could not be watched: %r", child.spec.name, error)

    def stop(self, timeout_s: float = STOP_S) -> None:
        """End the router first, so that its clients are answered; then engines, then pools."""
        self.stopping.set()
        end_s = time.monotonic() + timeout_s
        for kind in _ENDING_ORDER:
            group = [child for child in self.children.values() if child.spec.kind == kind]
            for child in group:
                with contextlib.suppress(OSError):
                    child.terminate()
            for child in group:
                try:
                    child.stop(max(1.0, end_s - time.monotonic()))
                except OSError as error:  # the others must end too
                    log.error("%s could not be ended: %s", child.spec.name, error)
