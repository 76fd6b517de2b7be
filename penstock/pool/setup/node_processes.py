"""A pool node of several processes: they are started together, started again when they die, reloaded and ended
together.

PROCS-1  Statement: A process that dies is started again, after pauses that double; what it holds on SSDs is there then.
         The others serve meanwhile. One that fails to start at first, or STARTS_MAX times in a row later, ends all.
PROCS-2  Statement: A file is applied by all processes or by none (RELOAD-1 of each): all have opened what is new before
         the first one applies it.
PROCS-3  Statement: No process outlives the one that started it: it ends as by SIGTERM when that one is gone.
Verification: tests/pool/setup/test_node_processes.py.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

from penstock.command_line import one_line
from penstock.core.config import ConfigError
from penstock.pool.setup.config import PoolConfig
from penstock.pool.setup.open import check_weights, refuse_two_names
from penstock.pool.setup.reload import ReadConfig
from penstock.pool.setup.split import ProcessConfig, Splitter, process_count
from penstock.process.child_python import python_command
from penstock.process.restarted import POLL_S
from penstock.process.supervised import StartFailed, SupervisedProcess
from penstock.units import format_address, parse_address

log = logging.getLogger(__name__)

READY = r"pool node (\S+) ready on ([\w.\-\[\]:]+:\d+): (.*)"
READY_S = 600.0  # a durable table of many rows takes its time
PREPARE_S = 120.0
APPLY_S = 30.0
STOP_S = 45.0
STARTS_MAX = 5
PORT_TRIES = 100
REFUSED = "penstock pool: error: "


class NodeProcess(SupervisedProcess):
    """One process of the node, which gets its configuration over a connection of its own."""

    death_signal = signal.SIGTERM

    def __init__(self, part: ProcessConfig, log_level: str, on_line: Callable[[str, str], None]) -> None:
        super().__init__(part.config.name, READY, on_line)
        self.part = part
        self.failed_starts = 0
        self._log_level = log_level
        self._asked = 0
        self._control: Connection | None = None
        self._theirs: Connection | None = None

    def words(self) -> Sequence[str]:
        """The command of the process; it inherits its end of the connection."""
        assert self._theirs is not None
        handle = str(self._theirs.fileno())
        return python_command("-m", "penstock.pool.setup.node_process", handle, self._log_level)

    def handles(self) -> Sequence[int]:
        """Its end of the connection."""
        assert self._theirs is not None
        return (self._theirs.fileno(),)

    def begin(self) -> None:
        """Start the process with the configuration that holds now. Raises OSError."""
        self.close()
        self._control, self._theirs = multiprocessing.Pipe()
        try:
            super().begin()
            self._control.send(self.part)
        finally:
            self._theirs.close()
            self._theirs = None

    def watch(self, now: float) -> None:
        """Restart a dead process, after a pause. Raises StartFailed when it failed to start too often."""
        if self.pid and not self.alive and self._again_s is None:
            self.failed_starts = 0 if self.ready.is_set() else self.failed_starts + 1
            if self.failed_starts >= STARTS_MAX:
                raise StartFailed(f"{self.name} failed to start {self.failed_starts} times: {self.last_line}")
        elif self.alive and not self.ready.is_set() and now - self._started_s > READY_S:
            self.terminate()
        super().watch(now)

    def ask(self, what: tuple[str, Any], timeout_s: float) -> Any:
        """The answer of the process. Raises ConfigError when it gives none in time."""
        try:
            if self._control is None or not self.ready.is_set() or not self.alive:
                raise EOFError
            self._asked += 1
            self._control.send((self._asked, *what))
            end_s = time.monotonic() + timeout_s
            while self._control.poll(max(0.0, end_s - time.monotonic())):
                number, answer = self._control.recv()
                if number == self._asked:  # else: of a question that was given up
                    return answer
        except (OSError, EOFError):
            raise ConfigError(f"{self.name} is being started again; allowed: once it is ready") from None
        raise ConfigError(f"{self.name} did not answer within {timeout_s:g} s")

    def close(self) -> None:
        """Close the connection."""
        if self._control is not None:
            self._control.close()
            self._control = None


def serve_processes(config: PoolConfig, count: int, read: ReadConfig, log_level: str) -> None:
    """Serve a node by so many processes, until a signal says stop; SIGHUP reads the file again. Raises ValueError,
    OSError or StartFailed, in one line."""
    refuse_two_names(config.members)
    check_weights(config)
    stopping, reloading = threading.Event(), threading.Event()
    if config.file is not None:
        signal.signal(signal.SIGHUP, lambda *_: reloading.set())
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    with contextlib.ExitStack() as undo:
        ports = hold_ports(config.listen, count, undo)
        node = _Node(config, Splitter(count, ports), log_level, stopping)
        undo.callback(node.stop)
        node.start()
        while not stopping.wait(POLL_S):
            node.watch()
            if reloading.is_set():
                reloading.clear()
                node.reload(read)


def hold_ports(listen: str, count: int, undo: contextlib.ExitStack) -> list[int]:
    """Ports in a row from that of `listen` on (of port 0: that are free), held until `undo` ends: nobody else gets them
    while a process that listens on one is started again. Raises OSError."""
    host, first = parse_address(listen)
    if first:
        return _held(host, first, count, undo)
    for left in reversed(range(PORT_TRIES)):
        with contextlib.ExitStack() as held:
            try:
                (port,) = _held(host, 0, 1, held)
                ports = [port, *_held(host, port + 1, count - 1, held)]
            except OSError:
                if not left:
                    raise
                continue
            undo.enter_context(held.pop_all())
            return ports
    raise AssertionError("the last try returns or raises")


def _held(host: str, first: int, count: int, undo: contextlib.ExitStack) -> list[int]:
    """The sockets do not listen, so with SO_REUSEADDR each process can bind its port beside them."""
    if first + count > 65536:
        raise ConfigError(f"listen has port {first} for {count} processes; allowed: up to {65536 - count}")
    ports = []
    for at in range(count):
        sock = undo.enter_context(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((host, first + at if first else 0))
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}: {format_address(host, first + at)}") from None
        ports.append(sock.getsockname()[1])
    return ports


class _Node:
    """The processes of a node. All calls on one thread."""

    def __init__(self, config: PoolConfig, splitter: Splitter, log_level: str, stopping: threading.Event) -> None:
        self._config, self._splitter, self._stopping = config, splitter, stopping
        self._names = {member.name for member in config.members}  # all that there ever were
        self._started = False
        self._printing = threading.Lock()
        self._processes = [NodeProcess(part, log_level, self._print) for part in splitter.split(config)]

    def start(self) -> None:
        """Start all processes at once; returns when all are ready. Raises StartFailed."""
        for process in self._processes:
            try:
                process.begin()
            except OSError as error:
                raise StartFailed(f"{process.name} cannot be started: {one_line(error)}") from None
        end_s = time.monotonic() + READY_S
        for process in self._processes:
            process.await_ready(max(1.0, end_s - time.monotonic()), self._stopping)
        if self._stopping.is_set():
            return
        self._started = True
        parts = "; ".join(f"{process.addresses[1]} {process.addresses[2]}" for process in self._processes)
        first = self._processes[0].addresses[1]
        print(f"pool node {self._config.name} ready on {first}: {len(self._processes)} processes, {parts}", flush=True)

    def watch(self) -> None:
        """Start dead processes again. Raises StartFailed."""
        for process in self._processes:
            process.watch(time.monotonic())

    def reload(self, read: ReadConfig) -> None:
        """Read the file again and have all processes apply it; a file that one of them refuses changes nothing."""
        try:
            new = read(self._config.members, self._names)
            if new.processes != self._config.processes:
                raise ConfigError(f"{new.file}: processes is changed; allowed: with a restart only")
            process_count(new)
            refuse_two_names(new.members)
            parts = self._splitter.split(new)
            self._prepare(parts)
        except (ValueError, OSError) as error:
            log.error("%s; the pool is unchanged", one_line(error))
            return
        self._config = new
        self._names |= {member.name for member in new.members}
        changes: list[str] = []
        for process, part in zip(self._processes, parts, strict=True):
            process.part = part
            try:
                changes += process.ask(("apply", None), APPLY_S)
            except ConfigError as error:  # it has the new file once it is started again
                log.warning("%s", error)
        done = ", ".join(dict.fromkeys(changes)) or "nothing changed"
        print(f"pool node {self._config.name} reloaded: {done}", flush=True)

    def _prepare(self, parts: Sequence[ProcessConfig]) -> None:
        """Raises ConfigError when a process refuses its part; none has changed then."""
        ready: list[NodeProcess] = []
        try:
            for process, part in zip(self._processes, parts, strict=True):
                ready.append(process)
                if (why := process.ask(("prepare", part.config), PREPARE_S)) is not None:
                    raise ConfigError(why)
        except ConfigError:
            for process in ready:
                with contextlib.suppress(ConfigError):
                    process.ask(("discard", None), APPLY_S)
            raise

    def stop(self) -> None:
        """End all processes: each commits what was written."""
        for process in self._processes:
            process.terminate()
        end_s = time.monotonic() + STOP_S
        for process in self._processes:
            process.stop(max(1.0, end_s - time.monotonic()))
            process.close()

    def _print(self, name: str, line: str) -> None:
        if not self._started and (line.startswith(REFUSED) or "ready on" in line):
            return  # said for all of them together
        with self._printing:
            print(f"{name} | {line}", file=sys.stderr, flush=True)
