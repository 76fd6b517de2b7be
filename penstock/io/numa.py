"""NUMA nodes: lists them, binds memory to one of them, and threads to its processors."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import re
from pathlib import Path

from penstock.io.memory import address_of

SYSTEM = Path("/sys/devices/system/node")
_MBIND = {"x86_64": 237, "aarch64": 235, "riscv64": 235, "ppc64le": 259, "s390x": 268}
_MPOL_PREFERRED = 1
_MPOL_BIND = 2
_BITS = 1024  # NUMA nodes in the mask; the kernel's maximum
_WORD = 8 * ctypes.sizeof(ctypes.c_ulong)


def numa_nodes(system: Path = SYSTEM) -> list[int]:
    """Numbers of the NUMA nodes of this host; [0] where the system does not report them."""
    found = sorted(int(entry.name[4:]) for entry in system.glob("node[0-9]*")) if system.is_dir() else []
    return found or [0]


def node_cpus(node: int, system: Path = SYSTEM) -> set[int]:
    """Processors of a NUMA node; empty where it has none or the system does not report them."""
    try:
        return parse_cpus((system / f"node{node}" / "cpulist").read_text())
    except OSError:
        return set()


def node_bytes(node: int, system: Path = SYSTEM) -> int | None:
    """Bytes of memory of a NUMA node; None where the system does not report it."""
    try:
        found = re.search(r"MemTotal:\s*(\d+) kB", (system / f"node{node}" / "meminfo").read_text())
    except OSError:
        return None
    return int(found[1]) << 10 if found else None


def parse_cpus(text: str) -> set[int]:
    """Numbers of a list such as "0-3,8,10-11"."""
    cpus: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first:
            cpus.update(range(int(first), int(last or first) + 1))
    return cpus


def check_node(node: int, size_bytes: int, system: Path = SYSTEM) -> None:
    """Raise ValueError when there is no such NUMA node, or it is too small for `size_bytes`."""
    nodes = numa_nodes(system)
    if node not in nodes:
        raise ValueError(f"numa_node is {node}; allowed: {', '.join(map(str, nodes))}")
    total = node_bytes(node, system)
    if total is not None and size_bytes > total:
        raise ValueError(f"numa_node {node} has {total} bytes of memory, fewer than the capacity of {size_bytes}")


def bind_memory(buffer: memoryview, node: int, strict: bool = True) -> str | None:
    """Let a page-aligned buffer that nobody has touched yet lie on `node`; unless `strict`, elsewhere when the node has
    no room. Returns why that was refused, else None."""
    number = _MBIND.get(platform.machine())
    if number is None:
        return f"memory cannot be bound to a NUMA node on {platform.machine()}"
    mask = (ctypes.c_ulong * (_BITS // _WORD))()
    mask[node // _WORD] = 1 << (node % _WORD)
    libc = ctypes.CDLL(None, use_errno=True)
    address, length = ctypes.c_void_p(address_of(buffer)), ctypes.c_ulong(len(buffer))
    mode = ctypes.c_int(_MPOL_BIND if strict else _MPOL_PREFERRED)
    arguments = (address, length, mode, mask, ctypes.c_ulong(_BITS + 1), ctypes.c_uint(0))
    if libc.syscall(ctypes.c_long(number), *arguments) == 0:
        return None
    code = ctypes.get_errno()
    reasons = {
        errno.EPERM: "not permitted here (a container needs CAP_SYS_NICE)",
        errno.ENOSYS: "not supported by this kernel",
    }
    return f"binding memory to NUMA node {node} was refused: {reasons.get(code, os.strerror(code))}"


def stay_on_node(node: int) -> str | None:
    """Restrict the calling thread to those processors of NUMA node `node` that it may use. Returns why that is not
    possible, else None."""
    cpus = node_cpus(node) & os.sched_getaffinity(0)
    if not cpus:
        return f"none of the processors of NUMA node {node} may be used here"
    try:
        os.sched_setaffinity(0, cpus)
    except OSError as error:
        return f"the thread cannot be restricted to NUMA node {node}: {error.strerror}"
    return None
