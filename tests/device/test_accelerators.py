"""Accelerators and their copies: which calls are made, in which order of arguments, and what happens when one fails."""

from __future__ import annotations

import ctypes
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from penstock.device.accelerator import HELD_COPY_BYTES_MAX, Cpu, DeviceError, numa_node_of_pci
from penstock.device.copies import CopyLane, descriptors_of
from penstock.device.cuda import DriverCopies, HipCopies
from penstock.device.registry import accelerator_of, registered
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
        CopyLane(second, to_device=True).copy(descriptors)
        with pytest.raises(RuntimeError, match="a thread on device 1 uses a stream of device 0"):
            FakeAccelerator(clock, torch.device("cuda", 0)).copy(descriptors, STREAM, True)


def test_the_memory_node_of_a_device_is_what_the_system_says(tmp_path: Path) -> None:
    for name, text in (("0000:3b:00.0", "1\n"), ("0000:5e:00.0", "-1\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "numa_node").write_text(text)
    nodes = [numa_node_of_pci(name, str(tmp_path)) for name in ("0000:3B:00.0", "0000:5e:00.0", "0000:00:00.0")]
    assert nodes == [1, None, None]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_blocks_go_to_a_real_device_and_back() -> None:
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    accelerator = accelerator_of(device)
    source, target, _ = two_copies()
    page = torch.zeros(3, 64, dtype=torch.uint8, device=device)
    at = np.array([0, 128], np.int64)
    CopyLane(accelerator, True).copy(descriptors_of(page.data_ptr() + at, source.ctypes.data + at, 64))
    CopyLane(accelerator, False).copy(descriptors_of(target.ctypes.data + at, page.data_ptr() + at, 64))
    assert copied(source, target)
