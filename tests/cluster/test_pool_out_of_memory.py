"""A pool node out of memory, and a pool that is full, under load: right answers, no hang, the node dropped or back."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from penstock.cluster.deploy.supervisor import Child, Supervisor
from penstock.pool.api import PoolError, PoolStat
from penstock.pool.net.connect import connect_pool
from penstock.pool.net.secret import Secret
from tests.cluster.kill_rounds import CLUSTER, Load, kill, running, until_up

ANSWERS = 12
MORE_S = 60.0
POOL = '[[pool]]\nmemory = ["32MiB"]\n'
SMALL_POOL = POOL.replace("32MiB", "128KiB")  # two blocks
POOLS = CLUSTER.replace("count = 2\n", "").replace(POOL, POOL + SMALL_POOL)  # with one engine of each role


def pools(supervisor: Supervisor) -> list[Child]:
    return [child for child in supervisor.children.values() if child.spec.kind == "pool"]


def answers_go_on(load: Load, supervisor: Supervisor, count: int = ANSWERS) -> None:
    """So many more of them within `MORE_S`, all right."""
    wanted, end = load.counts.answers + count, time.monotonic() + MORE_S
    while load.counts.answers < wanted:
        supervisor.watch()
        assert time.monotonic() < end, f"{load.counts.answers} answers, {wanted} wanted within {MORE_S:g} s"
        time.sleep(0.02)
    assert not load.counts.wrong and not load.counts.failed, (load.counts.wrong, load.counts.failed)


def stat_of(child: Child, secret_file: Path) -> PoolStat:
    pool = connect_pool(child.address, secret=Secret.read(secret_file))
    try:
        return pool.stat(5.0)
    finally:
        pool.close(5.0)


def until_served(child: Child, secret_file: Path) -> None:
    """The node, or the one that was started in its place, answers."""
    end = time.monotonic() + MORE_S
    while True:
        try:
            assert stat_of(child, secret_file).members[0].healthy
            return
        except PoolError:
            assert time.monotonic() < end, f"no answer of {child.address} within {MORE_S:g} s"
            time.sleep(0.1)


def leave_no_memory(pid: int) -> None:
    """From now on no mapping can be had: no thread's stack, no larger buffer."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
    resource.prlimit(pid, resource.RLIMIT_AS, (pages * resource.getpagesize() // 2, resource.RLIM_INFINITY))


@pytest.mark.slow
def test_a_full_pool_node_and_one_out_of_memory_under_load(tmp_path: Path) -> None:
    with running(tmp_path, POOLS) as (supervisor, reference):
        secret = tmp_path / "secret"
        short, full = pools(supervisor)
        load = Load(supervisor.url, reference, 1)
        try:
            answers_go_on(load, supervisor, 2 * ANSWERS)
            stat = stat_of(full, secret)
            assert stat.evictions + stat.writes_dropped > 0, "the pool was full"
            assert stat.members[0].used_bytes <= stat.members[0].capacity_bytes
            leave_no_memory(short.pid)
            answers_go_on(load, supervisor)
            # An engine that starts anew needs new connections, which that node has no memory for.
            engine = next(child for child in supervisor.children.values() if child.spec.kind == "engine")
            kill(engine, supervisor, load.counts)
            answers_go_on(load, supervisor)
            if short.restarts == 0:
                resource.prlimit(short.pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            until_up(supervisor)
            until_served(short, secret)
            answers_go_on(load, supervisor)
        finally:
            counts = load.stop()
    assert not counts.wrong and not counts.failed, (counts.wrong, counts.failed)
    said = (tmp_path / "output.txt").read_text()
    assert "refused: " in said or "the node ends" in said, "it said that it was out of memory"


def test_a_node_that_cannot_have_its_memory_is_refused_in_one_line() -> None:
    command = [sys.executable, "-m", "penstock", "pool", "--listen", "127.0.0.1:0", "--memory", "8GiB"]

    def little() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))

    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, preexec_fn=little)
    assert ended.returncode == 2 and len(ended.stderr.splitlines()) == 1, ended.stderr
    assert "cannot be allocated" in ended.stderr


_FAIL = """
import sys, threading
from penstock.pool.net import node
from penstock.pool.setup import pool_command
def fail(): raise MemoryError
real = node.PoolNode.__init__
def begin(self, *args, **more):
    real(self, *args, **more)
    threading.Timer(0.1, fail).start()
node.PoolNode.__init__ = begin
from penstock.cli import app
app(["pool", "--listen", "127.0.0.1:0", "--memory", "1MiB"])
"""


def test_a_node_that_loses_a_thread_ends() -> None:
    ended = subprocess.run([sys.executable, "-c", _FAIL], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 70, ended
    assert ended.stderr.splitlines()[-1].endswith("failed: MemoryError(); the node ends")
