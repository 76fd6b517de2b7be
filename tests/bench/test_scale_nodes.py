"""The nodes of `penstock bench scale`: each in a process of its own or all in one, and none of them is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import time

import psutil
import pytest

from penstock.bench.process_cpu import cpu_s
from penstock.bench.processes import ProcessFailed
from penstock.bench.scale_nodes import Nodes
from penstock.pool.net.connect import open_union
from tests.pool.helpers import key_of, until

WAIT_S = 20.0


def _gone(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize("apart", [True, False])
def test_nodes_serve_and_their_processes_are_known(apart: bool) -> None:
    with Nodes(3, 3 << 20, apart) as nodes:
        pids = nodes.pids
        assert len(nodes.places) == 3 and len(set(pids)) == (3 if apart else 1)
        pool = open_union(None, nodes.places, [1e9] * 3)
        before_s = [cpu_s(pid) for pid in pids]
        assert pool.lookup([key_of("a")], WAIT_S) == [None]
        assert all(cpu_s(pid) > begin_s for pid, begin_s in zip(pids, before_s, strict=True))
        assert pool.stat(WAIT_S).members and len(pool.stat(WAIT_S).members) == 3
        pool.close(5.0)
    until(lambda: all(map(_gone, pids)), WAIT_S)


def test_a_node_that_dies_is_named_and_ends_the_others() -> None:
    with Nodes(3, 3 << 20) as nodes:
        pids = nodes.pids
        nodes.check()
        os.kill(pids[1], signal.SIGKILL)
        until(lambda: all(map(_gone, pids)), WAIT_S)
        with pytest.raises(ProcessFailed, match=r"the process of node \d ended with status -9"):
            nodes.check()


def test_nodes_end_with_the_process_that_forked_them_however_that_ends() -> None:
    with Nodes(2, 2 << 20) as nodes:
        pids = nodes.pids
        os.kill(nodes.pid, signal.SIGKILL)
        until(lambda: all(map(_gone, pids)), WAIT_S)


def test_nodes_that_cannot_be_made_are_an_error_with_their_reason() -> None:
    nodes = Nodes(2, 1 << 60)
    with pytest.raises(ProcessFailed, match="the process of node 0 did not start"), nodes:
        pass


def test_the_cpu_time_of_a_process_counts_what_it_did() -> None:
    begin_s, own_begin_s = cpu_s(os.getpid()), time.process_time()
    while time.process_time() < own_begin_s + 0.02:
        pass
    assert 0.02 <= cpu_s(os.getpid()) - begin_s <= time.process_time() - own_begin_s + 0.02
    assert cpu_s() == 0.0 and cpu_s(os.getpid(), os.getpid()) > cpu_s(os.getpid())


def test_the_cpu_time_of_a_process_that_is_gone_is_an_error() -> None:
    ended = subprocess.Popen(["true"])
    ended.wait(WAIT_S)
    with pytest.raises(OSError, match="Invalid argument"):
        cpu_s(ended.pid)
