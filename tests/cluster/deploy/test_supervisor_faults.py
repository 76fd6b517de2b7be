"""What a supervisor meets that is not its processes' fault: no memory for one, nobody who listens."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from typing import Any

import psutil
import pytest

from penstock.cluster.deploy.cluster_config import ProcessSpec
from penstock.cluster.deploy.supervisor import Child, Supervisor
from penstock.pool.net.connect import connect_node
from penstock.pool.union.union_pool import UnionPool
from tests.asking import wait_until


def spec(name: str) -> ProcessSpec:
    return ProcessSpec(name, "pool", ("pool",), {"memory": ["1MiB"], "listen": "127.0.0.1:0"}, "listen")


class Lines:
    """What a child said; may raise."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.raises = False

    def __call__(self, name: str, line: str) -> None:
        self.lines.append(line)
        if self.raises:
            raise BrokenPipeError("nobody listens")


@pytest.mark.slow
def test_a_process_that_cannot_be_started_now_is_tried_again_and_others_are_watched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told = Lines()
    supervisor = Supervisor([spec("one"), spec("two")], told)
    try:
        supervisor.start(120.0)
        for child in supervisor.children.values():
            assert child._process is not None  # noqa: SLF001 (the process dies behind its supervisor's back)
            child._process.kill()  # noqa: SLF001 (the process dies behind its supervisor's back)
            child._process.wait()  # noqa: SLF001 (the process dies behind its supervisor's back)
        popen = subprocess.Popen
        refused: list[int] = []

        def scarce(*arguments: Any, **named: Any) -> Any:
            if len(refused) < 2:
                refused.append(1)
                raise OSError(11, "Resource temporarily unavailable")
            return popen(*arguments, **named)

        monkeypatch.setattr(subprocess, "Popen", scarce)

        def both_again() -> bool:
            supervisor.watch()
            return all(child.ready.is_set() and child.restarts == 1 for child in supervisor.children.values())

        wait_until(both_again, "both processes", 120.0)
        assert len(refused) == 2 and sum("cannot be started" in line for line in told.lines) == 2
    finally:
        supervisor.stop()


def runs(process: psutil.Process) -> bool:
    """Whether it runs: one that has ended, and that init has not waited for yet, does not."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@pytest.mark.slow
def test_a_pool_of_two_processes_is_started_again_as_a_whole_at_the_same_address() -> None:
    """The process that watches the two is killed: they end, and are there again."""
    one = spec("one")
    supervisor = Supervisor([replace(one, flags={**one.flags, "processes": 2})], Lines())
    try:
        supervisor.start(120.0)
        child = supervisor.children["one"]
        address, parts = child.address, psutil.Process(child.pid).children()
        assert len(parts) == 2
        pool = connect_node(address)
        assert isinstance(pool, UnionPool) and len(pool.weights) == 2
        pool.close(5.0)
        os.kill(child.pid, signal.SIGKILL)

        def again() -> bool:
            supervisor.watch()
            return child.restarts > 0 and child.ready.is_set()

        wait_until(again, "the node", 120.0)
        assert child.address == address and not any(map(runs, parts))
        pool = connect_node(address)
        assert isinstance(pool, UnionPool) and len(pool.weights) == 2
        pool.close(5.0)
    finally:
        supervisor.stop()


def test_a_process_is_read_although_nobody_listens_and_a_line_has_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody reading a pipe stops the process that writes to it."""
    told = Lines()
    told.raises = True
    child = Child(spec("one"), told)
    script = "import sys; sys.stderr.write('x' * 3_000_000); print(); print('done', flush=True)"
    popen = subprocess.Popen

    def other(words: list[str], **named: Any) -> Any:
        return popen([sys.executable, "-c", script], **named)

    monkeypatch.setattr(subprocess, "Popen", other)
    child.start(["pool"])
    assert child._process is not None  # noqa: SLF001 (the process dies behind its supervisor's back)
    assert child._process.wait(60.0) == 0  # noqa: SLF001 (the process dies behind its supervisor's back)
    wait_until(lambda: "done" in told.lines, "the last line")
    wait_until(lambda: sum(len(line) for line in told.lines if line[:1] == "x") == 3_000_000, "all of the long one")
    assert max(map(len, told.lines)) <= 65_536
    child.stop(5.0)


def test_a_start_that_is_to_stop_waits_for_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM while a process takes long to get ready: `penstock up` ends, it does not go on until its time is over."""
    started: list[subprocess.Popen[str]] = []
    popen = subprocess.Popen

    def never_ready(words: list[str], **named: Any) -> Any:
        started.append(popen([sys.executable, "-c", "import time; time.sleep(600)"], **named))
        supervisor.stopping.set()
        return started[-1]

    supervisor = Supervisor([spec("one"), spec("two")], Lines())
    monkeypatch.setattr(subprocess, "Popen", never_ready)
    try:
        supervisor.start(15.0)  # raised StartFailed after this time
        assert len(started) == 1
    finally:
        supervisor.stop()
    assert started[0].poll() is not None
