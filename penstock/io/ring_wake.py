"""Ends a wait in the kernel from another thread: an eventfd that is read inside the ring."""

from __future__ import annotations

import ctypes
import os
import threading
import time

from penstock.io import uring_abi as abi
from penstock.io.ring import Ring

ENTRIES = 2  # entries of the submission ring, each time it is armed
READ_ID = 1 << 63  # `user_data` above that of all operations
TIMEOUT_ID = READ_ID + 1
DISARM_TIMEOUT_S = 1.0

_kept: list[RingWake] = []  # objects to whose memory the kernel may still write


class RingWake:
    """A read of an eventfd, linked to a timeout of 0 s. The read alone is one completion, so a wait for several would
    go on; the end of a timeout ends every wait of its ring. `wake` is for any thread, all else for the ring's
    thread."""

    def __init__(self, ring: Ring) -> None:
        self._ring = ring
        self._fd = os.eventfd(0, os.EFD_CLOEXEC)
        self._count = (ctypes.c_uint64 * 1)()
        self._now = abi.Timespec(0, 0)
        self._entries = 0  # entries in the kernel
        self._closing = threading.Lock()  # prevents a write to a descriptor that was closed and reused
        self._closed = False
        self.woken = False

    def wake(self) -> None:
        """End the wait in the kernel, from any thread; ignored once closed."""
        with self._closing:
            if not self.woken and not self._closed:
                self.woken = True
                os.eventfd_write(self._fd, 1)

    def arm(self) -> None:
        """Pack the read if none is open; the next `submit` or `wait` of the ring submits it."""
        ring = self._ring
        if self._entries or ring.space() < ENTRIES:
            return
        self._entries = ENTRIES
        for opcode, flags, fd, address, length, user_data in (
            (abi.OP_READ, abi.SQE_LINK, self._fd, ctypes.addressof(self._count), 8, READ_ID),
            (abi.OP_TIMEOUT, 0, -1, ctypes.addressof(self._now), 1, TIMEOUT_ID),
        ):
            at = ring.next_entry()
            ring.sqes[at : at + ring.sqe_bytes] = bytes(ring.sqe_bytes)
            abi.SQE_RW.pack_into(ring.sqes, at, opcode, flags, 0, fd, 0, address, length, 0, user_data, *(0,) * 5)

    def ended(self) -> None:
        """One of its two entries completed."""
        self._entries -= 1

    def close(self) -> None:
        """Cancel the read in the kernel, and close the eventfd."""
        with self._closing:
            self._closed = True
            os.eventfd_write(self._fd, 1)
            deadline_s = time.monotonic() + DISARM_TIMEOUT_S
            while self._entries and (remaining_s := deadline_s - time.monotonic()) > 0:
                self._ring.wait(1, remaining_s)
                self._entries -= len(self._ring.completions())
            if self._entries:
                _kept.append(self)
            os.close(self._fd)
