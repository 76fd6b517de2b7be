"""Pool nodes and engines as child processes: started, awaited until ready, and always ended."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import IO, Self

from penstock.process.child_python import child_environment, python_command
from penstock.process.die_with_parent import die_with_parent

POOL_READY = re.compile(r"pool node \S+ ready on ([\w.\-\[\]:]+:\d+)")
SERVE_READY = re.compile(r"listening on (https?://[\w.\-\[\]:]+:\d+)", re.IGNORECASE)
OUTPUT_BYTES_SHOWN = 4000
POLL_S = 0.02


class ProcessFailed(RuntimeError):
    """A process ended or was not ready in time; the message includes the end of its output."""


class ReadyProcess:
    """A command that prints a line when it is ready; `address` is the first group of `ready` in that line.

    Use it as a context manager on a thread that outlives the process: the kernel kills the process when that thread
    ends.
    """

    def __init__(
        self,
        command: Sequence[str],
        ready: re.Pattern[str],
        *,
        ready_s: float,
        stop_s: float = 15.0,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.command = list(command)
        self._environment = environment
        self.address = ""
        self._ready = ready
        self._ready_s = ready_s
        self._stop_s = stop_s
        self._output: IO[bytes] | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        self.await_ready()
        return self

    def start(self) -> None:
        """Start it; `await_ready` or `stop` must follow. Raises OSError."""
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 (`stop` closes it)
        try:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent,
                env=child_environment() | dict(self._environment or {}),
            )
        except BaseException:
            self.stop()
            raise

    def await_ready(self) -> None:
        """Wait for its line. Raises ProcessFailed; the process has ended then."""
        try:
            self.address = self._await_ready(time.monotonic() + self._ready_s)
        except BaseException:
            self.stop()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process is not None, "the process was not started"
        return self._process.pid

    def output(self) -> str:
        """The end of what the process wrote to stdout and stderr."""
        if self._output is None:
            return ""
        size = os.fstat(self._output.fileno()).st_size
        start = max(0, size - OUTPUT_BYTES_SHOWN)
        return os.pread(self._output.fileno(), OUTPUT_BYTES_SHOWN, start).decode(errors="replace")

    def check(self) -> None:
        """Raises ProcessFailed if the process has ended by itself."""
        assert self._process is not None, "the process was not started"
        code = self._process.poll()
        if code is not None:
            raise ProcessFailed(f"{' '.join(self.command)} ended with status {code}; its output ends:\n{self.output()}")

    def _await_ready(self, deadline: float) -> str:
        while True:
            found = self._ready.search(self.output())
            if found:
                return found[1]
            self.check()
            if time.monotonic() > deadline:
                raise ProcessFailed(
                    f"{' '.join(self.command)} was not ready within {self._ready_s:.0f} s; its output ends:\n"
                    f"{self.output()}"
                )
            time.sleep(POLL_S)

    def stop(self) -> None:
        """Send SIGTERM, then after `stop_s` SIGKILL to its whole group; returns when it has ended. May be called
        again."""
        process = self._process
        if process is not None and process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(self._stop_s)
        if process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(self._stop_s)
        if self._output is not None:
            self._output.close()
            self._output = None


def _penstock(*arguments: str) -> list[str]:
    return python_command("-m", "penstock", *arguments)


def pool_process(*arguments: str, ready_s: float = 60.0) -> ReadyProcess:
    """`penstock pool ARGUMENTS`; its address is HOST:PORT."""
    return ReadyProcess(_penstock("pool", *arguments), POOL_READY, ready_s=ready_s)


def serve_process(*arguments: str, ready_s: float = 120.0) -> ReadyProcess:
    """`penstock serve ARGUMENTS`; its address is the base URL of the API."""
    return ReadyProcess(_penstock("serve", *arguments), SERVE_READY, ready_s=ready_s)
