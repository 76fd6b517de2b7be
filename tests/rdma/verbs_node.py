"""A pool node whose memory is registered with the guest's RDMA device, without the packages of the command line.

`python -m tests.rdma.verbs_node HOST:PORT [LOCKED_BYTES]`: with LOCKED_BYTES as a user who may lock no more memory."""

from __future__ import annotations

import os
import resource
import sys
import threading

from penstock.pool.net.nixl_agent import NixlAgent
from penstock.pool.net.node import PoolNode
from penstock.pool.setup.open import open_local_pool
from penstock.units import parse_address

DEVICE = "rxe0"
MEMORY_BYTES, STAGING_BYTES = 8 << 20, 4 << 20
NOBODY = 65534


def main(listen: str, locked_bytes: str = "") -> None:
    if locked_bytes:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (int(locked_bytes), int(locked_bytes)))
        os.setuid(NOBODY)
    pool = open_local_pool([MEMORY_BYTES], [])
    node = PoolNode(
        pool, *parse_address(listen), "verbs", staging_capacity_bytes=STAGING_BYTES, one_sided=NixlAgent([DEVICE])
    )
    print(f"pool node verbs ready on {node.place}", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
