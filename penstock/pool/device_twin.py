"""Memory of a device beside staging memory: where blocks may land that are read one-sided (GPUDirect RDMA).

Each part of the staging memory that takes a block has a twin on the device. A read names the part in staging memory, as
any other; where it is read one-sided, its bytes may go into the twin instead, and are verified there. So a read that
fails on its way to the device is made again into the host's memory, which is there for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from penstock.core.keys import BlockKey
from penstock.io.device_memory import DeviceMemory


class DeviceTwin(Protocol):
    """Any thread may call. The pool asks `place` before a read, and calls `landed` once the block is verified, just
    before the read ends."""

    @property
    def memory(self) -> DeviceMemory:
        """All of it, to be registered."""

    @property
    def scratch(self) -> int:
        """The address of a page in it that no block uses."""

    def use(self) -> None:
        """What this thread asks of a driver is about this device."""

    def hold(self) -> None:
        """A card may write into the memory until `release`."""

    def release(self) -> None:
        """The memory is registered once less."""

    def place(self, into: memoryview, size_bytes: int) -> int | None:
        """The address on the device that a block for `into` may land at; None where it must go to the host."""

    def checksums(self, places: Sequence[int], keys: Sequence[BlockKey]) -> Sequence[int]:
        """The checksums of blocks (`pool.checksum`) that lie at `places`, by their keys. Raises RuntimeError."""

    def landed(self, into: memoryview) -> None:
        """The block for `into` lies on the device, and in `into` nothing of it."""
