"""The `uring` block engine: direct I/O on a slab file or block device through io_uring, with registered buffers."""

from __future__ import annotations

import bisect
import contextlib
import errno
import os
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from penstock.io import uring_abi as abi
from penstock.io.api import IoCompletion, IoOp
from penstock.io.device import Device
from penstock.io.device_engine import DeviceEngine
from penstock.io.memory import address_of, checked_addresses
from penstock.io.ring import Ring

ALIGNMENT_BYTES = 4096
REGION_BYTES_MAX = 1 << 30  # the kernel's limit for one registered buffer
BUFFER_SLOTS = 1024
PIECES_MAX = 256  # transfers in the device's hands at once, over all operations


@dataclass(slots=True, eq=False)
class _Transfer:
    """One operation on its way: bytes up to `issued_bytes` were given to the device, in `pieces` still open."""

    op: IoOp
    address: int
    length: int
    issued_bytes: int = 0
    pieces: int = 0
    error: OSError | None = None


class _Regions:
    """Registered memory: from an address to the slot of the kernel's table and the bytes left in it."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._slots: list[int] = []

    def add(self, start: int, end: int, slot: int) -> None:
        at = bisect.bisect(self._starts, start)
        self._starts.insert(at, start)
        self._ends.insert(at, end)
        self._slots.insert(at, slot)

    def find(self, address: int) -> tuple[int, int]:
        """`(slot, bytes from address to the region's end)`; slot -1 with the bytes to the next region otherwise."""
        at = bisect.bisect_right(self._starts, address) - 1
        if at >= 0 and address < self._ends[at]:
            return self._slots[at], self._ends[at] - address
        following = self._starts[at + 1] if at + 1 < len(self._starts) else 1 << 63
        return -1, following - address

    def __len__(self) -> int:
        return len(self._starts)


class UringEngine(DeviceEngine):
    """Block engine over io_uring (contract: `penstock.io.api.BlockEngine`). Opened by `penstock.io.open_engine`.

    An operation larger than the device takes whole goes out in pieces of `device.piece_bytes`, at most `PIECES_MAX` of
    all operations at once, and completes when its last piece did. `notes` says what it could not have.
    """

    name = "uring"

    def __init__(self, device: Device, depth: int) -> None:
        """Takes `device` over once it returns. Raises OSError where the kernel refuses io_uring."""
        super().__init__(device, depth, ALIGNMENT_BYTES)
        self._piece_bytes = device.piece_bytes
        self._ring = Ring(PIECES_MAX)
        try:
            self._ring.register_file(device.fd)
        except OSError:
            self._ring.close()
            raise
        self._pending: deque[_Transfer] = deque()
        self._pieces: dict[int, tuple[_Transfer, int, int]] = {}  # id -> (transfer, offset in it, length)
        self._next_piece = 0
        self._active: set[_Transfer] = set()
        self._regions = _Regions()
        self._registered: list[memoryview] = []
        self._can_register = self._make_buffer_table()

    def _make_buffer_table(self) -> bool:
        try:
            self._ring.register_buffer_table(BUFFER_SLOTS)
        except OSError as error:
            self.notes.append(
                f"buffers are pinned at each I/O: no registered ones ({error.strerror}; Linux 5.13 or later has them)"
            )
            return False
        return True

    def register(self, buffer: memoryview) -> None:
        """Pin `buffer` once; it stays referenced until `close`. What cannot be pinned is used all the same, pinned at
        each I/O, and `notes` says why."""
        self._check_open()
        base = address_of(buffer)
        at = -(-base // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        end = (base + buffer.nbytes) // ALIGNMENT_BYTES * ALIGNMENT_BYTES
        while at < end and self._can_register:
            slot, room = self._regions.find(at)
            length = min(room, end - at)
            if slot < 0:
                length = min(length, REGION_BYTES_MAX)
                if not self._pin(at, length):
                    break
                self._registered.append(buffer)
            at += length

    def _pin(self, address: int, length: int) -> bool:
        slot = len(self._regions)
        if slot == BUFFER_SLOTS:
            self._note(f"more than {BUFFER_SLOTS} registered regions: the rest is pinned at each I/O")
            return False
        try:
            self._ring.register_buffer(slot, address, length)
        except OSError as error:
            reason = error.strerror
            if error.errno == errno.ENOMEM:
                reason = "over the memory lock limit (raise it with ulimit -l or LimitMEMLOCK=)"
            self._note(f"a buffer could not be registered, {reason}: it is pinned at each I/O instead")
            return False
        self._regions.add(address, address + length, slot)
        return True

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def submit(self, ops: Sequence[IoOp]) -> None:
        self._check_open()
        addresses = checked_addresses(ops, self.in_flight(), self.depth, self.capacity_bytes, ALIGNMENT_BYTES)
        for op, address in zip(ops, addresses, strict=True):
            transfer = _Transfer(op, address, op.buffer.nbytes)
            self._active.add(transfer)
            self._pending.append(transfer)
        self._issue()
        with contextlib.suppress(OSError):  # what the kernel did not take stays packed; poll hands it over or raises
            self._ring.submit()

    def _issue(self) -> None:
        """Pack pieces of pending transfers, oldest first, as far as the rings have room."""
        if not self._pending:
            return
        room = min(self._ring.space(), PIECES_MAX - len(self._pieces))
        while room > 0 and self._pending:
            transfer = self._pending[0]
            if transfer.error is None:
                at = transfer.issued_bytes
                length = self._pack(transfer, at, min(self._piece_bytes, transfer.length - at))
                transfer.issued_bytes = at + length
                room -= 1
            if transfer.error is not None or transfer.issued_bytes == transfer.length:
                self._pending.popleft()

    def _pack(self, transfer: _Transfer, at: int, length: int) -> int:
        """Pack one piece; returns its length, which ends where a registered region starts or ends."""
        op, address, slot = transfer.op, transfer.address + at, -1
        if self._regions:
            slot, left = self._regions.find(address)
            length = min(length, left)
        if op.kind == "read":
            opcode = abi.OP_READ if slot < 0 else abi.OP_READ_FIXED
        else:
            opcode = abi.OP_WRITE if slot < 0 else abi.OP_WRITE_FIXED
        piece = self._next_piece
        self._next_piece = piece + 1
        self._pieces[piece] = (transfer, at, length)
        transfer.pieces += 1
        ring = self._ring
        abi.SQE_RW.pack_into(
            ring.sqes, ring.next_entry(), opcode, abi.SQE_FIXED_FILE, 0, 0, op.offset + at, address, length, 0,
            piece, max(slot, 0), 0, 0, 0, 0,
        )  # fmt: skip
        return length

    def poll(self, timeout_s: float) -> list[IoCompletion]:
        deadline_s = time.monotonic() + timeout_s
        while not self._closed and not self._ended and self._active:
            self._issue()
            remaining_s = deadline_s - time.monotonic()
            if remaining_s > 0:
                self._ring.wait(self._fewest_completions(), remaining_s)
            else:
                self._ring.submit()
            self._reap()
            if remaining_s <= 0:
                break
        done, self._ended = self._ended, []
        return done

    def _fewest_completions(self) -> int:
        """No operation can end before this many of the open pieces did, so waking up earlier is of no use."""
        if self._pending or len(self._pieces) <= len(self._active):  # room is wanted, or all are of one piece
            return 1
        return min(transfer.pieces for transfer in self._active)

    def _reap(self) -> None:
        for piece, result in self._ring.completions():
            transfer, at, length = self._pieces.pop(piece)
            transfer.pieces -= 1
            if result == length:
                pass
            elif 0 < result < length and result % ALIGNMENT_BYTES == 0 and transfer.error is None:
                self._pack(transfer, at + result, length - result)
            elif transfer.error is None:
                transfer.error = self._error(transfer.op, at, length, result)
            if transfer.pieces == 0 and (transfer.error is not None or transfer.issued_bytes == transfer.length):
                self._finish(transfer)

    def _error(self, op: IoOp, at: int, length: int, result: int) -> OSError:
        if result >= 0:
            number, reason = errno.EIO, f"moved only {result} bytes (was the device cut short?)"
        else:
            number, reason = -result, os.strerror(-result)
        text = f"{op.kind} of {length} bytes at {op.offset + at}: {reason}"
        return OSError(number, text, str(self._device.path))

    def _finish(self, transfer: _Transfer) -> None:
        self._active.discard(transfer)
        if transfer.issued_bytes < transfer.length and transfer in self._pending:
            self._pending.remove(transfer)
        self._ended.append(IoCompletion(transfer.op.tag, transfer.error))

    def _in_device(self) -> int:
        return len(self._active)

    def _release(self) -> None:
        self._ring.close()
        self._registered.clear()
