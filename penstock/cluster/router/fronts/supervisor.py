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
from penstock.process.restarted import POLL_S, RestartedProcess

log = logging.getLogger(__name__)

READY_S = 120.0  # a front that does not serve by then is ended, and started again


class FrontsFailed(RuntimeError):
    """A front ended before it served any client."""


class FrontProcess(RestartedProcess):
    """One front: each start of it gets ends of two new socket pairs with the placer."""

    pauses_s = (0.1, 30.0)

    def __init__(self, slot: int, common: FrontSupervisor) -> None:
        super().__init__(f"front {slot}")
        self.slot = slot
        self._common = common

    def _say(self, line: str) -> None:
        log.error("%s %s", self.name, line)

    def _spawn(self) -> subprocess.Popen[bytes]:
        common = self._common
        channel, its_channel = socket.socketpair()
        links, its_links = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with its_channel, its_links:
            try:
                self._take_no_more()  # until it accepts
                shared = common.prefixes, common.balance
                files = common.listener.fileno(), its_channel.fileno(), its_links.fileno(), *shared
                start = FrontStart(self.slot, common.fronts, *files, common.secret, common.flags)
                process = subprocess.Popen(
                    python_command("-m", "penstock.cluster.router.fronts.process"),
                    stdin=subprocess.PIPE,
                    pass_fds=files,
                    start_new_session=True,  # a Ctrl-C is for the placer, which ends the fronts in order
                    preexec_fn=die_with_parent,
                    env=child_environment(),
                )
                assert process.stdin is not None
                with contextlib.suppress(BrokenPipeError), process.stdin as pipe:  # it ended already, as `watch` sees
                    pipe.write(packed_start(start))
            except BaseException:
                channel.close()
                links.close()
                raise
        common.placer.attach(self.slot, channel, links)
        return process

    def _take_no_more(self) -> None:
        FrontBalance(self._common.balance, self.slot, self._common.fronts).have(None)

    def _pause(self, now: float, why: str) -> None:
        super()._pause(now, why)
        self._take_no_more()

    def watch(self, now: float) -> None:
        """Kill it if it serves nobody, and start it again if it has ended."""
        if self.slot in self._common.silent:
            self._common.silent.discard(self.slot)
            self.send(signal.SIGKILL)
        elif self.alive and now - self._started_s > READY_S and self.slot not in self._common.placer.ready:
            self._say(f"is ended: it was not ready within {READY_S:g} s")
            self.send(signal.SIGKILL)
        super().watch(now)


@dataclass(eq=False)
class FrontSupervisor:
    """`stop_soon` may be called from any thread, and from a signal handler."""

    placer: Placer
    flags: RouterFlags
    listener: socket.socket
    fronts: int
    _stopping: bool = False
    _processes: list[FrontProcess] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.prefixes, self.balance = make_table(), make_balance()
        self.secret = new_prefix_secret()
        self.silent: set[int] = set()
        self.placer.on_silent = self.silent.add

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
            process.send(number)

    def start(self) -> None:
        """Start all fronts, and wait until they serve. Raises FrontsFailed, or OSError."""
        self._processes = [FrontProcess(slot, self) for slot in range(self.fronts)]
        for process in self._processes:
            process.begin()
        end_s = time.monotonic() + READY_S
        while len(self.placer.ready) < self.fronts and self._goes_on():
            for process in self._processes:
                if process.status is not None:
                    raise FrontsFailed(f"{process.name} ended with status {process.status}")
            if time.monotonic() > end_s:
                raise FrontsFailed(f"a front was not ready within {READY_S:g} s")

    def run(self) -> None:
        """Start fronts again that end, until `stop_soon`."""
        while self._goes_on():
            now = time.monotonic()
            for process in self._processes:
                process.watch(now)

    def stop(self, timeout_s: float) -> None:
        """End all fronts in order: they let their requests end within `timeout_s`; then those that are left at once."""
        self._stopping = True
        self.placer.fronts_may_end()
        for process in self._processes:
            process.terminate()
        end_s = time.monotonic() + timeout_s
        for process in self._processes:
            process.stop(max(0.0, end_s - time.monotonic()))
        os.close(self.prefixes)
        os.close(self.balance)
