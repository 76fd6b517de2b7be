"""Accelerators and their copies: which calls are made, in which order of arguments, and what happens when one fails."""

from __future__ import annotations

import ctypes
import os
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import xxhash

from penstock.device.accelerator import HELD_COPY_BYTES_MAX, Cpu, DeviceError, numa_node_of_pci
from penstock.device.copies import CopyLane, descriptors_of
from penstock.device.cuda import Cuda, DriverCopies, HipCopies, loaded_library
from penstock.device.registry import accelerator_of, registered
from penstock.io.memory import address_of, aligned_buffer
from penstock.testing.fake_cuda import FakeAccelerator, fake_cuda
from penstock.testing.null_accelerator import NullAccelerator
from penstock.vllm.layout import KVRows, Layer

STREAM = SimpleNamespace(cuda_stream=77)


def two_copies() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Source, target, and descriptors of copies of its first and its third row."""
    source = np.random.default_rng(1).integers(0, 256, (3, 64), np.uint8)
    target = np.zeros_like(source)
    at = np.array([0, 128], np.int64)
    return source, target, descriptors_of(target.ctypes.data + at, source.ctypes.data + at, 64)


def copied(source: np.ndarray, target: np.ndarray) -> bool:
    return bool((target[[0, 2]] == source[[0, 2]]).all() and not target[1].any())


class Library:
    """As libcuda is called, by C: what it is asked to copy, the host copies."""

    def __init__(self, batched: bool = True, error: int = 0) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.error = error
        one = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p)
        self.cuMemcpyAsync = one(self._one)
        if batched:
            attributes = (ctypes.POINTER(ctypes.c_int), ctypes.POINTER(ctypes.c_size_t), ctypes.c_size_t)
            numbers = ctypes.POINTER(ctypes.c_uint64)
            arguments = (numbers, numbers, numbers, ctypes.c_size_t, *attributes, ctypes.c_void_p, ctypes.c_void_p)
            self.cuMemcpyBatchAsync = ctypes.CFUNCTYPE(ctypes.c_int, *arguments)(self._many)

    def _one(self, target: int, source: int, size: int, stream: int) -> int:
        self.calls.append(("one", stream))
        ctypes.memmove(target, source, size)
        return 0

    def _many(self, targets: Any, sources: Any, sizes: Any, count: int, order: Any, first: Any, *rest: int) -> int:
        self.calls.append(("many", count, order[0], first[0], rest[0], rest[2]))
        if not self.error:
            for at in range(count):
                ctypes.memmove(targets[at], sources[at], sizes[at])
        return self.error


@pytest.mark.parametrize(("to_device", "order"), [(True, 3), (False, 1)])
def test_the_driver_is_called_once_for_all_copies(to_device: bool, order: int) -> None:
    """Host memory may be read in any order; what is read from the device is what the stream left there."""
    library = Library()
    source, target, descriptors = two_copies()
    copies = DriverCopies(library)
    copies(descriptors, STREAM, to_device)
    assert copied(source, target) and copies.is_batched
    assert library.calls == [("many", 2, order, 0, 1, 77)]


@pytest.mark.parametrize("library", [Library(batched=False), Library(error=801)])
def test_a_driver_without_batched_copies_copies_one_by_one(library: Library) -> None:
    source, target, descriptors = two_copies()
    copies = DriverCopies(library)
    for _ in range(2):
        copies(descriptors, STREAM, True)
    assert copied(source, target) and not copies.is_batched
    assert [call for call in library.calls if call[0] == "one"] == [("one", 77)] * 4
    assert sum(call[0] == "many" for call in library.calls) <= 1, "it is not asked again"


def test_an_error_of_the_driver_is_said() -> None:
    with pytest.raises(DeviceError, match="cuMemcpyBatchAsync failed with error 700"):
        DriverCopies(Library(error=700))(two_copies()[2], STREAM, True)


def test_rocm_copies_are_calls_of_their_own() -> None:
    seen = []

    def copy(target: int, source: int, size: int, kind: int, stream: int) -> int:
        seen.append((size, kind, stream))
        ctypes.memmove(target, source, size)
        return 0

    kinds = (ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)
    source, target, descriptors = two_copies()
    HipCopies(SimpleNamespace(hipMemcpyAsync=ctypes.CFUNCTYPE(*kinds)(copy)))(descriptors, STREAM, True)
    assert copied(source, target) and seen == [(64, 4, 77)] * 2


def test_the_library_that_isloaded_library_is_found_by_its_file(tmp_path: Path) -> None:
    maps = tmp_path / "maps"
    line = "7f00-7f10 r-xp 00000000 fd:00 17 {}\n"
    maps.write_text("7f00-7f10 rw-p 00000000 00:00 0\n" + line.format("/opt/torch/lib/libamdhip64.so.7"))
    assert loaded_library("libamdhip64.so", str(maps)) == "/opt/torch/lib/libamdhip64.so.7"
    assert loaded_library("libelsewhere.so", str(maps)) == "libelsewhere.so"
    assert ctypes.CDLL(loaded_library("libc.so")).getpid() == os.getpid(), "one that is"


class Runtime:
    """What a thread knows of a device of CUDA's, as torch and the runtime deal with it: `set_device` binds no context
    where the device stays 0, the calls of the driver need one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.threads = threading.local()
        self.bindings: list[str] = []
        self.locks: list[tuple[int, int, int]] = []
        self.error = self.last_error = 0
        monkeypatch.setattr(torch.cuda, "set_device", self.set_device)
        monkeypatch.setattr(torch.cuda, "mem_get_info", self.mem_get_info)
        monkeypatch.setattr(torch.cuda, "cudart", lambda: self)
        monkeypatch.setattr(torch, "ones", self.launch)

    def set_device(self, device: torch.device) -> None:
        if device.index != getattr(self.threads, "device", 0):
            self.threads.device = device.index
            self.threads.context = device.index

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        self.threads.context = device.index
        self.bindings.append(threading.current_thread().name)
        return 0, 0

    def copy(self, descriptors: np.ndarray, stream: Any, to_device: bool) -> None:
        assert hasattr(self.threads, "context"), "error 201: invalid device context"

    def cudaHostRegister(self, address: int, size_bytes: int, flags: int) -> int:
        self.locks.append((address, size_bytes, flags))
        self.last_error = self.error
        return self.error

    def cudaHostUnregister(self, address: int) -> int:
        self.last_error = self.error
        return self.error

    def launch(self, *size: int, device: torch.device) -> None:
        error, self.last_error = self.last_error, 0
        if error:
            raise RuntimeError(f"CUDA error {error}, of an earlier call")


def test_a_thread_has_a_context_before_its_first_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime(monkeypatch)
    with fake_cuda():
        accelerator = Cuda(torch.device("cuda", 0), runtime.copy)
        lane = CopyLane(accelerator, to_device=True)
        descriptors = two_copies()[2]
        errors: list[Exception] = []

        def copies() -> None:
            try:
                for _ in range(3):
                    lane.copy(descriptors)
            except Exception as error:  # noqa: BLE001 (whatever the thread raised is the test's to judge)
                errors.append(error)

        for name in ("first", "second"):
            thread = threading.Thread(target=copies, name=name)
            thread.start()
            thread.join()
    assert not errors and runtime.bindings == ["first", "second"], "once for each"


def test_memory_that_cannot_be_locked_leaves_no_error_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runtime keeps a failed call's error, and the next launch of anybody would raise it."""
    runtime = Runtime(monkeypatch)
    with fake_cuda():
        accelerator = Cuda(torch.device("cuda", 0), runtime.copy)
    accelerator.lock(4096, 8192)
    assert runtime.locks == [(4096, 8192, 3)], "portable and mapped: vLLM's kernel reads it where it lies"
    runtime.error = 712
    with pytest.raises(DeviceError, match="cudaHostRegister of 8192 bytes failed with CUDA error 712"):
        accelerator.lock(4096, 8192)
    assert runtime.last_error == 0
    accelerator.unlock(4096)
    assert runtime.last_error == 0


@pytest.mark.parametrize("size", [1, HELD_COPY_BYTES_MAX, HELD_COPY_BYTES_MAX + 1])
def test_the_cpu_copies_bytes(size: int) -> None:
    source = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    target = np.zeros(size + 1, np.uint8)
    lane = CopyLane(accelerator_of(torch.device("cpu")), to_device=True)
    lane.copy(descriptors_of(np.array([target.ctypes.data]), np.array([source.ctypes.data]), size))
    assert (target[:size] == source).all() and target[size] == 0


def test_a_kind_of_device_that_nobody_registered_is_refused() -> None:
    with pytest.raises(DeviceError, match="devices of type 'meta' are not served; served are cpu, cuda"):
        accelerator_of(torch.device("meta"))
    with registered("meta", Cpu):
        assert isinstance(accelerator_of(torch.device("meta")), Cpu)
    with pytest.raises(DeviceError, match="'meta'"):
        accelerator_of(torch.device("meta"))


def test_a_message_of_any_number_of_blocks_is_three_calls_of_the_driver() -> None:
    for count in (1, 4, 64):
        accelerator = NullAccelerator()
        rows = KVRows([[Layer(str(i), torch.empty(16, 512, dtype=torch.uint8)) for i in range(32)]], accelerator)
        parts = [(4096 + index * 65536, [[1, 5, 9, 13]]) for index in range(count)]
        for direction in (rows.upload, rows.download):
            accelerator.calls.clear()
            direction(parts)
            assert accelerator.calls == Counter({"batched copy": 1, "record": 1, "synchronize": 1})
        assert accelerator.copies == 2 * count * 32 * 4
        assert accelerator.copied_bytes == 2 * count * 32 * 4 * 512


def test_copies_go_to_the_device_of_their_lane_from_any_thread() -> None:
    """A thread begins on device 0."""
    descriptors = two_copies()[2]
    with fake_cuda() as clock:
        second = FakeAccelerator(clock, torch.device("cuda", 1))
        with pytest.raises(RuntimeError, match="a thread on device 0 uses a stream of device 1"):
            second.copy(descriptors, second.new_stream(), True)
        lane = CopyLane(second, to_device=True)
        lane.copy(descriptors)
        event, errors = lane.enqueue(descriptors), []

        def waits() -> None:
            try:
                lane.finish(event)
            except RuntimeError as error:
                errors.append(error)

        thread = threading.Thread(target=waits)
        thread.start()
        thread.join()
        assert not errors, "whoever waits is on the device too: a thread on another one would get a context there"
        with pytest.raises(RuntimeError, match="a thread on device 1 uses a stream of device 0"):
            FakeAccelerator(clock, torch.device("cuda", 0)).copy(descriptors, STREAM, True)


def test_the_memory_node_of_a_device_is_what_the_system_says(tmp_path: Path) -> None:
    for name, text in (("0000:3b:00.0", "1\n"), ("0000:5e:00.0", "-1\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "numa_node").write_text(text)
    nodes = [numa_node_of_pci(name, str(tmp_path)) for name in ("0000:3B:00.0", "0000:5e:00.0", "0000:00:00.0")]
    assert nodes == [1, None, None]


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def last_gpu() -> torch.device:
    return torch.device("cuda", torch.cuda.device_count() - 1)


@on_gpu
@pytest.mark.parametrize("locked", [True, False])
def test_blocks_go_to_a_real_device_and_back(locked: bool) -> None:
    """On threads that did nothing on the device before, as copies do."""
    device = last_gpu()
    accelerator = accelerator_of(device)
    memory = aligned_buffer(2 * 192)
    source, target = np.frombuffer(memory, np.uint8).reshape(2, 3, 64)
    source[:] = two_copies()[0]
    page = torch.zeros(3, 64, dtype=torch.uint8, device=device)
    accelerator.synchronize()
    at = np.array([0, 128], np.int64)
    if locked:
        accelerator.lock(address_of(memory), memory.nbytes)
    for to_device, move in (
        (True, descriptors_of(page.data_ptr() + at, source.ctypes.data + at, 64)),
        (False, descriptors_of(target.ctypes.data + at, page.data_ptr() + at, 64)),
    ):
        with ThreadPoolExecutor(1) as thread:
            thread.submit(CopyLane(accelerator, to_device).copy, move).result()
    if locked:
        accelerator.unlock(address_of(memory))
    assert copied(source, target)


@on_gpu
def test_memory_that_a_real_device_does_not_lock_leaves_no_error_behind() -> None:
    accelerator, memory = accelerator_of(last_gpu()), aligned_buffer(8192)
    accelerator.lock(address_of(memory), memory.nbytes)
    with pytest.raises(DeviceError, match="cudaHostRegister of 8192 bytes failed"):
        accelerator.lock(address_of(memory), memory.nbytes)
    accelerator.unlock(address_of(memory))
    assert torch.ones(3, device=accelerator.device).sum().item() == 3.0


@on_gpu
def test_a_real_device_replays_what_it_recorded() -> None:
    accelerator = accelerator_of(last_gpu())
    with ThreadPoolExecutor(1) as thread:

        def record_and_replay() -> list[float]:
            accelerator.use()
            inputs = torch.zeros(4, device=accelerator.device)
            output, replay = accelerator.record(lambda: inputs * 2 + 1)
            found = []
            for value in (3.0, 5.0):
                inputs.fill_(value)
                replay()
                found.append(output.sum().item())
            return found

        assert thread.submit(record_and_replay).result() == [28.0, 44.0]


@on_gpu
def test_what_lands_on_a_real_device_is_verified_and_copied_there() -> None:
    """On threads that did nothing on the device before; a copy takes a card's place. One whose kernels differ from the
    host fails here."""
    device = last_gpu()
    accelerator = accelerator_of(device)
    size_bytes, seeds = 300_000, [7, (1 << 64) - 7]
    blocks = np.random.default_rng(3).integers(0, 256, (2, size_bytes), np.uint8)
    with ThreadPoolExecutor(1) as thread:
        try:
            memory = thread.submit(accelerator.allocate_landing, 1 << 20).result()
        except DeviceError as error:
            if "does not support GPUDirect RDMA" not in str(error):
                raise
            pytest.skip(str(error))
    places = memory.address + np.array([0, 1 << 19], np.int64)
    page = torch.zeros(2, size_bytes, dtype=torch.uint8, device=device)
    accelerator.synchronize()
    lane = CopyLane(accelerator, to_device=True)
    lane.copy(descriptors_of(places, blocks.ctypes.data + np.array([0, size_bytes], np.int64), size_bytes))
    with ThreadPoolExecutor(2) as threads:
        found = [threads.submit(accelerator.checksums, places.tolist(), seeds, size_bytes) for _ in range(8)]
        want = [xxhash.xxh3_64_intdigest(block, seed) for block, seed in zip(blocks, seeds, strict=True)]
        assert [one.result() for one in found] == [want] * 8
    lane.copy(descriptors_of(page.data_ptr() + np.array([0, size_bytes], np.int64), places, size_bytes))
    assert (page.cpu().numpy() == blocks).all()
    accelerator.free_landing(memory)
