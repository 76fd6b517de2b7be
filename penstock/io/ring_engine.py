"""Base class of block engines over io_uring: splits operations into pieces, registers memory, waits and wakes."""

from __future__ import annotations

import contextlib
import errno
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from penstock.io.api import IoCompletion, IoOp
from penstock.io.device import Device
from penstock.io.device_engine import DeviceEngine
from penstock.io.memory import address_of, checked_addresses
from penstock.io.regions import Regions
from penstock.io.ring import Ring
from penstock.io.ring_wake import READ_ID, RingWake

PIECES_MAX = 256  # transfers in the device at once, of all operations
FIRST_PIECES = 4  # an idle device begins with them while the others are packed


@dataclass(slots=True, eq=False)
class _Transfer:
    """An open operation of several pieces: its bytes up to `issued_bytes` were issued to the device; `pieces` of them
    are open."""

    op: IoOp
    address: int
    length: int
    issued_bytes: int = 0
    pieces: int = 0
    error: OSError | None = None


class RingEngine(DeviceEngine):
    """The part of an io_uring block engine (contract: `penstock.io.api`) that does not depend on the kind of entry.

    An operation larger than the device's best transfer is split into pieces of `device.piece_bytes`, at most
    `PIECES_MAX` of all operations at once, and completes with its last piece. `notes` lists features that cannot be
    used here.
    """

    def __init__(self, device: Device, depth: int, alignment_bytes: int, ring: Ring) -> None:
        """Owns `device` and `ring` once it returns. Raises OSError, with `ring` closed."""
        self._ring = ring
        try:
            super().__init__(device, depth, alignment_bytes)
            ring.register_file(device.fd)
            self._wake = RingWake(ring)
        except BaseException:
            ring.close()
            raise
        self.piece_bytes = device.piece_bytes
        self._whole: dict[int, tuple[IoOp, int, int]] = {}  # operations of one piece: id -> (op, address, length)
        self._pending: deque[_Transfer] = deque()
        self._pieces: dict[int, tuple[_Transfer, int, int]] = {}  # id -> (transfer, offset in it, length)
        self._next_piece = 0
        self._active: set[_Transfer] = set()
        self._regions = Regions()
        self._registered: list[memoryview] = []
        self._slots_max = 0
        self.region_bytes = 0

    @abstractmethod
    def _pack_entry(self, piece: int, op: IoOp, offset: int, address: int, length: int, slot: int) -> None:
        """Fill the ring's next entry; `slot`: of the registered memory, -1 where it is not registered."""

    @abstractmethod
    def _moved(self, op: IoOp, offset: int, length: int, result: int) -> int | OSError:
        """Bytes that a piece moved (fewer than `length`: the rest is tried again), or why it failed."""

    def _make_buffer_table(self, slots_max: int, region_bytes: int) -> None:
        """Allow registered memory: `slots_max` regions of at most `region_bytes`."""
        try:
            self._ring.register_buffer_table(slots_max)
        except OSError as error:
            self._note(
                f"buffers are pinned at each I/O: no registered ones ({error.strerror}; Linux 5.13 or later has them)"
            )
        else:
            self._slots_max, self.region_bytes = slots_max, region_bytes

    def register(self, buffer: memoryview) -> None:
        """Pin `buffer` once; it stays referenced until `close`. Memory that cannot be pinned is used all the same,
        pinned at each I/O, and `notes` has the reason."""
        self._check_open()
        base = address_of(buffer)
        at = -(-base // self.alignment_bytes) * self.alignment_bytes
        end = (base + buffer.nbytes) // self.alignment_bytes * self.alignment_bytes
        while at < end and self._slots_max:
            slot, room = self._regions.find(at)
            length = min(room, end - at)
            if slot < 0:
                length = min(length, self.region_bytes)
                if not self._pin(at, length):
                    break
                self._registered.append(buffer)
            at += length

    def _pin(self, address: int, length: int) -> bool:
        slot = len(self._regions)
        if slot == self._slots_max:
            self._note(f"more than {self._slots_max} registered regions: the rest is pinned at each I/O")
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
        """Split operations into pieces and issue as many as the ring accepts; the rest when pieces end."""
        self._check_open()
        addresses = checked_addresses(ops, self.in_flight(), self.depth, self.capacity_bytes, self.alignment_bytes)
        is_idle = not self._in_device()
        room = 0 if self._pending else self._room()
        for op, address in zip(ops, addresses, strict=True):
            length = op.buffer.nbytes
            if room > 0 and length <= self.piece_bytes:  # most are one piece, and need not wait
                slot, left = self._regions.find(address)
                if length <= left:
                    room -= 1
                    piece = self._next_piece
                    self._next_piece = piece + 1
                    self._whole[piece] = (op, address, length)
                    self._pack_entry(piece, op, op.offset, address, length, slot)
                    if is_idle and len(self._whole) == FIRST_PIECES:
                        self._begin()
                    continue
            room = 0
            transfer = _Transfer(op, address, length)
            self._active.add(transfer)
            self._pending.append(transfer)
        self._issue()
        self._begin()

    def _begin(self) -> None:
        """Submit packed entries; those that the kernel refuses stay packed, and `poll` submits them again or raises."""
        with contextlib.suppress(OSError):
            self._ring.submit()

    def _room(self) -> int:
        """Pieces that can be packed now."""
        return min(self._ring.space(), PIECES_MAX - len(self._pieces) - len(self._whole))

    def _issue(self) -> None:
        """Pack pieces of pending transfers, oldest first, while the rings have room."""
        if not self._pending:
            return
        room = self._room()
        while room > 0 and self._pending:
            transfer = self._pending[0]
            if transfer.error is None:
                at = transfer.issued_bytes
                length = self._pack(transfer, at, min(self.piece_bytes, transfer.length - at))
                transfer.issued_bytes = at + length
                room -= 1
            if transfer.error is not None or transfer.issued_bytes == transfer.length:
                self._pending.popleft()

    def _pack(self, transfer: _Transfer, at: int, length: int) -> int:
        """Pack one piece; returns its length, which ends where a registered region starts or ends."""
        address = transfer.address + at
        slot, left = self._regions.find(address)
        length = length if length < left else left
        piece = self._next_piece
        self._next_piece = piece + 1
        self._pieces[piece] = (transfer, at, length)
        transfer.pieces += 1
        self._pack_entry(piece, transfer.op, transfer.op.offset + at, address, length, slot)
        return length

    def poll(self, timeout_s: float) -> list[IoCompletion]:
        """Operations that have ended; waits at most `timeout_s` for the first one, and issues waiting pieces."""
        deadline_s = time.monotonic() + timeout_s
        while not self._closed and not self._ended and (self._whole or self._active):
            remaining_s = 0.0 if self._wake.woken else deadline_s - time.monotonic()
            if remaining_s > 0:
                self._wake.arm()
            self._issue()
            if remaining_s > 0:
                self._ring.wait(self._fewest_completions(), remaining_s)
            else:
                self._ring.submit()
            self._reap()
            if remaining_s <= 0:
                break
        self._wake.woken = False
        done, self._ended = self._ended, []
        return done

    def wake(self) -> None:
        """End a wait of `poll`, from any thread."""
        self._wake.wake()

    def _fewest_completions(self) -> int:
        """The number of open pieces that must end before any operation can end: waking up earlier is useless."""
        if self._whole or self._pending or len(self._pieces) <= len(self._active):  # or room is needed
            return 1
        return min(transfer.pieces for transfer in self._active)

    def _reap(self) -> None:
        whole, ended = self._whole, self._ended
        for piece, result in self._ring.completions():
            if piece not in whole:
                self._end_piece(piece, result)
                continue
            op, address, length = whole.pop(piece)
            moved = self._moved(op, op.offset, length, result)
            if moved == length:
                ended.append(IoCompletion(op.tag, None))
            elif isinstance(moved, OSError):
                ended.append(IoCompletion(op.tag, moved))
            else:
                transfer = _Transfer(op, address, length, length)
                self._active.add(transfer)
                self._pack(transfer, moved, length - moved)

    def _end_piece(self, piece: int, result: int) -> None:
        """End a piece of an operation, or an entry of the wake-up."""
        if piece >= READ_ID:
            self._wake.ended()
            return
        transfer, at, length = self._pieces.pop(piece)
        transfer.pieces -= 1
        if transfer.error is None:
            moved = self._moved(transfer.op, transfer.op.offset + at, length, result)
            if isinstance(moved, OSError):
                transfer.error = moved
            elif moved < length:
                self._pack(transfer, at + moved, length - moved)
        if transfer.pieces:
            return
        if transfer.error is not None:
            self._drop_failed(transfer)
        elif transfer.issued_bytes != transfer.length:
            return
        self._active.discard(transfer)
        self._ended.append(IoCompletion(transfer.op.tag, transfer.error))

    def _failure(self, op: IoOp, offset: int, length: int, number: int, reason: str) -> OSError:
        return OSError(number, f"{op.kind} of {length} bytes at {offset}: {reason}", str(self._device.path))

    def _drop_failed(self, transfer: _Transfer) -> None:
        """Issue no more of an operation that failed; of those pending only the first was begun."""
        if self._pending and self._pending[0] is transfer:
            self._pending.popleft()

    def _in_device(self) -> int:
        return len(self._whole) + len(self._active)

    def _release(self) -> None:
        self._wake.close()
        self._ring.close()
        self._registered.clear()
