"""The `uring` block engine: direct I/O on a slab file or block device through io_uring, with registered buffers."""

from __future__ import annotations

import errno
import os

from penstock.io import uring_abi as abi
from penstock.io.api import IoOp
from penstock.io.device import Device
from penstock.io.ring import Ring
from penstock.io.ring_engine import PIECES_MAX, RingEngine

ALIGNMENT_BYTES = 4096
REGION_BYTES_MAX = 1 << 30  # the kernel's limit for one registered buffer
BUFFER_SLOTS = 1024


class UringEngine(RingEngine):
    """Block engine over io_uring (contract: `penstock.io.api.BlockEngine`). Opened by `penstock.io.open_engine`."""

    name = "uring"

    def __init__(self, device: Device, depth: int) -> None:
        """Owns `device` once it returns. Raises OSError where the kernel refuses io_uring."""
        super().__init__(device, depth, ALIGNMENT_BYTES, Ring(PIECES_MAX))
        self._make_buffer_table(BUFFER_SLOTS, REGION_BYTES_MAX)

    def _pack_entry(self, piece: int, op: IoOp, offset: int, address: int, length: int, slot: int) -> None:
        if op.kind == "read":
            opcode = abi.OP_READ if slot < 0 else abi.OP_READ_FIXED
        else:
            opcode = abi.OP_WRITE if slot < 0 else abi.OP_WRITE_FIXED
        ring = self._ring
        abi.SQE_RW.pack_into(
            ring.sqes, ring.next_entry(), opcode, abi.SQE_FIXED_FILE, 0, 0, offset, address, length, 0,
            piece, slot if slot > 0 else 0, 0, 0, 0, 0,
        )  # fmt: skip

    def _moved(self, op: IoOp, offset: int, length: int, result: int) -> int | OSError:
        if result == length or (0 < result < length and result % ALIGNMENT_BYTES == 0):
            return result
        if result >= 0:
            reason = f"moved only {result} bytes (was the device cut short?)"
            return self._failure(op, offset, length, errno.EIO, reason)
        return self._failure(op, offset, length, -result, os.strerror(-result))
