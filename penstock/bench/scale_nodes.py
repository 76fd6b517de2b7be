"""Several pool nodes for `penstock bench scale`, each with memory for blocks: in a process each, as in a fleet, or all
in one.

Nodes with a process each are forked from one that has imported all they need, so that 64 of them start in two seconds
and share its memory. They end with it, and it ends, with a line, when one of them does.
"""

from __future__ import annotations

import os
import re
import select
import signal
import sys
from typing import NoReturn

import psutil

from penstock.bench.processes import ReadyProcess
from penstock.pool.local.local_pool import LocalPool
from penstock.pool.members.memory import MemoryMember
from penstock.pool.net.node import PoolNode
from penstock.process.child_python import python_command
from penstock.process.die_with_parent import die_with_parent
from penstock.process.startup_objects import freeze_startup_objects

READY = re.compile(r"nodes ready on ([\w.:,]+)\.")
READY_S = 120.0
STAGING_BYTES = 4 << 20
ADDRESS_BYTES_MAX = 64


class Nodes(ReadyProcess):
    """So many nodes, with `memory_bytes` together; their addresses are separated by commas. `apart`: each in a process
    of its own, not all in one."""

    def __init__(self, nodes: int, memory_bytes: int, apart: bool = True) -> None:
        self._apart = apart
        layout = "apart" if apart else "together"
        command = python_command("-m", __name__, str(nodes), str(memory_bytes), layout)
        # A library that starts threads when it is imported must not: they are not in what is forked.
        super().__init__(command, READY, ready_s=READY_S, environment={"OPENBLAS_NUM_THREADS": "1"})

    @property
    def places(self) -> list[str]:
        """The nodes' addresses."""
        return self.address.split(",")

    @property
    def pids(self) -> list[int]:
        """The processes that the nodes are in."""
        return [one.pid for one in psutil.Process(self.pid).children()] if self._apart else [self.pid]


def serve_together(nodes: int, memory_bytes: int) -> NoReturn:
    """Runs in a process of its own, until it is ended."""
    made = [_node(number, memory_bytes // nodes) for number in range(nodes)]
    _say_ready([node.place for node in made])
    while True:
        signal.pause()


def serve_apart(nodes: int, memory_bytes: int) -> NoReturn:
    """As `serve_together`, until it or one of the processes that it forks is ended."""
    freeze_startup_objects()  # a collection would write to memory that is shared
    parent = os.getpid()
    reads: dict[int, int] = {}
    pids: dict[int, int] = {}
    for number in range(nodes):
        here, there = os.pipe()
        pid = os.fork()
        if not pid:
            die_with_parent()
            if os.getppid() == parent:
                _serve_one(number, memory_bytes // nodes, there)
            os._exit(1)
        os.close(there)
        reads[number], pids[pid] = here, number
    _say_ready([_address(reads[number], number) for number in range(nodes)])
    pid, status = os.wait()
    sys.exit(f"the process of node {pids[pid]} ended with status {os.waitstatus_to_exitcode(status)}")


def _serve_one(number: int, memory_bytes: int, said: int) -> None:
    node = _node(number, memory_bytes)
    os.write(said, node.place.encode())
    os.close(said)
    while True:
        signal.pause()


def _address(said: int, number: int) -> str:
    """What a node's process said; it exits where it said nothing."""
    ready, _, _ = select.select([said], [], [], READY_S)
    place = os.read(said, ADDRESS_BYTES_MAX).decode() if ready else ""
    os.close(said)
    if not place:
        sys.exit(f"the process of node {number} did not start")
    return place


def _node(number: int, memory_bytes: int) -> PoolNode:
    pool = LocalPool([MemoryMember("memory:0", memory_bytes)], [1e9])
    return PoolNode(pool, "127.0.0.1", 0, f"node{number}", staging_capacity_bytes=STAGING_BYTES)


def _say_ready(places: list[str]) -> None:
    print(f"nodes ready on {','.join(places)}.", flush=True)


if __name__ == "__main__":
    (serve_apart if sys.argv[3] == "apart" else serve_together)(int(sys.argv[1]), int(sys.argv[2]))
