"""The twin of L2 in the device's memory: blocks of pool nodes land there by GPUDirect RDMA, past the host's memory."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from penstock.core.config import ConfigError
from penstock.core.keys import BlockKey
from penstock.engine.upload_source import DeviceBlock
from penstock.io.device_memory import DeviceMemory
from penstock.io.memory import address_of
from penstock.pool.checksum import checksum_seed

if TYPE_CHECKING:
    from penstock.device.accelerator import Accelerator

log = logging.getLogger(__name__)

SCRATCH_BYTES = 4096


class DeviceStaging:
    """Contract: `pool.device_twin.DeviceTwin`. The memory is given back once it is closed and held by nobody."""

    def __init__(self, accelerator: Accelerator, host: memoryview, slot_bytes: int, block_bytes: int) -> None:
        """`host` is L2, slots of `slot_bytes` that take a block of `block_bytes` each. Raises ConfigError where the
        device has no such memory."""
        self._accelerator = accelerator
        self._host, self._host_address = host, address_of(host)
        self._slot_bytes, self._block_bytes = slot_bytes, block_bytes
        self._lock = threading.Lock()
        self._landed: set[int] = set()
        self._retired: set[int] = set()
        self._holders = 0
        self._closed = self._freed = False
        try:
            self.memory: DeviceMemory = accelerator.allocate_landing(len(host) + SCRATCH_BYTES)
        except RuntimeError as error:
            raise ConfigError(f"gpu_direct is set, and blocks cannot land on {accelerator.device}: {error}") from None

    @property
    def scratch(self) -> int:
        """See DeviceTwin: behind the last slot."""
        return self.memory.address + len(self._host)

    def use(self) -> None:
        """See DeviceTwin."""
        self._accelerator.use()

    def hold(self) -> None:
        """See DeviceTwin."""
        with self._lock:
            self._holders += 1

    def release(self) -> None:
        """See DeviceTwin."""
        with self._lock:
            self._holders -= 1
        self._free_unused()

    def close(self) -> None:
        """Nothing is uploaded from it, and nothing lands there, any more."""
        self._closed = True
        self._free_unused()

    def _free_unused(self) -> None:
        with self._lock:
            if not self._closed or self._holders or self._freed:
                return
            self._freed = True
        try:
            self._accelerator.free_landing(self.memory)
        except RuntimeError as error:  # of a device that is lost
            log.warning("memory of the device could not be given back: %s", error)

    def place(self, into: memoryview, size_bytes: int) -> int | None:
        """See DeviceTwin: for blocks of the engine's size, in slots of L2."""
        slot = self._slot_of(into)
        if self._closed or slot is None or size_bytes != self._block_bytes or slot in self._retired:
            return None
        return self._address(slot)

    def checksums(self, places: Sequence[int], keys: Sequence[BlockKey]) -> Sequence[int]:
        """See DeviceTwin."""
        return self._accelerator.checksums(places, list(map(checksum_seed, keys)), self._block_bytes)

    def landed(self, into: memoryview) -> None:
        """See DeviceTwin."""
        slot = self._slot_of(into)
        assert slot is not None, "nothing lands outside of L2"
        with self._lock:
            if slot not in self._retired:
                self._landed.add(slot)

    def block_in(self, slot: int) -> DeviceBlock | None:
        """The block that landed for this slot since `clear`; None: it is on the host."""
        return DeviceBlock(self._address(slot), self._block_bytes) if slot in self._landed else None

    def clear(self, slot: int) -> None:
        """The slot takes another block."""
        with self._lock:
            self._landed.discard(slot)

    def retire(self, slot: int) -> None:
        """Nothing lands for this slot any more: a card may still write there, for a read that was given up."""
        with self._lock:
            self._retired.add(slot)
            self._landed.discard(slot)

    def _slot_of(self, into: memoryview) -> int | None:
        offset = address_of(into) - self._host_address
        inside = 0 <= offset < len(self._host) and not offset % self._slot_bytes
        return offset // self._slot_bytes if inside else None

    def _address(self, slot: int) -> int:
        return self.memory.address + slot * self._slot_bytes
