"""The checker of the order of work: what it finds, what it does not take for a fault, and what it counts."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch

from penstock.device.copies import CopyLane, descriptors_of
from penstock.device.registry import accelerator_of
from penstock.io.memory import address_of, aligned_buffer
from penstock.testing.device_clock import Broken, DeviceClock
from penstock.testing.fake_cuda import FakeAccelerator, fake_cuda, on_device

CUDA = torch.device("cuda", 0)
BYTES = 256


def load_then_compute(broken: tuple[Broken, ...] = (), waits: bool = True) -> DeviceClock:
    """A block goes up, a kernel reads it, the block is written over by the host, and the page by the next load."""
    with fake_cuda(broken) as clock, on_device(clock):
        accelerator = accelerator_of(CUDA)
        page, memory = torch.zeros(BYTES, dtype=torch.uint8), aligned_buffer(BYTES)
        clock.watch(page.data_ptr(), BYTES, "page")
        accelerator.lock(address_of(memory), BYTES)
        lane = CopyLane(accelerator, to_device=True)
        move = descriptors_of(np.array([page.data_ptr()]), np.array([address_of(memory)]), BYTES)
        event = lane.enqueue(move)
        if waits:
            accelerator.current_stream().wait_event(event)
        page.add_(1)
        accelerator.current_stream().synchronize()
        clock.host_access("reuse", writes=[(address_of(memory), address_of(memory) + BYTES)])
        lane.finish(lane.enqueue(move))
        return clock


def test_a_history_in_order_has_no_conflict() -> None:
    clock = load_then_compute()
    assert not clock.conflicts
    assert (clock.operations["batched copy"], clock.operations["add_"]) == (2, 1)
    assert clock.waits == {"stream.synchronize": 1, "event.synchronize": 1}
    assert clock.waits_by_thread["MainThread", "stream.synchronize"] == 1


@pytest.mark.parametrize("broken", ["wait_event", "stream.synchronize", "end of copies"])
def test_each_order_that_a_device_does_not_give_is_a_conflict(broken: Broken) -> None:
    conflicts = load_then_compute((broken,)).conflicts
    assert conflicts and all(conflict.first and conflict.second for conflict in conflicts)


def test_a_wait_that_is_left_out_is_a_conflict_and_says_of_what() -> None:
    first = load_then_compute(waits=False).conflicts[0]
    assert first.where.startswith("page at byte 0")
    assert "batched copy on stream" in first.first and "add_ on stream" in first.second


def test_two_reads_are_no_conflict_and_neither_are_accesses_side_by_side() -> None:
    with fake_cuda() as clock, on_device(clock):
        data = torch.zeros(4 * BYTES, dtype=torch.uint8)
        clock.watch(data.data_ptr(), data.numel(), "data")
        clock.synchronize()
        other = clock.new_stream()
        data[:BYTES].sum()
        with clock.on_stream(other):
            data[:BYTES].sum()
            data[2 * BYTES :].fill_(1)
        data[BYTES : 2 * BYTES].fill_(1)
        assert not clock.conflicts
        with clock.on_stream(other):
            data[BYTES - 1 : BYTES].fill_(1)
        assert clock.conflicts, "a write of what the first stream reads"


def test_memory_of_one_name_is_told_apart_and_forgotten() -> None:
    with fake_cuda() as clock:
        accelerator = FakeAccelerator(clock, CUDA)
        first, second = aligned_buffer(BYTES), aligned_buffer(BYTES)
        lane, other = clock.new_stream(), clock.new_stream()
        for memory, stream in ((first, lane), (second, other)):
            accelerator.lock(address_of(memory), BYTES)
            clock.enqueue("write", (), [(address_of(memory), address_of(memory) + BYTES)], stream)
        assert not clock.conflicts
        accelerator.unlock(address_of(first))
        clock.enqueue("write", (), [(address_of(first), address_of(first) + BYTES)], other)
        assert not clock.conflicts, "it is no more the device's"
        accelerator.lock(address_of(first), BYTES)
        with pytest.raises(RuntimeError, match="locked already"):
            accelerator.lock(address_of(first), BYTES)


def by_lock(work: Callable[[], None], then: Callable[[], None]) -> None:
    lock, done = threading.Lock(), threading.Event()

    def first() -> None:
        with lock:
            work()
        done.set()

    thread = threading.Thread(target=first)
    thread.start()
    done.wait(10.0)
    with lock:
        then()
    thread.join()


def by_queue(work: Callable[[], None], then: Callable[[], None]) -> None:
    passed: queue.SimpleQueue[int] = queue.SimpleQueue()
    thread = threading.Thread(target=lambda: (work(), passed.put(1)))
    thread.start()
    passed.get()
    then()
    thread.join()


def by_join(work: Callable[[], None], then: Callable[[], None]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    then()


@pytest.mark.parametrize("passing", [by_lock, by_queue, by_join])
def test_threads_learn_from_each_other(passing: Callable[..., None]) -> None:
    """One waits for a copy, the other reuses its memory."""
    with fake_cuda() as clock:
        accelerator = FakeAccelerator(clock, CUDA)
        memory = aligned_buffer(2 * BYTES)
        address = address_of(memory)
        accelerator.lock(address, 2 * BYTES)
        lane = CopyLane(accelerator, to_device=True)

        def copy() -> None:
            lane.copy(descriptors_of(np.array([address + BYTES]), np.array([address]), BYTES))

        passing(copy, lambda: clock.host_access("reuse", writes=[(address, address + 2 * BYTES)]))
        assert not clock.conflicts


def test_a_thread_that_heard_nothing_is_in_no_order() -> None:
    with fake_cuda() as clock:
        accelerator = FakeAccelerator(clock, CUDA)
        memory = aligned_buffer(BYTES)
        address = address_of(memory)
        accelerator.lock(address, BYTES)
        clock.enqueue("write", (), [(address, address + BYTES)], clock.new_stream())
        clock.host_access("reuse", writes=[(address, address + BYTES)])
        assert [conflict.second for conflict in clock.conflicts] == ["reuse by the host"] * (BYTES // 64)
