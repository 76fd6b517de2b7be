"""What Penstock needs of a device: streams, events, page locks on existing host memory, and batched copies.

`accelerator_of` gives the one of a torch device. CUDA and ROCm are `cuda.Cuda`; the CPU is here; the order checker of
`penstock.testing.fake_cuda` is one of them too. Another kind of device subclasses `Accelerator`, brings `lock`,
`unlock` and `copy`, and calls `register`; streams and events are torch's own for every kind. Blocks can land in its
memory (GPUDirect RDMA) where it also brings `allocate_landing`, `free_landing` and `checksums`.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from penstock.io.device_memory import DeviceMemory
from penstock.io.memory import address_of, aligned_buffer

HELD_COPY_BYTES_MAX = 64 << 10  # a shorter copy by the CPU is over before another thread would have taken the GIL


class DeviceError(RuntimeError):
    """A device refused a call, or nothing is known of its kind."""


class Event(Protocol):
    """A point on a stream."""

    def record(self, stream: Any = None) -> None:
        """Be behind everything that is on the stream (None: this thread's current one) now."""

    def synchronize(self) -> None:
        """Block this thread until the point has passed, without holding a processor where the device allows it."""

    def query(self) -> bool:
        """Whether the point has passed."""


class Stream(Protocol):
    """Work of a device in order."""

    def wait_event(self, event: Any) -> None:
        """What is enqueued from now on begins after the event."""

    def synchronize(self) -> None:
        """Block this thread until everything on the stream has ended."""


class Accelerator:
    """One device. Every method may be called from any thread, and after `use` on that thread."""

    records = False  # `record` exists
    copies_beside_compute = True  # copies and compute are enqueued; False where they are over when the call returns

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def use(self) -> None:
        """This thread's calls go to this device; a thread begins on device 0."""
        torch.accelerator.set_device_index(self.device)

    def new_stream(self) -> Stream:
        """A stream that nothing orders with others."""
        stream: Stream = torch.Stream(self.device)
        return stream

    def current_stream(self) -> Stream:
        """The stream that this thread's operators are enqueued on."""
        stream: Stream = torch.accelerator.current_stream(self.device)
        return stream

    def new_event(self) -> Event:
        """An event that was not recorded yet."""
        event: Event = torch.Event(self.device)
        return event

    def synchronize(self) -> None:
        """Block this thread until the whole device is idle."""
        torch.accelerator.synchronize(self.device)

    def lock(self, address: int, size_bytes: int) -> None:
        """Page-lock existing host memory, so that copies from and to it run beside everything. Raises DeviceError."""
        raise NotImplementedError

    def unlock(self, address: int) -> None:
        """Take the lock back; no copy may be under way."""
        raise NotImplementedError

    def copy(self, descriptors: np.ndarray, stream: Stream, to_device: bool) -> None:
        """Enqueue copies. `descriptors` is `[3, n]`, int64, contiguous: targets, sources, bytes; it may be reused when
        this returns. Host memory that is read must not be written meanwhile. Raises DeviceError; some of the copies may
        be under way then."""
        raise NotImplementedError

    def allocate_landing(self, size_bytes: int) -> DeviceMemory:
        """Zeroed memory of the device that network cards may write into, and that `checksums` and `copy` read. Raises
        DeviceError where there is no such memory, or no way to verify what lands in it."""
        raise DeviceError(f"network cards cannot write into memory of {self.device}; allowed: cuda (NVIDIA's), cpu")

    def free_landing(self, memory: DeviceMemory) -> None:
        """Give memory of `allocate_landing` back; no card may be registered with it, and no copy be under way. Raises
        DeviceError."""
        raise NotImplementedError

    def checksums(self, addresses: Sequence[int], seeds: Sequence[int], size_bytes: int) -> list[int]:
        """xxh3-64 with a seed, of each block of `size_bytes` in memory of `allocate_landing`; `addresses` are multiples
        of 8. For blocks that have arrived, as a card has said; waits for the device. Raises RuntimeError."""
        raise NotImplementedError

    def array_to_device(self, values: np.ndarray) -> torch.Tensor:
        """An array's copy on the device, for what this thread's current stream does next. One copy; waits for nothing
        where host memory can be locked."""
        return torch.from_numpy(values).to(self.device)

    def record(self, step: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], None]]:
        """Record what a step launches; gives its output, and what replays it into that output. The step may be called
        more than once and must give the same each time. Raises RuntimeError where it cannot be recorded."""
        raise NotImplementedError

    def release_cached(self) -> None:
        """Give back memory that torch keeps and nothing uses."""

    @property
    def numa_node(self) -> int | None:
        """The memory node of the host that the device is attached to; None where the system does not say."""
        return None


class _Passed:
    """The event and stream of a device that has done everything when a call returns."""

    def record(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def wait_event(self, event: Any) -> None: ...


_PASSED = _Passed()


class Cpu(Accelerator):
    """The host itself: a copy is over when `copy` returns."""

    copies_beside_compute = False

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._landing: dict[int, memoryview] = {}

    def use(self) -> None:
        """Nothing."""

    def new_stream(self) -> Stream:
        """One that is always empty."""
        return _PASSED

    def current_stream(self) -> Stream:
        """One that is always empty."""
        return _PASSED

    def new_event(self) -> Event:
        """One that has passed."""
        return _PASSED

    def synchronize(self) -> None:
        """Nothing."""

    def lock(self, address: int, size_bytes: int) -> None:
        """Nothing."""

    def unlock(self, address: int) -> None:
        """Nothing."""

    def copy(self, descriptors: np.ndarray, stream: Stream, to_device: bool) -> None:
        """One after the other."""
        copy_on_host(descriptors)

    def allocate_landing(self, size_bytes: int) -> DeviceMemory:
        """Memory of the host."""
        memory = aligned_buffer(size_bytes)
        self._landing[address_of(memory)] = memory
        return DeviceMemory(address_of(memory), size_bytes, "DRAM")

    def free_landing(self, memory: DeviceMemory) -> None:
        """See Accelerator."""
        del self._landing[memory.address]

    def checksums(self, addresses: Sequence[int], seeds: Sequence[int], size_bytes: int) -> list[int]:
        """See Accelerator."""
        import xxhash  # measurements of copies do without it

        block = ctypes.c_char * size_bytes
        return [
            xxhash.xxh3_64_intdigest(block.from_address(address), seed)
            for address, seed in zip(addresses, seeds, strict=True)
        ]


_move = ctypes.memmove  # lets other threads run meanwhile
_move_held = ctypes.PyDLL(None).memmove
_move_held.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_move_held.restype = ctypes.c_void_p


def copy_on_host(descriptors: np.ndarray) -> None:
    """Copies `[3, n]` (targets, sources, bytes) between addresses of this process."""
    for target, source, size_bytes in descriptors.T.tolist():
        if size_bytes <= HELD_COPY_BYTES_MAX:  # getting the GIL back can take longer than the copy
            _move_held(target, source, size_bytes)
        else:
            _move(target, source, size_bytes)


def numa_node_of_pci(address: str, system: str = "/sys/bus/pci/devices") -> int | None:
    """The memory node of a PCI device such as `0000:3b:00.0`; None where the system does not say."""
    try:
        with open(os.path.join(system, address.lower(), "numa_node"), encoding="ascii") as file:
            node = int(file.read())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None
