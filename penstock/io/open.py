"""Opens block engines: the best one for a slab file or block device, and NVMe passthrough for a namespace."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from penstock.io.api import BlockEngine
from penstock.io.device import open_device
from penstock.io.nvme import NvmeEngine
from penstock.io.nvme_device import open_namespace
from penstock.io.ring import explain
from penstock.io.threads import ThreadEngine
from penstock.io.uring import UringEngine


def open_engine(
    path: Path,
    capacity_bytes: int,
    depth: int,
    prefer: Literal["uring", "threads"] = "uring",
    claims_space: bool = True,
) -> BlockEngine:
    """A block engine on the slab file or block device `path`, for `depth` (1 to 256) operations at once.

    An absent slab file is created with all of its space (without `claims_space` none is allocated, and an existing file
    may have holes); existing content is unchanged. Where io_uring or direct I/O is refused, the engine is `threads`,
    and `notes` has the reason. Raises ValueError for a wrong argument and OSError with path and reason: no such folder,
    no permission, in use (BlockingIOError), too small or disk full (ENOSPC).
    """
    if prefer not in ("uring", "threads"):
        raise ValueError(f"prefer is {prefer!r}; it must be 'uring' or 'threads'")
    if not 1 <= depth <= 256:
        raise ValueError(f"depth is {depth}; it must be from 1 to 256")
    device = open_device(Path(path), capacity_bytes, claims_space)
    try:
        if prefer == "uring" and not device.direct:
            device.notes.append("engine threads instead of uring: io_uring gains nothing without direct I/O")
        elif prefer == "uring":
            try:
                return UringEngine(device, depth)
            except OSError as error:
                device.notes.append(f"engine threads instead of uring: {explain(error)}")
        return ThreadEngine(device, depth)
    except BaseException:
        device.close()
        raise


def open_nvme(path: Path, capacity_bytes: int | None, depth: int) -> BlockEngine:
    """The `nvme` engine on the generic device `path` (/dev/ngXnY) of a namespace, for `depth` (1 to 256) operations at
    once. `capacity_bytes` None: the whole namespace, rounded down to 4 KiB. There is no fallback where passthrough is
    refused. Raises ValueError for a wrong argument and OSError with path and reason: no such device, not a generic NVMe
    device, no permission, in use (BlockingIOError, or EBUSY where mounted), too small (ENOSPC), a format or kernel
    without support.
    """
    if not 1 <= depth <= 256:
        raise ValueError(f"depth is {depth}; it must be from 1 to 256")
    device = open_namespace(Path(path), capacity_bytes)
    try:
        return NvmeEngine(device, depth)
    except BaseException:
        device.close()
        raise
