"""Where a block lies that is uploaded into L1: host memory, or memory of the device."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DeviceBlock:
    """A full block that lies in memory of the device already, outside of L1."""

    address: int
    nbytes: int


UploadSource = memoryview | DeviceBlock
