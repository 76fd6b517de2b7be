"""Memory for direct I/O: page-aligned buffers, their addresses, and the checks that engines make of operations."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Sequence

import numpy as np

from penstock.io.api import IoOp, QueueFull

_CHAR = ctypes.c_char
_HUGE_PAGE_BYTES = 2 << 20
_MADV_WIPEONFORK = 18  # <linux/mman.h>; `mmap` does not name it


def aligned_buffer(size_bytes: int) -> memoryview:
    """Zeroed, page-aligned, anonymous memory of `size_bytes`; freed with its last view.

    A forked child finds zeros in its place: pinned pages shared with a child would fault on every later write. The
    addresses stay taken there (with MADV_DONTFORK they would be free: what the child maps next would lie in them, and
    be unmapped when the child drops the buffer).
    """
    if size_bytes < 1:
        raise ValueError(f"size_bytes is {size_bytes}; it must be at least 1")
    memory = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without it: a child then costs copies of pages, nothing else
        memory.madvise(_MADV_WIPEONFORK)
    if size_bytes >= _HUGE_PAGE_BYTES:
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)


def address_of(buffer: memoryview) -> int:
    """Address of the first byte of contiguous memory, writable or not."""
    if buffer.readonly:
        return int(np.frombuffer(buffer, dtype=np.uint8).ctypes.data)
    return ctypes.addressof(_CHAR.from_buffer(buffer))


def checked_addresses(
    ops: Sequence[IoOp], in_flight: int, depth: int, capacity_bytes: int, alignment_bytes: int
) -> list[int]:
    """The buffer address of each operation. Raises QueueFull or ValueError when one of them is not allowed."""
    if in_flight + len(ops) > depth:
        raise QueueFull(f"{len(ops)} operations on top of {in_flight} in flight; the depth is {depth}")
    mask = alignment_bytes - 1
    addresses = []
    for op in ops:
        buffer, offset = op.buffer, op.offset
        length = buffer.nbytes
        if op.kind not in ("read", "write"):
            raise ValueError(f"kind is {op.kind!r}; it must be 'read' or 'write'")
        if length == 0 or length != len(buffer) or not buffer.c_contiguous:
            raise ValueError(f"buffer of {length} bytes, shape {buffer.shape}; it must be contiguous, of 1-byte items")
        if offset < 0 or offset + length > capacity_bytes:
            raise ValueError(f"{op.kind} of {length} bytes at {offset}; the device ends at {capacity_bytes}")
        if op.kind == "read" and buffer.readonly:
            raise ValueError(f"read of {length} bytes at {offset} into read-only memory")
        address = address_of(buffer)
        if (offset | length | address) & mask:
            raise ValueError(
                f"{op.kind} of {length} bytes at offset {offset}, address {address:#x}; "
                f"all three must be multiples of {alignment_bytes}"
            )
        addresses.append(address)
    return addresses
