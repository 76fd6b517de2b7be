"""The order of work on a CUDA device, checked without one: loads, saves, batches that end, fail and are cancelled leave
no two accesses of the same memory unordered; and an engine that left out any wait would be found."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.engine.calibrate import calibrate
from penstock.engine.executors import RunnerStages, Staging
from penstock.engine.hf_runner import HFRunner
from penstock.engine.runner import Chunk, SamplingParams
from penstock.engine.upload_source import DeviceBlock
from penstock.io.memory import address_of, aligned_buffer
from penstock.pool.api import Done, Pool, PoolError, ReadCheck
from penstock.pool.checksum import block_checksum
from penstock.pool.device_twin import DeviceTwin
from penstock.pool.setup.open import open_local_pool
from penstock.testing.clocked_pool import ClockedPool
from penstock.testing.device_clock import Broken, DeviceClock
from penstock.testing.fake_cuda import OnDevice, fake_cuda, on_device
from tests.asking import WAIT_S, prompt_of, wait_until
from tests.engine.engine_rig import BLOCK, WatchedRunner, serving

GREEDY = SamplingParams(max_tokens=1, temperature=0.0)
PAGES = 24


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@contextlib.contextmanager
def device_runner(folder: Path, broken: Sequence[Broken] = (), pages: int = PAGES) -> Iterator[tuple[Any, DeviceClock]]:
    """A runner on a fake device whose L1 is watched."""
    with fake_cuda(broken) as clock:
        with on_device(clock):
            runner = HFRunner(str(folder), block_tokens=BLOCK, dtype="float32", device="cuda")
            runner.allocate(pages)
        data = runner.kv.data
        clock.watch(data.data_ptr(), data.numel() * data.element_size(), "L1")
        try:
            yield OnDevice(runner, clock), clock
        finally:
            runner.close()


class Unready:
    """Blocks that never come up: a batch that waits for them fails when it has come to layer 2."""

    def wait_layer(self, layer: int) -> None:
        if layer == 2:
            raise RuntimeError("out of memory (injected)")


def load_beside_compute(runner: Any, clock: DeviceClock, fails: bool = False) -> None:
    """Save four blocks, load them while a batch computes behind them, and reuse pages and host memory at once."""
    size = runner.layout.full_block_bytes
    memory = aligned_buffer(4 * size)
    runner.page_lock(memory)
    whole = (address_of(memory), address_of(memory) + memory.nbytes)
    blocks = [memory[i * size : (i + 1) * size] for i in range(4)]
    prompt = prompt_of(1, 4 * BLOCK + 24)
    runner.run([Chunk("p", prompt[: 4 * BLOCK], 0, [0, 1, 2, 3])])
    for page, block in enumerate(blocks):
        runner.download(page, block)
    clock.host_access("saving what was downloaded", reads=[whole])
    group = runner.start_upload(list(zip(blocks, [8, 9, 10, 11], strict=True)))
    uploader = threading.Thread(target=runner.upload, args=(group,))
    uploader.start()
    pending = (group, Unready()) if fails else (group,)
    chunk = Chunk("r", prompt[4 * BLOCK :], 4 * BLOCK, [8, 9, 10, 11, 12, 13], GREEDY, pending=pending)
    with pytest.raises(RuntimeError, match="injected") if fails else contextlib.nullcontext():
        runner.run([chunk])
    uploader.join()
    runner.upload(runner.start_upload(list(zip(blocks[:2], [12, 13], strict=True))))
    clock.host_access("reading another block", writes=[whole])


@pytest.mark.parametrize("fails", [False, True])
def test_a_batch_beside_a_load_leaves_nothing_unordered(fails: bool, tiny: Callable[[str], Path]) -> None:
    with device_runner(tiny("llama")) as (runner, clock):
        load_beside_compute(runner, clock, fails)
        assert clock.conflicts == []
        assert clock.operations["batched copy"] > 0 and clock.operations["index_put_"] > 0


@pytest.mark.parametrize("broken", ["wait_event", "stream.synchronize", "event.synchronize", "end of copies"])
def test_a_wait_that_is_left_out_is_found(broken: Broken, tiny: Callable[[str], Path]) -> None:
    with device_runner(tiny("llama"), [broken]) as (runner, clock):
        load_beside_compute(runner, clock, fails=broken == "stream.synchronize")
        assert clock.conflicts


def test_an_upload_and_a_download_that_fail_half_way_have_ended(tiny: Callable[[str], Path]) -> None:
    """What raises after its copy was enqueued gives page and host memory back all the same."""
    with device_runner(tiny("llama")) as (runner, clock):
        size = runner.layout.full_block_bytes
        memory = aligned_buffer(size)
        runner.page_lock(memory)
        whole = (address_of(memory), address_of(memory) + size)
        moves: list[Callable[[], None]] = [
            lambda: runner.download(3, memory),
            lambda: runner.upload(runner.start_upload([(memory, 3)])),
        ]
        for move in moves:
            for refuses in ("refuses_events", "refuses_copies"):
                setattr(clock, refuses, True)
                with pytest.raises(RuntimeError, match="injected"):
                    move()
                setattr(clock, refuses, False)
                clock.host_access("reuse", writes=[whole])
                runner.run([Chunk("r", prompt_of(2, BLOCK), 0, [3], GREEDY)])
        assert clock.operations["batched copy"] == 4
        assert clock.conflicts == []


def test_a_lost_device_is_said(tiny: Callable[[str], Path]) -> None:
    with device_runner(tiny("llama")) as (runner, clock), serving(runner, None, settle=False, l1_pages=PAGES) as rig:
        rig.ask(prompt_of(3, 20))
        assert rig.engine.healthy() == (True, "ok")
        clock.failure = "CUDA error: an illegal memory access was encountered"
        assert rig.start(prompt_of(4, 20)).wait().finish_reason == "error"
        healthy, why = rig.engine.healthy()
        assert not healthy and "illegal memory access" in why
        clock.failure = None


def test_what_a_decode_costs_does_not_grow_with_what_is_checked(tiny: Callable[[str], Path]) -> None:
    """Pages are checked when they are full and zeroed when they are begun: the decodes between cost what they did, and
    no layer waits for the device."""
    costs: dict[str, tuple[int, int]] = {}
    with device_runner(tiny("llama")) as (runner, clock):
        runner.run([Chunk("r", prompt_of(5, BLOCK + 3), 0, [0, 1, 2], GREEDY)])
        for what, at in (("between", BLOCK + 3), ("fills", 2 * BLOCK - 1), ("begins", 2 * BLOCK)):
            before = clock.operations.total(), clock.waits.total()
            runner.run([Chunk("r", [7], at, [0, 1, 2], GREEDY)])
            costs[what] = clock.operations.total() - before[0], clock.waits.total() - before[1]
        assert clock.operations["index_fill_"] == 2
    operations, waits = costs["between"]
    assert waits <= 12
    assert costs["begins"][0] - operations <= 3 and costs["begins"][1] - waits <= 1
    assert costs["fills"][0] - operations <= 10 and costs["fills"][1] - waits <= 2


def test_what_a_step_and_a_group_cost_is_bounded(tiny: Callable[[str], Path]) -> None:
    """A decode step: at most two lists go to the device, its tokens come back in one copy, and it waits for its stream
    once. A group: one batched copy whole, one for each of its stages followed layer by layer, and one wait."""
    sampled = SamplingParams(max_tokens=1, temperature=0.8, top_k=5, top_p=0.9, seed=3)
    with device_runner(tiny("llama")) as (runner, clock):
        requests = [(f"r{index}", [3 * index, 3 * index + 1], (GREEDY, sampled)[index % 2]) for index in range(6)]
        for name, pages, sampling in requests:
            runner.run([Chunk(name, prompt_of(5, BLOCK + 3), 0, pages, sampling)])
        clock.operations.clear()
        clock.waits.clear()
        for step in range(3):
            at = BLOCK + 3 + step
            runner.run([Chunk(name, [7], at, pages, sampling, step + 1) for name, pages, sampling in requests])
        assert clock.operations["array to the device"] <= 2 * 3
        assert clock.waits == {"tolist": 3, "stream.synchronize": 3}
        memory = aligned_buffer(4 * runner.layout.full_block_bytes)
        runner.page_lock(memory)
        size = runner.layout.full_block_bytes
        blocks = [(memory[index * size : (index + 1) * size], 12 + index) for index in range(4)]
        for followed, copies in ((False, 1), (True, runner.layout.layers)):
            clock.operations.clear()
            clock.waits.clear()
            runner.upload(runner.start_upload(blocks, followed))
            assert 1 <= clock.operations["batched copy"] <= copies and clock.operations.total() <= copies
            assert clock.waits == {"event.synchronize": 1}
        assert clock.conflicts == []


def test_memory_that_is_copied_is_page_locked(tiny: Callable[[str], Path]) -> None:
    """That of calibration for as long as it takes, and what a slot gets in place of its own."""
    with device_runner(tiny("llama")) as (runner, clock):
        calibrate(runner, PAGES, 64)
        assert clock.operations["batched copy"] == 2 and not clock.operations["copy of pageable memory"]
        size = runner.layout.full_block_bytes
        memory = aligned_buffer(2 * size)
        staging = Staging(memory, size, runner.page_lock)
        runner.page_lock(memory)
        staging.replace(1)
        for slot in range(2):
            runner.download(slot, staging.slot(slot))
        assert address_of(staging.slot(1)) != address_of(memory) + size
        before = clock.operations["copy of pageable memory"]
        runner.download(0, aligned_buffer(size))
        assert (before, clock.operations["copy of pageable memory"]) == (0, 1), "it would be noticed"
        assert clock.conflicts == []


def test_the_next_group_is_enqueued_before_one_has_ended(tiny: Callable[[str], Path]) -> None:
    with device_runner(tiny("llama")) as (runner, clock):
        size = runner.layout.full_block_bytes
        memory = aligned_buffer(2 * size)
        runner.page_lock(memory)
        ended: list[BaseException | None] = []
        gate, began, begin = threading.Event(), threading.Semaphore(0), runner.begin_upload

        class Gated(OnDevice):
            def begin_upload(self, group: Any) -> None:
                begin(group)
                began.release()

            def end_upload(self, group: Any) -> None:
                gate.wait(WAIT_S)
                runner.end_upload(group)

        stages = RunnerStages(Gated(runner, clock))
        for index in range(2):
            stages.upload([(memory[index * size : (index + 1) * size], index)], False, ended.append)
        assert began.acquire(timeout=WAIT_S) and began.acquire(timeout=WAIT_S), "both are on the stream"
        assert not ended
        gate.set()
        wait_until(lambda: ended == [None, None], "both have ended")
        assert stages.close(WAIT_S)
        assert clock.conflicts == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("happens", "layerwise"),
    [("nothing", True), ("nothing", False), ("batches fail", True), ("requests are cancelled", True)],
)
def test_an_engine_leaves_nothing_unordered(happens: str, layerwise: bool, tiny: Callable[[str], Path]) -> None:
    """Prompts that share documents, too many for L1 and for the slots: loads, saves and evictions all the time."""
    documents = [prompt_of(10 + i, 8 * BLOCK) for i in range(3)]
    prompts = [documents[i % 3][: BLOCK * (4 + i % 5)] + prompt_of(20 + i, 20) for i in range(12)]
    with device_runner(tiny("llama")) as (inner, clock):
        failing = FailingHalfWay(inner)
        runner = WatchedRunner(failing)
        local = open_local_pool((16 << 20,), ())
        sizes: dict[str, Any] = {"l1_pages": PAGES, "l2_slots": 8, "layerwise": layerwise, "upload_group_blocks": 2}
        with serving(runner, ClockedPool(local, clock), **sizes) as rig:
            ends: list[str | None] = []
            for first in range(0, len(prompts), 6):
                ids = [f"request-{first + i}" for i in range(6)]
                answers = [rig.start(prompts[first + i], request_id=name) for i, name in enumerate(ids)]
                if happens == "batches fail":
                    failing.fail = 1
                if happens == "requests are cancelled":
                    wait_until(lambda: any(answer.first.is_set() for answer in answers), "a first token")  # noqa: B023
                    for name in ids[::2]:
                        rig.engine.cancel(name)
                ends += [answer.wait(WAIT_S).finish_reason for answer in answers]
            rig.settle()
            assert rig.counter("saved_blocks") > 0 and rig.counter("fetched_blocks") > 0
        assert not clock.operations["copy of pageable memory"]
        waits = {name for name, _ in clock.waits_by_thread}
        assert waits <= {"penstock-upload-end", "penstock-save", "penstock-compute", "MainThread"}
        copying = {"event.synchronize", "device synchronize"}
        assert not any(name == "penstock-compute" and why in copying for name, why in clock.waits_by_thread)
        local.close(WAIT_S)
        assert clock.conflicts[:3] == []
        other: set[str] = {"nothing": set(), "batches fail": {"error"}, "requests are cancelled": {"cancelled"}}[
            happens
        ]
        assert "length" in ends and set(ends) <= {"length"} | other


class LandingPool(ClockedPool):
    """As a pool node that is read by a card: every second block lands in the twin of staging memory, if it has a place
    there, and is verified on the device; the others go to the host's memory."""

    def __init__(self, inner: Pool, clock: DeviceClock) -> None:
        super().__init__(inner, clock)
        self._device_clock = clock
        self._twin: DeviceTwin | None = None
        self._number = itertools.count()
        self.landed = 0

    def register(self, buffer: memoryview, twin: DeviceTwin | None = None) -> None:
        super().register(buffer, twin)
        self._twin = twin

    def read(
        self,
        key: bytes,
        size_bytes: int,
        into: memoryview,
        timeout_s: float,
        done: Done,
        check: ReadCheck | None = None,
    ) -> None:
        twin = self._twin
        place = twin.place(into, size_bytes) if twin is not None and next(self._number) % 2 else None
        if twin is None or place is None:
            super().read(key, size_bytes, into, timeout_s, done, check)
            return
        where, known, bounce = [(place, place + size_bytes)], self._device_clock.known(), aligned_buffer(len(into))
        self._device_clock.host_access("a card", writes=where)  # when it begins, and when it ends

        def arrived(error: PoolError | None) -> None:
            self._device_clock.learn(known)
            if error is None:
                self._device_clock.host_access("a card", writes=where)
                ctypes.memmove(place, address_of(bounce), size_bytes)
                if twin.checksums([place], [key]) != [block_checksum(key, bounce[:size_bytes])]:
                    error = PoolError("checksum", "of what landed")
                else:
                    self.landed += 1
                    twin.landed(into)
            done(error)

        self._inner.read(key, size_bytes, bounce, timeout_s, arrived, check)


@pytest.mark.slow
@pytest.mark.parametrize("layerwise", [False, True])
def test_blocks_that_land_on_the_device_leave_nothing_unordered(layerwise: bool, tiny: Callable[[str], Path]) -> None:
    """A card writes into a slot's twin only after the copy out of it, and the copy comes after the check."""
    prompts = [prompt_of(40 + i % 3, 8 * BLOCK) + prompt_of(50 + i, 20) for i in range(9)]
    with device_runner(tiny("llama")) as (runner, clock):
        local = open_local_pool((16 << 20,), ())
        pool = LandingPool(local, clock)
        sizes: dict[str, Any] = {"l1_pages": PAGES, "l2_slots": 8, "layerwise": layerwise, "upload_group_blocks": 2}
        with serving(runner, pool, lands_on=runner.kv.accelerator, **sizes) as rig:
            for first in range(0, len(prompts), 3):
                answers = [rig.start(prompt) for prompt in prompts[first : first + 3]]
                assert {answer.wait(WAIT_S).finish_reason for answer in answers} == {"length"}
                rig.settle()
        assert pool.landed > 0 and clock.operations["checksums"] == pool.landed
        assert not clock.operations["copy of pageable memory"]
        local.close(WAIT_S)
        assert clock.conflicts[:3] == []


def test_a_copy_of_what_landed_that_is_not_waited_for_is_found(tiny: Callable[[str], Path]) -> None:
    for broken in ((), ("event.synchronize",)):
        with device_runner(tiny("llama"), broken) as (runner, clock):
            size = runner.layout.full_block_bytes
            memory = runner.kv.accelerator.allocate_landing(2 * size)
            where = [(memory.address, memory.address + size)]
            clock.host_access("a card", writes=where)
            runner.upload(runner.start_upload([(DeviceBlock(memory.address, size), 3)], followed=False))
            clock.host_access("a card", writes=where)
            assert bool(clock.conflicts) == bool(broken)
            assert clock.operations["batched copy"] == 1


class FailingHalfWay:
    """A runner whose next `fail` batches raise when they have come to layer 2."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.fail = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def run(self, batch: Sequence[Chunk]) -> Any:
        if not self.fail:
            return self._inner.run(batch)
        self.fail -= 1
        first, *rest = batch
        spoiled = Chunk(
            first.request_id,
            first.tokens,
            first.start,
            first.pages,
            first.sampling,
            first.sampled_index,
            (*first.pending, Unready()),
        )
        return self._inner.run([spoiled, *rest])
