"""Base class of block engines: owns the device, and closes the engine."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from abc import ABC, abstractmethod

from penstock.io.api import IoCompletion
from penstock.io.device import Device

DEPTH_MAX = 256

abandoned: list[DeviceEngine] = []  # engines whose device still owns buffers after close timed out


class DeviceEngine(ABC):
    """The part of a BlockEngine (contract: `penstock.io.api`) that does not depend on how operations are submitted."""

    def __init__(self, device: Device, depth: int, alignment_bytes: int) -> None:
        """Owns `device` once it returns."""
        if not 1 <= depth <= DEPTH_MAX:
            raise ValueError(f"depth is {depth}; it must be from 1 to {DEPTH_MAX}")
        self.capacity_bytes = device.capacity_bytes
        self.alignment_bytes = alignment_bytes
        self.depth = depth
        self.notes = device.notes
        self._device = device
        self._closed = False
        self._ended: list[IoCompletion] = []  # not yet fetched with `poll`
        self._syncing = threading.Lock()  # the device stays open while a sync uses it

    @abstractmethod
    def _in_device(self) -> int:
        """Operations that the device has not ended yet."""

    @abstractmethod
    def poll(self, timeout_s: float) -> list[IoCompletion]:
        """Operations that have ended; waits at most `timeout_s` for the first one."""

    @abstractmethod
    def wake(self) -> None:
        """End a wait of `poll`, from any thread."""

    @abstractmethod
    def _release(self) -> None:
        """Release the engine's resources besides the device; nothing is in flight."""

    def in_flight(self) -> int:
        """Operations that were submitted and that `poll` has not returned."""
        return self._in_device() + len(self._ended)

    def sync(self) -> None:
        """Make completed writes durable. Raises OSError when the device fails, and once closed."""
        with self._syncing:
            self._check_open()
            self._make_durable()

    def _make_durable(self) -> None:
        os.fdatasync(self._device.fd)

    def close(self, timeout_s: float) -> None:
        """As in the contract; operations that end during the call can still be fetched with `poll` afterwards."""
        if self._closed:
            return
        deadline_s = time.monotonic() + timeout_s
        ended: list[IoCompletion] = []
        while self._in_device():
            remaining_s = deadline_s - time.monotonic()
            ended += self.poll(max(0.0, remaining_s))
            if remaining_s <= 0 and self._in_device():
                self._ended = ended
                abandoned.append(self)
                raise TimeoutError(
                    f"{self._in_device()} operations on {self._device.path} did not end within {timeout_s} s; "
                    "their buffers stay reserved"
                )
        self._ended = ended + self._ended
        if not self._syncing.acquire(timeout=max(0.0, deadline_s - time.monotonic())):
            raise TimeoutError(f"a sync of {self._device.path} did not end within {timeout_s} s")
        with contextlib.suppress(ValueError):
            abandoned.remove(self)
        self._closed = True
        try:
            self._release()
            self._device.close()
        finally:
            self._syncing.release()

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError(f"the engine of {self._device.path} is closed")
