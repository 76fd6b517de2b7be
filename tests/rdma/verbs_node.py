"""A pool node whose memory is registered with the guest's RDMA devices, without the packages of the command line.

It serves in namespaces of its own: for UCX it is on another host, whose memory it reads over verbs only.

`python -m tests.rdma.verbs_node HOST:PORT nixl|verbs [LOCKED_BYTES]`: with LOCKED_BYTES as a user who may lock no more
memory."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
import threading
from pathlib import Path

from penstock.pool.net.node import PoolNode
from penstock.pool.net.open_agent import open_agent
from penstock.pool.setup.open import open_local_pool
from penstock.units import parse_address

DEVICES = ("rxe0", "rxe1")
MEMORY_BYTES, STAGING_BYTES = 8 << 20, 4 << 20
NOBODY = 65534
_CLONE_NEWIPC, _CLONE_NEWPID = 0x08000000, 0x20000000
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def leave_host() -> None:
    """Go on in a child with namespaces of its own, which ends with this process."""
    if _libc.unshare(_CLONE_NEWIPC | _CLONE_NEWPID):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    child = os.fork()
    if child:
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 0xFF)
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def lock_at_most(size_bytes: int) -> None:
    """Go on as a user who may use RDMA devices, and lock no more memory than this."""
    for device in Path("/dev/infiniband").iterdir():
        device.chmod(0o666)
    Path("/dev/shm").chmod(0o1777)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (size_bytes, size_bytes))
    os.setuid(NOBODY)


def main(listen: str, transport: str, locked_bytes: str = "") -> None:
    leave_host()
    if locked_bytes:
        lock_at_most(int(locked_bytes))
    pool = open_local_pool([MEMORY_BYTES], [])
    agent = open_agent(transport, DEVICES)
    node = PoolNode(pool, *parse_address(listen), "verbs", staging_capacity_bytes=STAGING_BYTES, one_sided=agent)
    print(f"pool node verbs ready on {node.place}", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
