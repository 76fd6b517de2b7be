"""Processes: ready or a clear error with their output, and gone in every case."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from penstock.bench.processes import ProcessFailed, ReadyProcess

READY = re.compile(r"listening on (\S+)")
WAITS = "print('listening on 127.0.0.1:1', flush=True); import sys; sys.stdin.close(); import signal; signal.pause()"


def _python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def _gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_ready_line_gives_the_address_and_the_end_stops_it() -> None:
    with ReadyProcess(_python(WAITS), READY, ready_s=20) as process:
        assert process.address == "127.0.0.1:1"
        process.check()
        pid = process.pid
    assert _gone(pid)


def test_early_end_shows_what_was_written() -> None:
    failing = ReadyProcess(
        _python("import sys; print('no such model', file=sys.stderr); sys.exit(3)"), READY, ready_s=20
    )
    with pytest.raises(ProcessFailed, match=r"ended with status 3; its output ends:\n.*no such model"), failing:
        pass
    assert _gone(failing.pid)


def test_not_ready_in_time_is_killed() -> None:
    silent = ReadyProcess(_python("import signal; print('loading'); signal.pause()"), READY, ready_s=0.3)
    with pytest.raises(ProcessFailed, match=r"was not ready within 0 s"), silent:
        pass
    assert _gone(silent.pid)


def test_a_process_that_ignores_sigterm_is_killed() -> None:
    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + WAITS
    with ReadyProcess(_python(deaf), READY, ready_s=20, stop_s=0.2) as process:
        pid = process.pid
    assert _gone(pid)


def test_death_while_in_use_is_seen() -> None:
    with ReadyProcess(_python(WAITS), READY, ready_s=20) as process:
        os.kill(process.pid, signal.SIGKILL)
        deadline = time.monotonic() + 10
        with pytest.raises(ProcessFailed, match="ended with status -9"):
            while time.monotonic() < deadline:
                process.check()


def test_children_die_with_a_parent_that_was_killed() -> None:
    code = (
        "import re, sys, signal\n"
        "from penstock.bench.processes import ReadyProcess\n"
        f"command = [sys.executable, '-c', {WAITS!r}]\n"
        "p = ReadyProcess(command, re.compile('listening on (.*)'), ready_s=20).__enter__()\n"
        "print(p.pid, flush=True)\n"
        "signal.pause()\n"
    )
    parent = subprocess.Popen(_python(code), stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait(10)
    parent.stdout.close()
    deadline = time.monotonic() + 10
    while not _gone(child) and not _is_zombie(child):
        assert time.monotonic() < deadline, "the child outlived its parent"


def _is_zombie(pid: int) -> bool:
    """Dead, but not yet reaped by whoever adopted it."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True
