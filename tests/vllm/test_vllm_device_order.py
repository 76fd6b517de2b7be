"""A worker of vLLM's and Penstock's scheduler side on a device that is not there: saves, loads and steps that go on
meanwhile leave no two accesses of vLLM's blocks or of staging memory unordered, whatever fails; and a worker that left
out any wait would be found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from penstock.device.registry import registered
from penstock.io.memory import address_of
from penstock.pool.api import Pool
from penstock.testing.clocked_pool import ClockedPool
from penstock.testing.device_clock import Broken, Clock, DeviceClock
from penstock.testing.fake_cuda import FakeAccelerator, fake_cuda, on_device
from penstock.vllm import host as host_module
from penstock.vllm.link import Link, Message, Notice
from penstock.vllm.settings import Settings
from penstock.vllm.shape import open_pool_of
from penstock.vllm.steps import Steps
from tests.vllm.test_vllm_sides import BLOCK, ROW_BYTES, Rig
from tests.waiting import wait_until

LAYERS, BLOCKS = 2, 3  # of the rig's one worker; pool blocks of a request


class Locked(FakeAccelerator):
    """Remembers where the worker sees staging memory."""

    staging = 0

    def lock(self, address: int, size_bytes: int) -> None:
        super().lock(address, size_bytes)
        Locked.staging = address


def _key(message: Message) -> tuple[str, Any] | None:
    number = message.number if isinstance(message, Notice) else getattr(message, "op_id", None)
    return None if number is None else (type(message).__name__, number)


@contextmanager
def links_pass_clocks(clock: DeviceClock, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whoever receives a message knows what its sender knew."""
    sent: dict[tuple[str, Any], Clock] = {}
    send, receive = Link.send, Link.receive

    def sends(link: Link, message: Message) -> None:
        key = _key(message)
        if key is not None:
            sent[key] = clock.known()
        send(link, message)

    def receives(link: Link, timeout_s: float | None = None) -> Message:
        message = receive(link, timeout_s)
        clock.learn(sent.get(_key(message) or ("", 0), {}))
        return message

    with monkeypatch.context() as patched:
        patched.setattr(Link, "send", sends)
        patched.setattr(Link, "receive", receives)
        yield


class Vllm:
    """What vLLM does with the rig's worker: steps that write and zero blocks, on its own thread and stream."""

    def __init__(self, rig: Rig, clock: DeviceClock) -> None:
        self.rig, self.clock = rig, clock
        self.worker = rig.workers[0]
        self.layers: list[torch.Tensor] = rig.caches[0][0]
        self.step = 0

    def compute(self, places: list[int], value: int, zeroes: list[int] | None = None) -> int:
        """A step puts zeros into `zeroes`, then computes `places`; it is over on the device some time later."""
        self.step += 1
        with on_device(self.clock):
            if zeroes:
                for layer in self.layers:
                    layer.index_fill_(0, torch.tensor(zeroes), 0)
            self.worker.steps.begin(self.step, bool(zeroes))
            for layer in self.layers:
                layer.index_fill_(0, torch.tensor(places), value)
            self.worker.steps.record(self.step)
        return self.step

    def save(self, name: str, value: int) -> None:
        """Compute the blocks of a request at places 0 to 5, save them, and compute others before they are saved."""
        host, before = self.rig.host, self.rig.saved()
        self.rig.submit(name, BLOCKS)
        step = self.compute([0, 1, 2, 3, 4, 5], value)
        pages = {host.offer(name, index, [[2 * index, 2 * index + 1]], step)[0] for index in range(BLOCKS)}
        host.wake()
        self.compute([30, 31], value)

        def given_back() -> bool:
            pages.difference_update(host.released())
            return not pages

        wait_until(given_back, "vLLM's blocks are given back")
        self.compute([0, 1, 2, 3, 4, 5], 99)  # they are somebody else's now
        if not self.clock.refuses_copies:
            wait_until(lambda: self.rig.saved() >= before + BLOCKS or bool(host.fatal), "the blocks are saved")
        host.finish(name)

    def load(self, name: str, value: int) -> bool:
        """Load them into places 10 to 15, which the step just begun puts zeros into, and compute with them."""
        host = self.rig.host
        self.rig.submit(name, BLOCKS)
        wait_until(lambda: host.matched(name, 0) is not None, "the lookup is answered")
        if host.matched(name, 0) != BLOCKS * BLOCK:
            host.finish(name)
            return False
        places = [10, 11, 12, 13, 14, 15]
        step = self.compute([32], value, zeroes=places)
        host.allocated(name, 0, [[places[2 * index : 2 * index + 2]] for index in range(BLOCKS)], step)
        self.compute([33], value)
        landed = self.rig.landed(name)
        if not landed.invalid:
            assert all((layer[places] == value).all() for layer in self.layers)
        self.compute([10, 11, 12, 13, 14, 15], 98)  # continues, or computes what did not come
        host.acknowledged(name)
        host.finish(name)
        return not landed.invalid


@contextmanager
def vllm_on_device(monkeypatch: pytest.MonkeyPatch, broken: tuple[Broken, ...] = ()) -> Iterator[Vllm]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with fake_cuda(broken) as clock, links_pass_clocks(clock, monkeypatch):
        staging: list[int] = []

        def clocked(settings: Settings) -> Pool:
            return ClockedPool(open_pool_of(settings), clock, lambda address: Locked.staging + address - staging[0])

        register = ClockedPool.register

        def registers(pool: ClockedPool, buffer: memoryview) -> None:
            staging.append(address_of(buffer))
            register(pool, buffer)

        monkeypatch.setattr(host_module, "open_pool_of", clocked)
        monkeypatch.setattr(ClockedPool, "register", registers)
        with registered("cpu", lambda device: Locked(clock, device)):
            rig = Rig(Settings(memory=(1 << 20,), staging_bytes=8 << 12, lookup_timeout_s=10.0))
        for number, layer in enumerate(rig.caches[0][0]):
            clock.watch(layer.data_ptr(), layer.numel(), f"cache {number}")
        assert len(rig.caches[0][0]) == LAYERS and rig.caches[0][0][0].shape[1] == ROW_BYTES
        try:
            yield Vllm(rig, clock)
        finally:
            rig.close()
    torch.set_num_threads(threads)


def test_a_worker_leaves_nothing_unordered(monkeypatch: pytest.MonkeyPatch) -> None:
    with vllm_on_device(monkeypatch) as vllm:
        vllm.save("first", 7)
        for round_ in range(3):
            assert vllm.load(f"loaded {round_}", 7), "every block came"
        clock = vllm.clock
        assert clock.conflicts == []
        copies = clock.operations["batched copy"]
        assert BLOCKS + 3 <= copies <= 4 * BLOCKS, "one for each message, whatever is in it"
        assert clock.waits["event.synchronize"] <= copies + vllm.step, "one for each copy and for each step"
        assert not clock.waits["stream.synchronize"] and not clock.waits["device synchronize"]
        waiting = {thread for thread, _ in clock.waits_by_thread}
        assert waiting <= {"penstock-upload", "penstock-save"}, (
            "neither vLLM's thread nor a link's waits for the device"
        )


@pytest.mark.parametrize("direction", ["save", "load"])
def test_copies_that_fail_half_way_leave_nothing_unordered(direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM uses its blocks again at once, and Penstock the slots."""
    with vllm_on_device(monkeypatch) as vllm:
        if direction == "load":
            vllm.save("first", 7)
        vllm.clock.refuses_copies = True
        if direction == "load":
            assert not vllm.load("fails", 7)
        else:
            vllm.save("first", 7)
        vllm.clock.refuses_copies = False
        if direction == "save":
            vllm.save("first again", 7)
        assert vllm.load("loaded", 7)
        assert vllm.clock.conflicts == []


def _skip(name: str) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda monkeypatch: monkeypatch.setattr(Steps, name, lambda self, step, timeout_s: None)


MUTANTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], tuple[Broken, ...]]] = {
    "a save skips its step": (_skip("wait"), ()),
    "a load skips the zeros of its step": (_skip("wait_begun"), ()),
    "a copy is not waited for": (lambda monkeypatch: None, ("event.synchronize",)),
    "a copy ends early": (lambda monkeypatch: None, ("end of copies",)),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_worker_that_leaves_out_a_wait_is_found(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change, broken = MUTANTS[mutant]
    with vllm_on_device(monkeypatch, broken) as vllm:
        change(monkeypatch)
        vllm.save("first", 7)
        vllm.load("loaded", 7)
        assert vllm.clock.conflicts, mutant
