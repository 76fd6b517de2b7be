"""A process is started again after pauses that double, and ends as it was asked to."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.process.child_python import python_command
from penstock.process.restarted import STEADY_S, RestartedProcess
from tests.waiting import wait_until

COUNTS_SIGNALS = """
import pathlib, signal, sys, time
got = []
signal.signal(signal.SIGTERM, lambda *_: got.append(1))
count = pathlib.Path(sys.argv[1])
count.write_text("0")
while not got:
    time.sleep(0.01)
time.sleep(0.3)
count.write_text(str(len(got)))
"""
SLEEPS = "import time; time.sleep(600)"


class Started(RestartedProcess):
    def __init__(self, *words: str) -> None:
        super().__init__("it")
        self.words, self.said, self.refused = words, list[str](), False

    def _spawn(self) -> subprocess.Popen[bytes]:
        if self.refused:
            raise OSError("no memory")
        return subprocess.Popen(python_command("-c", *self.words), start_new_session=True)

    def _say(self, line: str) -> None:
        self.said.append(line)


@contextlib.contextmanager
def started(*words: str) -> Iterator[Started]:
    process = Started(*words)
    process.begin()
    try:
        yield process
    finally:
        process.stop(0.0)


def ended(process: RestartedProcess) -> None:
    os.kill(process.pid, signal.SIGKILL)
    wait_until(lambda: not process.alive, "ended")


def test_pauses_double_and_a_steady_process_begins_with_the_shortest() -> None:
    with started(SLEEPS) as process:
        now, first = time.monotonic(), process.pid
        process.watch(now)
        assert process.said == [] and process.pid == first
        ended(process)
        process.watch(now)
        process.watch(now + 0.49)
        assert not process.alive and process.restarts == 0
        process.watch(now + 0.51)
        assert process.alive and process.restarts == 1 and process.pid != first
        ended(process)
        process.watch(now)
        ended_late = now + STEADY_S + 3600
        process.watch(now + 1.01)
        ended(process)
        process.watch(ended_late)
        again = "ended with status -9; again in {} s"
        assert process.said == [again.format("0.5"), again.format("1"), again.format("0.5")]


def test_one_that_cannot_be_started_is_tried_again() -> None:
    process = Started(SLEEPS)
    process.refused = True
    with pytest.raises(OSError, match="no memory"):
        process.begin()
    now = time.monotonic()
    process.begin_or_pause()
    process.watch(now + 1.0)
    assert process.said == [f"cannot be started: no memory; again in {s} s" for s in ("0.5", "1")]
    process.refused = False
    process.watch(now + 60.0)
    try:
        assert process.alive and process.restarts == 1
    finally:
        process.stop(0.0)


def test_it_is_terminated_once(tmp_path: Path) -> None:
    count = tmp_path / "signals"
    with started(COUNTS_SIGNALS, str(count)) as process:
        wait_until(count.exists, "ready")
        process.terminate()
        time.sleep(0.1)
        process.terminate()
        process.stop(60.0)
        assert count.read_text() == "1"
        process.watch(time.monotonic() + 60.0)
        assert not process.alive and process.said == []
