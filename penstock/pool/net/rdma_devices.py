"""The RDMA devices of this host."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from penstock.core.config import ConfigError

RDMA_DEVICES = Path("/sys/class/infiniband")
RAILS_MAX = 8  # devices that one transfer is spread over


def rdma_devices() -> list[str]:
    """Names of this host's RDMA devices."""
    return sorted(one.name for one in RDMA_DEVICES.iterdir()) if RDMA_DEVICES.is_dir() else []


def check_devices(wanted: Sequence[str]) -> None:
    """Raises ConfigError when one of these RDMA devices is not here."""
    there = rdma_devices()
    for device in wanted:
        if device not in there:
            raise ConfigError(f"RDMA device {device} is not here; there are: {', '.join(there) or 'none'}")


def numa_node_of(devices: Sequence[str]) -> int | None:
    """The NUMA node that all of these RDMA devices are on; None where the system does not say, or they differ."""
    found = set()
    for device in devices:
        try:
            found.add(int((RDMA_DEVICES / device / "device" / "numa_node").read_text()))
        except (OSError, ValueError):
            return None
    return found.pop() if len(found) == 1 and min(found) >= 0 else None
