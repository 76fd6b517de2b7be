"""The agent's child: one `vllm serve`, with its output passed on, and everything that it started ended with it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import IO

from penstock.process.child_python import child_environment, python_command
from penstock.process.die_with_parent import die_with_parent
from penstock.process.guarded_thread import GuardedThread

LINES_KEPT = 1000
LINE_CHARACTERS_MAX = 65_536  # a longer line is split
LAST_OUTPUT_S = 2.0
KILL_S = 5.0
WORDS_CHARACTERS_MAX = 1000
_PROCESS = re.compile(r"^\(\w+ pid=\d+\) ?")  # before each line of vLLM's processes
_ELSEWHERE = "See root cause above"
_SAYS_WHY = re.compile(r"\b\w*(Error|Exception|error):")  # a line that says why a Python process ended


class ChildVllm:
    """Runs from construction on. Construct it on the thread that lives longest: the child dies with that thread."""

    def __init__(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        write: Callable[[str], object] = sys.stderr.write,
    ) -> None:
        """`arguments` are those of `penstock vllm`, `environment` is added to this process's; `write` gets each line of
        output. Raises OSError."""
        self._write = write
        self._lines: deque[str] = deque(maxlen=LINES_KEPT)
        self._process = subprocess.Popen(
            python_command("-m", "penstock", "vllm", *arguments),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=die_with_parent,
            env=child_environment() | dict(environment),
        )
        assert self._process.stdout is not None
        self._reader = GuardedThread("penstock-vllm-output", partial(self._read, self._process.stdout), restarts=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """Process id of vLLM's API server, which leads a session of its own."""
        return self._process.pid

    def _read(self, stream: IO[str]) -> None:
        while line := stream.readline(LINE_CHARACTERS_MAX):
            self._lines.append(line.rstrip("\n"))
            with contextlib.suppress(OSError):  # nobody reads what this process writes
                self._write(line if line.endswith("\n") else f"{line}\n")

    def ended(self) -> str | None:
        """Why it has ended, in one line; None while it runs."""
        status = self._process.poll()
        if status is None:
            return None
        self._reader.join(LAST_OUTPUT_S)
        how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        return f"vLLM {how}: {self._last_words()}" if status > 0 else f"vLLM {how}"

    def _last_words(self) -> str:
        """The last line of output that names an error, with what explains it in the next line; else the last line."""
        lines = [_PROCESS.sub("", line) for line in self._lines if line.strip()]
        causes = [at for at, line in enumerate(lines) if _SAYS_WHY.search(line) and _ELSEWHERE not in line]
        if not causes:
            return lines[-1].strip() if lines else "it said nothing"
        found = lines[causes[-1]].strip()
        following = lines[causes[-1] + 1 :][:1]
        if following and following[0].startswith("  "):  # as pydantic's errors are written
            found += f" {following[0].strip()}"
        return found[:WORDS_CHARACTERS_MAX]

    def stop(self, timeout_s: float) -> None:
        """SIGTERM, then after `timeout_s` SIGKILL, to vLLM and all that it started. May be called again."""
        if self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout_s)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(KILL_S)

    def wait(self, timeout_s: float) -> str | None:
        """As `ended`, after at most `timeout_s` seconds."""
        end_s = time.monotonic() + timeout_s
        while (why := self.ended()) is None and time.monotonic() < end_s:
            time.sleep(0.05)
        return why
