"""GPUDirect RDMA on CUDA, without a GPU: the checksum kernels, compiled for the host, against xxhash; and what the
driver is asked for, by C. That the kernels compile for GPUs is checked where NVIDIA's compiler is."""

from __future__ import annotations

import ctypes
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash

from penstock.device import cuda
from penstock.device.accelerator import Cpu, DeviceError
from penstock.device.checksum_kernels import (
    BLOCKS_MAX,
    CHECKSUM_BYTES_MIN,
    LANES,
    ChecksumKernels,
    compiled,
    nvrtc_library,
    scratch_words,
)
from penstock.device.gpu_direct import GpuDirect
from penstock.io.memory import address_of, aligned_buffer
from penstock.testing.fake_cuda import fake_cuda

KERNELS = Path(cuda.__file__).with_name("xxh3.cu")
STREAM = 77
SIZES = [
    *range(CHECKSUM_BYTES_MIN, 1100),
    *(kibs * 1024 + more for kibs in (2, 3, 16) for more in (-65, -64, -63, -1, 0, 1, 7, 8, 63, 64, 65, 512)),
    100_001,
    (1 << 20) + 1,
]


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """libcuda and libnvrtc of a device that is the host."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler is here")
    library = tmp_path_factory.mktemp("driver") / "libdriver.so"
    source = Path(__file__).with_name("stand_in_driver.cpp")
    command = [compiler, "-O2", "-shared", "-fPIC", f'-DXXH3="{KERNELS}"', "-o", str(library), str(source)]
    subprocess.run(command, check=True, timeout=120)
    return ctypes.CDLL(str(library))


@pytest.fixture(autouse=True)
def usual(request: pytest.FixtureRequest) -> None:
    if "driver" in request.fixturenames:
        request.getfixturevalue("driver").say(1, 100, 1)


def checksums(kernels: ChecksumKernels, places: list[int], seeds: list[int], size_bytes: int) -> list[int]:
    given = np.array([places, seeds], np.uint64)
    sums = np.zeros(scratch_words(len(places), size_bytes), np.uint64)
    lanes = np.zeros((len(places), LANES), np.uint64)
    addresses = sums.ctypes.data, lanes.ctypes.data, STREAM
    kernels.launch(given.ctypes.data, len(places), size_bytes, *addresses)
    found: list[int] = lanes[:, 0].tolist()
    return found


def test_the_kernels_give_the_checksums_of_xxhash(driver: Any) -> None:
    """Bit for bit: every way a block can end, the largest seeds and the smallest, blocks beside each other."""
    kernels = ChecksumKernels((9, 0), driver, driver)
    rng = random.Random(5)
    memory = aligned_buffer(4 << 20)
    memory[: 2 << 20] = rng.randbytes(2 << 20)
    for size_bytes in SIZES:
        offsets = [0, -(-size_bytes // 8) * 8, 8 * rng.randrange(2000)]
        seeds = [0, rng.getrandbits(64), (1 << 64) - 1]
        want = [
            xxhash.xxh3_64_intdigest(memory[at : at + size_bytes], seed)
            for at, seed in zip(offsets, seeds, strict=True)
        ]
        places = [address_of(memory) + at for at in offsets]
        assert checksums(kernels, places, seeds, size_bytes) == want, size_bytes
        assert Cpu(torch.device("cpu")).checksums(places, seeds, size_bytes) == want


def test_one_bit_anywhere_is_seen(driver: Any) -> None:
    kernels = ChecksumKernels((9, 0), driver, driver)
    memory = aligned_buffer(8192)
    size_bytes = 4 * 1024 + 200
    memory[:size_bytes] = random.Random(6).randbytes(size_bytes)
    whole = checksums(kernels, [address_of(memory)], [3], size_bytes)
    for at in range(0, size_bytes, 41):
        memory[at] ^= 1 << at % 8
        assert checksums(kernels, [address_of(memory)], [3], size_bytes) != whole
        memory[at] ^= 1 << at % 8
    assert checksums(kernels, [address_of(memory)], [3], size_bytes) == whole


def test_more_blocks_than_a_warp_has_room_for(driver: Any) -> None:
    kernels = ChecksumKernels((9, 0), driver, driver)
    memory = aligned_buffer(1 << 20)
    memory[:] = random.Random(7).randbytes(1 << 20)
    places = [address_of(memory) + 8192 * at for at in range(67)]
    want = [xxhash.xxh3_64_intdigest(memory[8192 * at : 8192 * at + 8000], at) for at in range(67)]
    assert checksums(kernels, places, list(range(67)), 8000) == want


@pytest.mark.parametrize(("count", "size_bytes"), [(0, 4096), (BLOCKS_MAX + 1, 4096), (1, CHECKSUM_BYTES_MIN - 1)])
def test_what_the_kernels_do_not_compute_is_refused(driver: Any, count: int, size_bytes: int) -> None:
    with pytest.raises(DeviceError, match="allowed: 1 to 65535 blocks of at least 241 bytes"):
        ChecksumKernels((9, 0), driver, driver).launch(0, count, size_bytes, 0, 0, STREAM)


def test_kernels_that_do_not_compile_say_what_the_compiler_said(driver: Any) -> None:
    with pytest.raises(DeviceError, match=r"do not compile \(NVRTC error 6\): wrong words"):
        ChecksumKernels((1, 0), driver, driver)


def test_the_kernels_compile_for_gpus(tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not here")
    for generation in ("75", "90"):
        command = [
            nvcc,
            "--cubin",
            f"-arch=sm_{generation}",
            "-Werror",
            "all-warnings",
            "-o",
            str(tmp_path / "kernels"),
        ]
        done = subprocess.run([*command, str(KERNELS)], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "kernels").read_bytes().startswith(b"\x7fELF")


def test_the_kernels_compile_as_they_do_at_a_start() -> None:
    try:
        nvrtc = nvrtc_library()
    except DeviceError as error:
        pytest.skip(str(error))
    assert compiled((9, 0), nvrtc).startswith(b"\x7fELF")


def test_memory_for_cards_is_an_allocation_of_its_own(driver: Any) -> None:
    direct = GpuDirect(0, driver)
    memory = direct.allocate(10_000)
    assert (memory.segment, memory.index, memory.size_bytes) == ("VRAM", 0, 10_000)
    assert ctypes.string_at(memory.address, 10_000) == bytes(10_000)
    assert driver.memops_so_far() == 1, "synchronous copies are"
    direct.free(memory)
    assert driver.allocations_now() == 0
    with pytest.raises(DeviceError, match="cuMemAlloc_v2 failed with error 2"):
        direct.allocate(1 << 31)


@pytest.mark.parametrize(("ordering", "flushes"), [(0, 1), (100, 0), (200, 0)])
def test_writes_of_cards_are_flushed_where_nothing_else_orders_them(driver: Any, ordering: int, flushes: int) -> None:
    driver.say(1, ordering, 1)
    GpuDirect(0, driver).order_writes()
    assert driver.flushes_so_far() == flushes


@pytest.mark.parametrize(
    ("said", "why"),
    [((0, 100, 1), "does not support GPUDirect RDMA"), ((1, 0, 2), "neither orders a card's writes nor flushes them")],
)
def test_a_device_that_cards_cannot_write_to_is_refused(driver: Any, said: tuple[int, int, int], why: str) -> None:
    driver.say(*said)
    with pytest.raises(DeviceError, match=why):
        GpuDirect(0, driver)


def test_an_old_driver_is_refused(driver: Any) -> None:
    class Old:
        def __getattr__(self, name: str) -> Any:
            if name == "cuFlushGPUDirectRDMAWrites":
                raise AttributeError(name)
            return getattr(driver, name)

    driver.say(1, 0, 1)
    with pytest.raises(DeviceError, match="no cuFlushGPUDirectRDMAWrites"):
        GpuDirect(0, Old()).order_writes()
    with pytest.raises(DeviceError, match="cuDeviceGet failed with error 101"):
        GpuDirect(3, driver)


@pytest.fixture
def accelerator(driver: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[cuda.Cuda]:
    """CUDA's accelerator as it is, over the stand-in driver and torch on the CPU."""
    monkeypatch.setattr(cuda, "GpuDirect", lambda index: GpuDirect(index, driver))
    monkeypatch.setattr(cuda, "ChecksumKernels", lambda capability: ChecksumKernels((9, 0), driver, driver))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    with fake_cuda():
        made = cuda.Cuda(torch.device("cuda", 0), lambda *given: None)
        made.device = torch.device("cpu")
        monkeypatch.setattr(made, "array_to_device", torch.from_numpy)
        monkeypatch.setattr(made, "new_stream", Stream)
        monkeypatch.setattr(made, "new_event", Event)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
        yield made


class Stream:
    cuda_stream = STREAM

    def __enter__(self) -> None: ...

    def __exit__(self, *given: object) -> None: ...


class Event:
    def record(self, stream: Stream) -> None: ...

    def synchronize(self) -> None: ...


def test_blocks_that_landed_are_verified_by_the_kernels(driver: Any, accelerator: cuda.Cuda) -> None:
    driver.say(1, 0, 1)
    memory = accelerator.allocate_landing(1 << 16)
    flushed = driver.flushes_so_far()
    data = random.Random(8).randbytes(2 * 5000)
    ctypes.memmove(memory.address, data, len(data))
    found = accelerator.checksums([memory.address, memory.address + 5000], [1, 1 << 63], 5000)
    assert found == [xxhash.xxh3_64_intdigest(data[:5000], 1), xxhash.xxh3_64_intdigest(data[5000:], 1 << 63)]
    assert driver.flushes_so_far() == flushed + 1 and driver.unordered_so_far() == 0, "before the kernels"
    accelerator.free_landing(memory)
    assert driver.allocations_now() == 0


def test_kernels_that_differ_from_the_host_are_not_used(
    driver: Any, accelerator: cuda.Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(xxhash, "xxh3_64_intdigest", lambda data, seed: 5)
    with pytest.raises(DeviceError, match=r"checksums of 241 bytes on .* are not those of the host"):
        accelerator.allocate_landing(1 << 16)
    assert driver.allocations_now() == 0
