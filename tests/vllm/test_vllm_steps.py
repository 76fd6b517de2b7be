"""Steps of vLLM and copies beside them: who waits for what, counted; and that nothing is unordered on a device."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from penstock.device.accelerator import Accelerator, Cpu, DeviceError
from penstock.io.memory import address_of, aligned_buffer
from penstock.testing.device_clock import Broken, DeviceClock
from penstock.testing.fake_cuda import FakeAccelerator, fake_cuda, on_device
from penstock.vllm.layout import KVRows, Layer
from penstock.vllm.steps import EVENTS_MAX, StepError, Steps

WAIT_S = 20.0
CPU = Cpu(torch.device("cpu"))
LAYERS, PLACES, ROW_BYTES = 3, 32, 64
FOUR = 4 * LAYERS * ROW_BYTES


class GpuEvent:
    """An event of a GPU that a test runs: passes when the test says so."""

    made: list[GpuEvent]

    def __init__(self) -> None:
        self.over = threading.Event()
        self.waits = 0
        GpuEvent.made.append(self)

    def record(self, stream: object = None) -> None: ...

    def query(self) -> bool:
        return self.over.is_set()

    def synchronize(self) -> None:
        self.waits += 1
        assert self.over.wait(WAIT_S), "the event never passed"


class Gpu(Accelerator):
    """A device whose events a test lets pass."""

    def use(self) -> None: ...

    def new_event(self) -> GpuEvent:
        return GpuEvent()


GPU = Gpu(torch.device("cuda", 0))


@pytest.fixture
def gpu() -> Iterator[list[GpuEvent]]:
    GpuEvent.made = []
    yield GpuEvent.made
    for event in GpuEvent.made:
        event.over.set()


def returns(work: Callable[[], object]) -> bool:
    """Whether it ends although no event passes meanwhile."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(1.0)
    return not thread.is_alive()


def test_a_save_waits_for_its_own_step_and_for_no_later_one(gpu: list[GpuEvent]) -> None:
    """With asynchronous scheduling a further step is on the stream whenever one is looked at."""
    steps = Steps(GPU)
    steps.record(0)
    steps.record(1)
    gpu[0].over.set()
    for _ in range(20):  # twenty blocks of step 0
        assert returns(lambda: steps.wait(0, WAIT_S)), "step 1 is still computed; nobody asked for it"
    assert gpu[0].waits <= 1 and gpu[1].waits == 0
    assert not returns(lambda: steps.wait(1, WAIT_S)), "step 1 is still computed"


def test_a_step_costs_vllms_thread_one_event_and_no_wait(gpu: list[GpuEvent]) -> None:
    steps = Steps(GPU)
    for step in range(3 * EVENTS_MAX):
        steps.begin(step, zeroes=False)
        steps.record(step)
    assert len(gpu) == 3 * EVENTS_MAX
    assert not any(event.waits for event in gpu)
    gpu[-1].over.set()
    gpu[2 * EVENTS_MAX].over.set()
    assert returns(lambda: steps.wait(0, WAIT_S)), "an old step is over when the oldest event that is kept has passed"


def test_an_event_that_passed_is_not_asked_for_again(gpu: list[GpuEvent]) -> None:
    steps = Steps(GPU)
    steps.record(0)
    gpu[0].over.set()
    steps.record(1)
    assert returns(lambda: steps.wait(0, WAIT_S)) and gpu[0].waits == 0 and gpu[1].waits == 0


def test_an_upload_waits_for_the_zeros_of_its_step_only(gpu: list[GpuEvent]) -> None:
    steps = Steps(GPU)
    steps.begin(4, zeroes=True)
    steps.record(4)
    zeros, computed = gpu
    assert not returns(lambda: steps.wait_begun(4, WAIT_S)), "zeros are still on the stream"
    zeros.over.set()
    assert returns(lambda: steps.wait_begun(4, WAIT_S)) and computed.waits == 0


@pytest.mark.parametrize("accelerator", [CPU, GPU])
def test_what_a_failed_step_was_to_compute_is_not_saved(accelerator: Accelerator, gpu: list[GpuEvent]) -> None:
    steps = Steps(accelerator)
    steps.record(6)
    steps.fail(7)
    steps.record(9)  # 8 never came
    for event in gpu:
        event.over.set()
    steps.wait(6, WAIT_S)
    steps.wait(9, WAIT_S)
    for step in (7, 8):
        with pytest.raises(StepError, match=f"step {step} failed"):
            steps.wait(step, WAIT_S)
    with pytest.raises(TimeoutError, match=r"step 10 was not computed within 0\.01 s"):
        steps.wait(10, 0.01)
    steps.stop()
    with pytest.raises(StepError, match="the worker ends"):
        steps.wait(10, WAIT_S)


# -- the order of work on a device --------------------------------------------------------------------------------


@contextmanager
def device(
    broken: tuple[Broken, ...] = (), layers_side_by_side: bool = False
) -> Iterator[tuple[DeviceClock, KVRows, int]]:
    """A worker's caches on a fake device, and the address of its part of a slot."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with fake_cuda(broken) as clock:
        if layers_side_by_side:
            whole = torch.zeros(PLACES, LAYERS, ROW_BYTES, dtype=torch.uint8)
            caches = [whole[:, i] for i in range(LAYERS)]
            clock.watch(whole.data_ptr(), whole.numel(), "cache")
        else:
            caches = [torch.zeros(PLACES, ROW_BYTES, dtype=torch.uint8) for _ in range(LAYERS)]
            for i, cache in enumerate(caches):
                clock.watch(cache.data_ptr(), cache.numel(), f"cache l{i}")
        accelerator = FakeAccelerator(clock, torch.device("cuda", 0))
        rows = KVRows([[Layer(f"l{i}", cache) for i, cache in enumerate(caches)]], accelerator)
        memory = aligned_buffer(4096)
        accelerator.lock(address_of(memory), memory.nbytes)
        yield clock, rows, address_of(memory)
    torch.set_num_threads(threads)


def compute(rows: KVRows, places: list[int]) -> None:
    """A step writes these blocks, on vLLM's stream."""
    for layer in rows.groups[0]:
        layer.rows.index_copy_(0, torch.tensor(places), torch.ones(len(places), ROW_BYTES, dtype=torch.uint8))


def zero(rows: KVRows, places: list[int]) -> None:
    for layer in rows.groups[0]:
        layer.rows.index_fill_(0, torch.tensor(places), 0)


def save(broken: tuple[Broken, ...] = (), waits: bool = True) -> DeviceClock:
    """A block is saved behind its step while the next step computes; its host memory is read, its place used again."""
    with device(broken) as (clock, rows, part), on_device(clock):
        steps = Steps(rows.accelerator)
        compute(rows, [3, 4, 5, 6])
        steps.record(1)
        compute(rows, [7])
        steps.record(2)
        if waits:
            steps.wait(1, WAIT_S)
        rows.download([(part, [[3, 4, 5, 6]])])
        clock.host_access("the pool takes it", reads=[(part, part + FOUR)])
        compute(rows, [3])
        return clock


def load(broken: tuple[Broken, ...] = (), waits: bool = True) -> DeviceClock:
    """A load gets blocks that the step just scheduled puts zeros into; then their slot is used again, and a step
    computes with them."""
    with device(broken) as (clock, rows, part), on_device(clock):
        steps = Steps(rows.accelerator)
        zero(rows, [9, 10])
        steps.begin(1, zeroes=True)
        compute(rows, [20])
        steps.record(1)
        if waits:
            steps.wait_begun(1, WAIT_S)
        rows.upload([(part, [[9, 10, 11, -1]])])
        clock.host_access("a fetch reuses the slot", writes=[(part, part + FOUR)])
        compute(rows, [9, 10, 11])
        return clock


@pytest.mark.parametrize("history", [save, load])
def test_copies_and_steps_are_in_order(history: Callable[[], DeviceClock]) -> None:
    assert not history().conflicts


@pytest.mark.parametrize("history", [save, load])
def test_a_copy_that_waits_for_no_step_would_be_found(history: Callable[..., DeviceClock]) -> None:
    assert history(waits=False).conflicts
    for broken in ("event.synchronize", "end of copies"):
        assert history(broken=(broken,)).conflicts, "neither would one that does not end before it returns"


@pytest.mark.parametrize("history", [save, load])
def test_what_a_copy_waits_for_is_counted(history: Callable[[], DeviceClock]) -> None:
    """One event for the step, one for the copy; one batched copy for all layers and groups, and no index."""
    clock = history()
    assert clock.waits["event.synchronize"] == 2
    assert clock.operations["batched copy"] == 1
    assert not clock.waits["torch.tensor"] and not clock.operations["array to the device"]
    assert not clock.waits["stream.synchronize"] and not clock.waits["device synchronize"]


@pytest.mark.parametrize("direction", ["upload", "download"])
def test_a_copy_that_raises_ends_before_it_says_so(direction: str) -> None:
    """Its pages and its slot are used again at once, whether nothing of it was enqueued, half of it or all."""
    with device() as (clock, rows, part), on_device(clock):
        copy = getattr(rows, direction)
        with pytest.raises(IndexError, match=f"vLLM block {PLACES}; there are {PLACES}"):
            copy([(part, [[9, 10, 11, PLACES]])])
        assert clock.operations.total() == 0
        clock.refuses_copies = True
        with pytest.raises(DeviceError, match="injected"):
            copy([(part, [[9, 10, 11, 12]])])
        clock.refuses_copies, clock.refuses_events = False, True
        with pytest.raises(RuntimeError, match="injected"):
            copy([(part, [[13, 14, 15, 16]])])
        zero(rows, list(range(9, 17)))
        clock.host_access("the slot is used again", writes=[(part, part + FOUR)])
        assert clock.operations.total() > 2, "one copy that raised half-way, one behind which the event did, and zeros"
        assert not clock.conflicts
