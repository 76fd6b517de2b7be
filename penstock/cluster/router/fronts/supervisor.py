"""Starts the front processes of a router, watches them, starts those that end again, and ends them all.

All methods on one thread, which must not end before they do: the kernel kills them with it (`die_with_parent`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import time
from dataclasses import dataclass, field

from penstock.cluster.router.fronts.balance import FrontBalance, make_balance
from penstock.cluster.router.fronts.engine import new_prefix_secret
from penstock.cluster.router.fronts.placer import Placer
from penstock.cluster.router.fronts.shared_prefixes import make_table
from penstock.cluster.router.fronts.start import FrontStart, packed_start
from penstock.cluster.router.router_flags import RouterFlags
from penstock.process.child_python import child_environment, python_command
from penstock.process.die_with_parent import die_with_parent

log = logging.getLogger(__name__)

POLL_S = 0.05
READY_S = 120.0  # a front that does not serve by then is ended, and started again
PAUSES_S = (0.1, 30.0)  # before a front is started again, doubling
STEADY_S = 30.0  # after so long without an end, pauses start from the shortest again
KILLED_S = 5.0


class FrontsFailed(RuntimeError):
    """A front ended before it served any client."""


@dataclass(eq=False)
class _Process:
    slot: int
    popen: subprocess.Popen[bytes] | None = None
    started_s: float = 0.0
    pause_s: float = PAUSES_S[0]
    again_s: float | None = None  # when it is started again


@dataclass(eq=False)
class FrontSupervisor:
    """`stop_soon` may be called from any thread, and from a signal handler."""

    placer: Placer
    flags: RouterFlags
    listener: socket.socket
    fronts: int
    restarts: int = 0
    _stopping: bool = False
    _processes: list[_Process] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._prefixes, self._balance = make_table(), make_balance()
        self._secret = new_prefix_secret()
        self._silent: set[int] = set()
        self.placer.on_silent = self._silent.add

    def stop_soon(self) -> None:
        """Have `start` and `run` return."""
        self._stopping = True

    def _goes_on(self) -> bool:
        """Waits a little; no event, whose lock a signal handler must not take."""
        time.sleep(POLL_S)
        return not self._stopping

    def signal(self, number: int) -> None:
        """Send a signal to all fronts."""
        for process in self._processes:
            if process.popen is not None and process.popen.poll() is None:
                process.popen.send_signal(number)

    def start(self) -> None:
        """Start all fronts, and wait until they serve. Raises FrontsFailed, or OSError."""
        self._processes = [_Process(slot) for slot in range(self.fronts)]
        for process in self._processes:
            self._start(process)
        end_s = time.monotonic() + READY_S
        while len(self.placer.ready) < self.fronts and self._goes_on():
            for process in self._processes:
                if process.popen is not None and process.popen.poll() is not None:
                    raise FrontsFailed(f"front {process.slot} ended with status {process.popen.returncode}")
            if time.monotonic() > end_s:
                raise FrontsFailed(f"a front was not ready within {READY_S:g} s")

    def run(self) -> None:
        """Start fronts again that end, until `stop_soon`."""
        while self._goes_on():
            now = time.monotonic()
            for process in self._processes:
                self._watch(process, now)

    def _watch(self, process: _Process, now: float) -> None:
        popen = process.popen
        if popen is not None and process.slot in self._silent:
            self._silent.discard(process.slot)
            popen.kill()
        if popen is not None and popen.poll() is None:
            if now - process.started_s > READY_S and process.slot not in self.placer.ready:
                log.error("front %d is ended: it was not ready within %g s", process.slot, READY_S)
                popen.kill()
            return
        if process.again_s is None:
            status = popen.returncode if popen is not None else None
            if now - process.started_s > STEADY_S:
                process.pause_s = PAUSES_S[0]
            self._pause(process, now, f"ended with status {status}")
        elif now >= process.again_s:
            try:
                self._start(process)
                self.restarts += 1
            except OSError as error:  # no memory, or too many processes, at present
                self._pause(process, now, f"cannot be started: {error}")

    def _pause(self, process: _Process, now: float, why: str) -> None:
        log.error("front %d %s; again in %g s", process.slot, why, process.pause_s)
        process.again_s = now + process.pause_s
        FrontBalance(self._balance, process.slot, self.fronts).have(None)
        process.pause_s = min(2 * process.pause_s, PAUSES_S[1])

    def _start(self, process: _Process) -> None:
        """Raises OSError."""
        channel, its_channel = socket.socketpair()
        links, its_links = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with its_channel, its_links:
            try:
                FrontBalance(self._balance, process.slot, self.fronts).have(None)  # until it accepts
                shared = self._prefixes, self._balance
                files = self.listener.fileno(), its_channel.fileno(), its_links.fileno(), *shared
                start = FrontStart(process.slot, self.fronts, *files, self._secret, self.flags)
                process.again_s, process.started_s = None, time.monotonic()
                process.popen = popen = subprocess.Popen(
                    python_command("-m", "penstock.cluster.router.fronts.process"),
                    stdin=subprocess.PIPE,
                    pass_fds=files,
                    start_new_session=True,  # a Ctrl-C is for the placer, which ends the fronts in order
                    preexec_fn=die_with_parent,
                    env=child_environment(),
                )
                assert popen.stdin is not None
                with contextlib.suppress(BrokenPipeError), popen.stdin as pipe:  # it ended already, as `_watch` sees
                    pipe.write(packed_start(start))
            except BaseException:
                channel.close()
                links.close()
                raise
        self.placer.attach(process.slot, channel, links)

    def stop(self, timeout_s: float) -> None:
        """End all fronts in order: they let their requests end within `timeout_s`; then those that are left at once."""
        self._stopping = True
        self.signal(signal.SIGTERM)
        running = [process.popen for process in self._processes if process.popen is not None]
        end_s = time.monotonic() + timeout_s
        for popen in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                popen.wait(max(0.0, end_s - time.monotonic()))
        for popen in running:
            if popen.poll() is None:
                log.error("a front did not end within %.0f s", timeout_s)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(popen.pid, signal.SIGKILL)  # what it started, too
            with contextlib.suppress(subprocess.TimeoutExpired):
                popen.wait(KILLED_S)
        os.close(self._prefixes)
        os.close(self._balance)
