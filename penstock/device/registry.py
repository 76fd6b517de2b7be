"""Which accelerator drives a device, by torch's name of its type."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from penstock.device.accelerator import Accelerator, Cpu, DeviceError


def _cuda(device: torch.device) -> Accelerator:
    from penstock.device.cuda import Cuda

    return Cuda(device)


Make = Callable[[torch.device], Accelerator]
_kinds: dict[str, Make] = {"cpu": Cpu, "cuda": _cuda}


def register(kind: str, make: Make) -> None:
    """Devices of torch's type `kind` are driven by what `make` gives."""
    _kinds[kind] = make


@contextmanager
def registered(kind: str, make: Make) -> Iterator[None]:
    """As `register`, within the context only."""
    before = _kinds.get(kind)
    register(kind, make)
    try:
        yield
    finally:
        if before is None:
            del _kinds[kind]
        else:
            register(kind, before)


def accelerator_of(device: torch.device) -> Accelerator:
    """What drives a device. Raises DeviceError for a kind that nobody registered."""
    make = _kinds.get(device.type)
    if make is None:
        raise DeviceError(f"devices of type {device.type!r} are not served; served are {', '.join(sorted(_kinds))}")
    return make(device)


def known_kinds() -> tuple[str, ...]:
    """Types of torch devices that `accelerator_of` knows."""
    return tuple(_kinds)
