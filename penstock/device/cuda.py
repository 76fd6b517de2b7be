"""CUDA and ROCm, by the same code: torch's streams and events, and batched copies by a call of the driver.

`cuMemcpyBatchAsync` (driver 12.8 and later) is called by its address in the driver's library: what `cuda-bindings`
offers takes lists of objects, which cost more time to make than the copies of a block take.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from penstock.device.accelerator import Accelerator, DeviceError, Event, Stream, numa_node_of_pci
from penstock.device.checksum_kernels import CHECKSUM_BYTES_MIN, LANES, ChecksumKernels, scratch_words
from penstock.device.gpu_direct import GpuDirect
from penstock.io.device_memory import DeviceMemory

log = logging.getLogger(__name__)

# cudaHostRegisterPortable and Mapped: locked for every device of this process, and kernels may read it where it lies
_PORTABLE_AND_MAPPED = 3
_IN_STREAM_ORDER, _IN_ANY_ORDER = 1, 3  # CUmemcpySrcAccessOrder
_NOT_SUPPORTED = 801  # CUDA_ERROR_NOT_SUPPORTED
_HIP_DEFAULT = 4  # hipMemcpyDefault: the direction follows from the addresses

CopyMany = Callable[[np.ndarray, Any, bool], None]  # descriptors, torch's stream, whether to the device


class _Attributes(ctypes.Structure):
    """CUmemcpyAttributes: the locations are hints, left out."""

    _fields_ = (
        ("source_order", ctypes.c_int),
        ("source_location", ctypes.c_int * 2),
        ("target_location", ctypes.c_int * 2),
        ("flags", ctypes.c_uint),
    )


class DriverCopies:
    """Copies by the driver of CUDA: one call for all of them, or one for each where it has no such call."""

    def __init__(self, library: Any = None) -> None:
        """`library` is libcuda. Raises OSError where there is none."""
        library = ctypes.CDLL("libcuda.so.1") if library is None else library
        self._copy_one = library.cuMemcpyAsync
        self._copy_one.argtypes = (ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p)
        self._copy_many: Any = getattr(library, "cuMemcpyBatchAsync", None)
        if self._copy_many is not None:
            many: tuple[Any, ...] = (ctypes.c_void_p,) * 3 + (ctypes.c_size_t,)
            attributes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
            self._copy_many.argtypes = (*many, *attributes, ctypes.c_void_p, ctypes.c_void_p)
        self._orders = {order: _Attributes(source_order=order) for order in (_IN_STREAM_ORDER, _IN_ANY_ORDER)}
        self._first = ctypes.c_size_t(0)

    @property
    def is_batched(self) -> bool:
        """Whether all copies are one call."""
        return self._copy_many is not None

    def __call__(self, descriptors: np.ndarray, stream: Any, to_device: bool) -> None:
        """Host memory is read in any order: nobody writes it meanwhile. Raises DeviceError."""
        handle: int = stream.cuda_stream
        if self._copy_many is not None and not self._enqueue(descriptors, handle, to_device):
            log.warning("this driver has no batched copies: blocks are copied one by one")
            self._copy_many = None
        if self._copy_many is None:
            for target, source, size_bytes in descriptors.T.tolist():
                _check(self._copy_one(target, source, size_bytes, handle), "cuMemcpyAsync")

    def _enqueue(self, descriptors: np.ndarray, stream: int, to_device: bool) -> bool:
        """False where the driver has the call and cannot do it."""
        count = descriptors.shape[1]
        targets = descriptors.ctypes.data
        sources, sizes = targets + 8 * count, targets + 16 * count
        attributes = ctypes.byref(self._orders[_IN_ANY_ORDER if to_device else _IN_STREAM_ORDER])
        failed_at = ctypes.c_size_t(0)
        error = self._copy_many(
            targets, sources, sizes, count, attributes, ctypes.byref(self._first), 1, ctypes.byref(failed_at), stream
        )
        if error == _NOT_SUPPORTED:
            return False
        _check(error, "cuMemcpyBatchAsync")
        return True


class HipCopies:
    """Copies by the runtime of ROCm, a call for each."""

    is_batched = False

    def __init__(self, library: Any = None) -> None:
        """`library` is libamdhip64. Raises OSError where there is none."""
        library = ctypes.CDLL(loaded_library("libamdhip64.so")) if library is None else library
        self._copy_one = library.hipMemcpyAsync
        self._copy_one.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)

    def __call__(self, descriptors: np.ndarray, stream: Any, to_device: bool) -> None:
        """Raises DeviceError."""
        for target, source, size_bytes in descriptors.T.tolist():
            _check(self._copy_one(target, source, size_bytes, _HIP_DEFAULT, stream.cuda_stream), "hipMemcpyAsync")


def loaded_library(name: str, maps: str = "/proc/self/maps") -> str:
    """The file of a library that this process has loaded, as torch's packages bring libraries of their own, with
    versions in their names; `name` itself where none is."""
    with open(maps, encoding="utf-8", errors="replace") as lines:
        paths = [line.split(maxsplit=5)[5].strip() for line in lines if name in line]
    return next((path for path in paths if os.path.basename(path).startswith(name)), name)


def _check(error: int, call: str) -> None:
    if error:
        raise DeviceError(f"{call} failed with error {error}")


def _number(error: Any) -> int:
    """Of an error of the runtime, which torch gives as a member of an enumeration."""
    return int(getattr(error, "value", error))


class Cuda(Accelerator):
    """A device of CUDA or ROCm; torch calls both cuda."""

    records = True

    def __init__(self, device: torch.device, copies: CopyMany | None = None) -> None:
        """`copies` enqueues copies in place of the driver's own calls."""
        index = torch.cuda.current_device() if device.index is None else device.index
        super().__init__(torch.device("cuda", index))
        if copies is None:
            copies = HipCopies() if torch.version.hip is not None else DriverCopies()
        self._copies = copies
        self._pool: Any = None  # memory of everything that is recorded
        self._recording: Any = None  # the stream that it is recorded on
        self._threads = threading.local()
        self._direct: GpuDirect | None = None
        self._kernels: ChecksumKernels | None = None

    def use(self) -> None:
        """See Accelerator. A thread begins without a context, which the driver's own calls need; `set_device` gives it
        one only where it changes the device, so that threads on device 0 would have none."""
        torch.cuda.set_device(self.device)
        if not hasattr(self._threads, "has_context"):
            torch.cuda.mem_get_info(self.device)  # a call of the runtime that needs a context, and makes it current
            self._threads.has_context = True

    def new_stream(self) -> Stream:
        """See Accelerator."""
        stream: Stream = torch.cuda.Stream(self.device)
        return stream

    def current_stream(self) -> Stream:
        """See Accelerator."""
        stream: Stream = torch.cuda.current_stream(self.device)
        return stream

    def new_event(self) -> Event:
        """One that blocks whoever waits for it: torch.Event ignores `blocking`, and spins."""
        event: Event = torch.cuda.Event(blocking=True)
        return event

    def synchronize(self) -> None:
        """See Accelerator."""
        torch.cuda.synchronize(self.device)

    def lock(self, address: int, size_bytes: int) -> None:
        """See Accelerator."""
        self.use()
        error = _number(torch.cuda.cudart().cudaHostRegister(address, size_bytes, _PORTABLE_AND_MAPPED))
        if error:
            self._forget_error()
            raise DeviceError(
                f"cudaHostRegister of {size_bytes} bytes failed with CUDA error {error}; "
                "the memory lock limit (ulimit -l) must allow it and no other part may have locked it"
            )

    def unlock(self, address: int) -> None:
        """See Accelerator."""
        with contextlib.suppress(RuntimeError):  # of a device that is lost
            self.use()
        error = _number(torch.cuda.cudart().cudaHostUnregister(address))
        if error:
            self._forget_error()
            log.warning("cudaHostUnregister failed with CUDA error %d: the memory stays locked", error)

    def _forget_error(self) -> None:
        """The runtime keeps the error of a failed call, and the next launch of anybody would report it as its own."""
        with contextlib.suppress(RuntimeError):
            torch.ones(1, device=self.device)

    def copy(self, descriptors: np.ndarray, stream: Any, to_device: bool) -> None:
        """See Accelerator."""
        self._copies(descriptors, stream, to_device)

    def allocate_landing(self, size_bytes: int) -> DeviceMemory:
        """See Accelerator. The kernels that verify what lands are compiled here, and compared with the host's."""
        if torch.version.hip is not None:
            raise DeviceError("network cards cannot write into memory of a ROCm device here; allowed: NVIDIA's, cpu")
        self.use()
        if self._direct is None:
            direct = GpuDirect(self.device.index)
            self._kernels = ChecksumKernels(torch.cuda.get_device_capability(self.device))
            self._direct = direct
        self._compare_checksums()
        return self._direct.allocate(size_bytes)

    def free_landing(self, memory: DeviceMemory) -> None:
        """See Accelerator."""
        assert self._direct is not None
        self.use()
        self._direct.free(memory)

    def checksums(self, addresses: Sequence[int], seeds: Sequence[int], size_bytes: int) -> list[int]:
        """See Accelerator. On a stream of this thread's own."""
        assert self._direct is not None and self._kernels is not None
        self.use()
        if not hasattr(self._threads, "stream"):
            self._threads.stream, self._threads.event = self.new_stream(), self.new_event()
        stream, event, count = self._threads.stream, self._threads.event, len(addresses)
        with torch.cuda.stream(stream):
            given = self.array_to_device(np.array([addresses, seeds], np.uint64).view(np.int64))
            sums = torch.empty(scratch_words(count, size_bytes), dtype=torch.int64, device=self.device)
            lanes = torch.empty((count, LANES), dtype=torch.int64, device=self.device)
            self._direct.order_writes()
            places = given.data_ptr(), count, size_bytes, sums.data_ptr(), lanes.data_ptr()
            self._kernels.launch(*places, stream.cuda_stream)
            event.record(stream)
            event.synchronize()  # sleeps, where `cpu` alone would spin
            found: list[int] = lanes.cpu()[:, 0].tolist()
        return [checksum % (1 << 64) for checksum in found]

    def _compare_checksums(self) -> None:
        """Raises DeviceError where the kernels do not give what the host gives, for blocks of a few sizes."""
        import xxhash  # measurements of copies do without it

        for size_bytes in (CHECKSUM_BYTES_MIN, 1024, 1025, 70_000):
            blocks = np.random.default_rng(size_bytes).integers(0, 256, (3, -(-size_bytes // 8) * 8), np.uint8)
            there = torch.from_numpy(blocks).to(self.device)
            torch.cuda.synchronize(self.device)
            seeds = [0, size_bytes, (1 << 64) - size_bytes]
            addresses = [there.data_ptr() + at * blocks.shape[1] for at in range(3)]
            want = [
                xxhash.xxh3_64_intdigest(block[:size_bytes], seed) for block, seed in zip(blocks, seeds, strict=True)
            ]
            if self.checksums(addresses, seeds, size_bytes) != want:
                raise DeviceError(f"checksums of {size_bytes} bytes on {self.device} are not those of the host")

    def array_to_device(self, values: np.ndarray) -> torch.Tensor:
        """See Accelerator; torch keeps the locked copy until the stream has read it."""
        return torch.from_numpy(values).pin_memory().to(self.device, non_blocking=True)

    def record(self, step: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], None]]:
        """See Accelerator; other threads go on using the device meanwhile."""
        if self._pool is None:
            self._pool, self._recording = torch.cuda.graph_pool_handle(), torch.cuda.Stream(self.device)
        current, aside = torch.cuda.current_stream(self.device), self._recording
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            step()  # what is made on first use must not be recorded
        current.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=aside, capture_error_mode="thread_local"):
            output = step()
        return output, graph.replay

    def release_cached(self) -> None:
        """See Accelerator."""
        torch.cuda.empty_cache()

    @property
    def numa_node(self) -> int | None:
        """See Accelerator."""
        found = torch.cuda.get_device_properties(self.device)
        domain, bus, slot = (getattr(found, f"pci_{part}_id", None) for part in ("domain", "bus", "device"))
        if domain is None or bus is None or slot is None:
            return None
        return numa_node_of_pci(f"{domain:04x}:{bus:02x}:{slot:02x}.0")
