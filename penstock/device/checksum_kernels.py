"""The checksums of blocks in a CUDA device's memory, by the kernels of `xxh3.cu`: compiled by NVRTC, which torch brings
along, for the device that is there, and launched by the driver."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

from penstock.device.accelerator import DeviceError

CHECKSUM_BYTES_MIN = 241  # xxh3-64 of shorter blocks is computed in other ways
LANES = 8
SUM_THREADS = 256
CHAIN_THREADS = 32
BLOCKS_MAX = 65_535  # of one launch: the grid's y

_SUMS, _CHAIN = b"xxh3_sums", b"xxh3_chain"


def kernel_source() -> str:
    """The kernels, in CUDA C++."""
    return (files("penstock.device") / "xxh3.cu").read_text()


def scratch_words(count: int, size_bytes: int) -> int:
    """Words of 64 bits that the sums of `count` blocks take; one at least."""
    return max(1, count * kibs_of(size_bytes) * LANES)


def kibs_of(size_bytes: int) -> int:
    """KiB of a block whose sums are computed at once: all but the last."""
    return (size_bytes - 1) // 1024


class ChecksumKernels:
    """The kernels on one device; every call needs its context on the calling thread."""

    def __init__(self, capability: tuple[int, int], cuda: Any = None, nvrtc: Any = None) -> None:
        """`capability` is the device's; `cuda` and `nvrtc` are libcuda and libnvrtc. Raises DeviceError where the
        kernels cannot be compiled or loaded."""
        try:
            self._cuda = ctypes.CDLL("libcuda.so.1") if cuda is None else cuda
        except OSError as error:
            raise DeviceError(f"checksums on the device need NVIDIA's driver: {error}") from None
        code = compiled(capability, nvrtc_library() if nvrtc is None else nvrtc)
        self._module = ctypes.c_void_p()
        self._call("cuModuleLoadData", ctypes.byref(self._module), code)
        self._functions: dict[bytes, ctypes.c_void_p] = {}
        for name in (_SUMS, _CHAIN):
            function = self._functions[name] = ctypes.c_void_p()
            self._call("cuModuleGetFunction", ctypes.byref(function), self._module, name)

    def launch(self, given: int, count: int, size_bytes: int, sums: int, lanes: int, stream: int) -> None:
        """Enqueue the checksums of `count` blocks of `size_bytes`. All but `stream` are addresses on the device:
        `given` `[2, count]` of 64 bits, the blocks' addresses and seeds; `sums` has `scratch_words`; the checksum of
        block i ends in word `LANES * i` of `lanes` `[count, LANES]`. Raises DeviceError."""
        if size_bytes < CHECKSUM_BYTES_MIN or not 0 < count <= BLOCKS_MAX:
            raise DeviceError(
                f"checksums of {count} blocks of {size_bytes} bytes; allowed: 1 to {BLOCKS_MAX} blocks of at least "
                f"{CHECKSUM_BYTES_MIN} bytes"
            )
        common = (ctypes.c_uint64(given), ctypes.c_uint32(count), ctypes.c_uint64(size_bytes), ctypes.c_uint64(sums))
        if kibs := kibs_of(size_bytes):
            self._launch(_SUMS, _ceil(kibs * LANES, SUM_THREADS), count, SUM_THREADS, stream, common)
        blocks = _ceil(count * LANES, CHAIN_THREADS)
        self._launch(_CHAIN, blocks, 1, CHAIN_THREADS, stream, (*common, ctypes.c_uint64(lanes)))

    def _launch(
        self, name: bytes, across: int, down: int, threads: int, stream: int, arguments: tuple[Any, ...]
    ) -> None:
        places = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(one) for one in arguments))
        grid, block = (across, down, 1), (threads, 1, 1)
        sizes = (ctypes.c_uint(one) for one in (*grid, *block, 0))
        self._call("cuLaunchKernel", self._functions[name], *sizes, ctypes.c_void_p(stream), places, None)

    def _call(self, name: str, *arguments: Any) -> None:
        if error := getattr(self._cuda, name)(*arguments):
            raise DeviceError(f"{name} failed with error {error}")


def _ceil(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)


def compiled(capability: tuple[int, int], nvrtc: Any) -> bytes:
    """The kernels for devices of this compute capability. Raises DeviceError with what the compiler says."""
    program = ctypes.c_void_p()
    made = nvrtc.nvrtcCreateProgram(ctypes.byref(program), kernel_source().encode(), b"xxh3.cu", 0, None, None)
    if made:
        raise DeviceError(f"nvrtcCreateProgram failed with error {made}")
    try:
        options = (ctypes.c_char_p * 1)(b"--gpu-architecture=sm_%d%d" % capability)
        if error := nvrtc.nvrtcCompileProgram(program, 1, options):
            said = _output(nvrtc, "nvrtcGetProgramLog", program).rstrip(b"\0").decode(errors="replace").strip()
            raise DeviceError(f"the checksum kernels do not compile (NVRTC error {error}): {said}")
        return _output(nvrtc, "nvrtcGetCUBIN", program)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _output(nvrtc: Any, name: str, program: ctypes.c_void_p) -> bytes:
    """What a pair of calls gives, one for the size and one for the bytes. Raises DeviceError."""
    size = ctypes.c_size_t()
    error = getattr(nvrtc, f"{name}Size")(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(max(1, size.value))
    if error or getattr(nvrtc, name)(program, text):
        raise DeviceError(f"{name} failed")
    return text.raw


def nvrtc_library() -> Any:
    """NVRTC as torch's packages bring it along, or the system. Raises DeviceError."""
    for name in _nvrtc_names():
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise DeviceError("no NVRTC (libnvrtc) is here, which compiles the checksum kernels; torch for CUDA brings it")


def _nvrtc_names() -> Iterator[str]:
    import torch

    version = f".{torch.version.cuda.split('.')[0]}" if torch.version.cuda else ""
    yield f"libnvrtc.so{version}"
    for folder in sys.path:  # packages of libraries that the loader does not search
        yield from sorted(map(str, Path(folder or ".").glob(f"nvidia/*/lib/libnvrtc.so{version or '.*'}")))
    if version:
        yield "libnvrtc.so"
