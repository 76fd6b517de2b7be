"""Memory of a device that network cards write into, as it is registered with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Segment = Literal["DRAM", "VRAM"]  # NIXL's names; DRAM where the device is the host's processor


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """`address` is the device's own; the host must not read it where the segment is VRAM. `index`: which device."""

    address: int
    size_bytes: int
    segment: Segment
    index: int = 0
