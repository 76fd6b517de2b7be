"""The `nvme` block engine: NVMe read and write commands by LBA through io_uring, past filesystem and block layer."""

from __future__ import annotations

import errno
import os
import platform

from penstock.io import nvme_abi
from penstock.io import uring_abi as abi
from penstock.io.api import IoCompletion, IoOp
from penstock.io.device_engine import abandoned
from penstock.io.memory import address_of, aligned_buffer
from penstock.io.nvme_device import NvmeDevice
from penstock.io.ring import Ring, explain
from penstock.io.ring_engine import PIECES_MAX, RingEngine

ALIGNMENT_BYTES = 4096
BUFFER_SLOTS = 16384  # the kernel's limit
PROBE_TIMEOUT_S = 10.0


class NvmeEngine(RingEngine):
    """Block engine over NVMe passthrough (contract: `penstock.io.api.BlockEngine`). Opened by `penstock.io.open_nvme`.

    Operations are split into pieces of the device's largest command. The kernel refuses a registered buffer with more
    pages than one command may have, whatever the command's size, so memory is registered in regions of one piece.
    """

    name = "nvme"

    def __init__(self, device: NvmeDevice, depth: int) -> None:
        """Owns `device` once it returns. Raises OSError where the kernel or the device refuses passthrough."""
        self._namespace = device
        self._block_shift = device.block_bytes.bit_length() - 1
        super().__init__(device, depth, ALIGNMENT_BYTES, _ring(device))
        try:
            self._probe()
        except BaseException:
            if self.in_flight():  # the device may still write to the page
                abandoned.append(self)
            else:
                self._release()
            raise

    def _probe(self) -> None:
        """Read the first page, then again into registered memory, to find out what this kernel supports."""
        page = aligned_buffer(ALIGNMENT_BYTES)
        self._registered.append(page)
        self._read_page(page)
        self._make_buffer_table(BUFFER_SLOTS, self.piece_bytes)
        if not self._slots_max or not self._pin(address_of(page), len(page)):
            return
        try:
            self._read_page(page)
        except OSError as error:
            self._slots_max = 0
            self._regions.clear()
            self._note(
                f"buffers are pinned at each I/O: no registered ones ({error.strerror}; Linux 6.1 or later has them)"
            )

    def _read_page(self, page: memoryview) -> None:
        self.submit([IoOp("read", 0, page, None)])
        done: list[IoCompletion] = self.poll(PROBE_TIMEOUT_S)
        if not done:
            raise TimeoutError(errno.ETIMEDOUT, f"no answer within {PROBE_TIMEOUT_S} s", str(self._device.path))
        error = done[0].error
        if error is None:
            return
        if error.errno in (errno.EOPNOTSUPP, errno.ENOTTY):
            raise OSError(error.errno, _too_old(), str(self._device.path)) from error
        if error.errno in (errno.EACCES, errno.EPERM):
            text = "no permission: NVMe passthrough needs root (CAP_SYS_ADMIN)"
            raise OSError(error.errno, text, str(self._device.path)) from error
        raise error

    def _pack_entry(self, piece: int, op: IoOp, offset: int, address: int, length: int, slot: int) -> None:
        ring, block = self._ring, offset >> self._block_shift
        nvme_abi.SQE_NVME.pack_into(
            ring.sqes, ring.next_entry(),
            abi.OP_URING_CMD, abi.SQE_FIXED_FILE, 0, 0, nvme_abi.URING_CMD_IO, 0, 0, 0,
            0 if slot < 0 else abi.URING_CMD_FIXED, piece, slot if slot > 0 else 0, 0, 0,
            nvme_abi.OPCODE_READ if op.kind == "read" else nvme_abi.OPCODE_WRITE, 0, 0, self._namespace.nsid, 0, 0, 0,
            address, 0, length, block & 0xFFFFFFFF, block >> 32, (length >> self._block_shift) - 1, 0, 0, 0, 0, 0,
        )  # fmt: skip

    def _moved(self, op: IoOp, offset: int, length: int, result: int) -> int | OSError:
        if result == 0:
            return length
        if result > 0:
            return self._failure(op, offset, length, errno.EIO, nvme_abi.status_text(result))
        return self._failure(op, offset, length, -result, os.strerror(-result))

    def _make_durable(self) -> None:
        flush = nvme_abi.PassthroughCommand(opcode=nvme_abi.OPCODE_FLUSH, nsid=self._namespace.nsid)
        try:
            nvme_abi.command(self._device.fd, nvme_abi.IOCTL_IO_CMD, flush)
        except OSError as error:
            text = f"flush: {error.strerror}"
            raise OSError(error.errno or errno.EIO, text, str(self._device.path)) from error


def _ring(device: NvmeDevice) -> Ring:
    try:
        return Ring(PIECES_MAX, 128)
    except OSError as error:
        text = _too_old() if error.errno == errno.EINVAL else explain(error)
        raise OSError(error.errno or errno.EIO, text, str(device.path)) from error


def _too_old() -> str:
    return f"NVMe passthrough needs Linux 5.19 or later; this is {platform.release()}"
