"""Several pool nodes in one process, for `penstock bench scale`: each with memory for blocks."""

from __future__ import annotations

import re
import signal
import sys

from penstock.bench.processes import ReadyProcess
from penstock.pool.local.local_pool import LocalPool
from penstock.pool.members.memory import MemoryMember
from penstock.pool.net.node import PoolNode
from penstock.process.child_python import python_command

READY = re.compile(r"nodes ready on ([\w.:,]+)\.")
STAGING_BYTES = 4 << 20


def nodes_process(nodes: int, memory_bytes: int) -> ReadyProcess:
    """So many nodes, with `memory_bytes` together; their addresses are separated by commas."""
    return ReadyProcess(python_command("-m", __name__, str(nodes), str(memory_bytes)), READY, ready_s=120.0)


def serve(nodes: int, memory_bytes: int) -> None:
    """Runs in a process of its own, until it is ended."""
    made = []
    for number in range(nodes):
        pool = LocalPool([MemoryMember("memory:0", memory_bytes // nodes)], [1e9])
        made.append(PoolNode(pool, "127.0.0.1", 0, f"node{number}", staging_capacity_bytes=STAGING_BYTES))
    print(f"nodes ready on {','.join(node.place for node in made)}.", flush=True)
    signal.pause()


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]))
