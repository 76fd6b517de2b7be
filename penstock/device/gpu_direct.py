"""GPUDirect RDMA on CUDA: memory of a device that network cards write into, and the order of their writes.

Source: NVIDIA's guide to GPUDirect RDMA, and the CUDA driver API (cuFlushGPUDirectRDMAWrites, cuPointerSetAttribute).
"""

from __future__ import annotations

import ctypes
from typing import Any

from penstock.device.accelerator import DeviceError
from penstock.io.device_memory import DeviceMemory

# <cuda.h>
_SUPPORTED = 116  # CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_SUPPORTED
_FLUSH_OPTIONS, _FLUSH_BY_HOST = 117, 1  # ..._FLUSH_WRITES_OPTIONS, CU_FLUSH_GPU_DIRECT_RDMA_WRITES_OPTION_HOST
_WRITES_ORDERING, _ORDERED = 118, 100  # ..._WRITES_ORDERING, CU_GPU_DIRECT_RDMA_WRITES_ORDERING_OWNER
_SYNC_MEMOPS = 6  # CU_POINTER_ATTRIBUTE_SYNC_MEMOPS
_PAGE_BYTES = 2 << 20
_THIS_CONTEXT, _TO_OWNER = 0, 100  # CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TARGET_CURRENT_CTX, ..._TO_OWNER


class GpuDirect:
    """One device; every call needs its context on the calling thread."""

    def __init__(self, index: int, library: Any = None) -> None:
        """`library` is libcuda. Raises DeviceError where cards cannot write into the device's memory, or what they have
        written cannot be ordered before a kernel."""
        try:
            self._library = ctypes.CDLL("libcuda.so.1") if library is None else library
        except OSError as error:
            raise DeviceError(f"GPUDirect RDMA needs NVIDIA's driver: {error}") from None
        self._index = index
        device = ctypes.c_int(0)
        self._call("cuDeviceGet", ctypes.byref(device), index)
        self._device = device.value
        if not self._attribute(_SUPPORTED):
            raise DeviceError(f"device {index} does not support GPUDirect RDMA; data center GPUs do")
        self._flushes = self._attribute(_WRITES_ORDERING) < _ORDERED
        if self._flushes and not self._attribute(_FLUSH_OPTIONS) & _FLUSH_BY_HOST:
            raise DeviceError(f"device {index} neither orders a card's writes nor flushes them (GPUDirect RDMA)")

    def allocate(self, size_bytes: int) -> DeviceMemory:
        """Memory of its own allocation and pages, as a card needs it; zeroed. Raises DeviceError."""
        address = ctypes.c_uint64(0)
        whole_bytes = -(-size_bytes // _PAGE_BYTES) * _PAGE_BYTES
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(whole_bytes))
        memory = DeviceMemory(address.value, size_bytes, "VRAM", self._index)
        try:  # copies that are said to be synchronous are, also beside a card's writes
            on = ctypes.c_uint(1)
            self._call("cuPointerSetAttribute", ctypes.byref(on), _SYNC_MEMOPS, ctypes.c_uint64(memory.address))
            self._call("cuMemsetD8_v2", ctypes.c_uint64(memory.address), ctypes.c_ubyte(0), ctypes.c_size_t(size_bytes))
        except DeviceError:
            self.free(memory)
            raise
        return memory

    def free(self, memory: DeviceMemory) -> None:
        """Give memory back that no card is registered with any more. Raises DeviceError."""
        self._call("cuMemFree_v2", ctypes.c_uint64(memory.address))

    def order_writes(self) -> None:
        """Kernels that are launched from now on see what cards have written, as far as the host knows that it has
        arrived. Raises DeviceError."""
        if self._flushes:
            self._call("cuFlushGPUDirectRDMAWrites", _THIS_CONTEXT, _TO_OWNER)

    def _attribute(self, which: int) -> int:
        value = ctypes.c_int(0)
        self._call("cuDeviceGetAttribute", ctypes.byref(value), which, self._device)
        return value.value

    def _call(self, name: str, *arguments: Any) -> None:
        function = getattr(self._library, name, None)
        if function is None:
            raise DeviceError(f"this driver has no {name}, which GPUDirect RDMA needs (CUDA 11.3)")
        if error := function(*arguments):
            raise DeviceError(f"{name} failed with error {error}")
