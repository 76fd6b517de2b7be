"""Processes of this host: started in order, awaited until ready, restarted when they die, ended in order."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence

from penstock.cluster.deploy.cluster_config import READY, Kind, ProcessSpec
from penstock.process.child_python import python_command
from penstock.process.rate_limited_log import RateLimitedLog
from penstock.process.restarted import POLL_S
from penstock.process.supervised import StartFailed, SupervisedProcess

log = logging.getLogger(__name__)
rare = RateLimitedLog(log)

READY_S = 300.0
STOP_S = 30.0
_ENDING_ORDER: tuple[Kind, ...] = ("router", "engine", "pool")


class Child(SupervisedProcess):
    """One process of a cluster."""

    def __init__(self, spec: ProcessSpec, on_line: Callable[[str, str], None]) -> None:
        super().__init__(spec.name, READY[spec.kind], on_line)
        self.spec = spec
        self._command: list[str] = []

    @property
    def address(self) -> str:
        """The address for clients; empty before the process was ready once."""
        return self.addresses[-1] if self.addresses else ""

    def start(self, command: Sequence[str]) -> None:
        """`command`: the arguments after `penstock`. Raises OSError."""
        self._command = list(command)
        self.begin()

    def start_or_pause(self, command: Sequence[str]) -> None:
        """As `start`, but `watch` tries again where it raises OSError."""
        self._command = list(command)
        self.begin_or_pause()

    def words(self) -> Sequence[str]:
        """The command, with the interpreter of the process's own."""
        return python_command("-m", "penstock", *self._command, interpreter=self.spec.python)

    def await_ready(self, timeout_s: float, stopping: threading.Event) -> None:
        """Wait until the process is ready, or `stopping` is set; it restarts at the same address then. Raises
        StartFailed."""
        super().await_ready(timeout_s, stopping)
        if self.ready.is_set():
            self.keep_port()

    def keep_port(self) -> None:
        """Make a restart use the same port, which others know."""
        flag = self.spec.listen_flag
        if flag is not None and self.address:
            words, option = self._command, "--" + flag.replace("_", "-")
            if option in words:
                words[words.index(option) + 1] = self.address


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
