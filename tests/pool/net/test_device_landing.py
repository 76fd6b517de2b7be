"""Reads of a pool node that land in a device's memory: which blocks do, how they are verified, and what happens to
those that cannot. The device is the CPU: its memory is registered apart from the staging memory, as a GPU's is."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from penstock.core.keys import BlockKey
from penstock.device.accelerator import Cpu
from penstock.engine.device_staging import DeviceStaging
from penstock.io.device_memory import DeviceMemory
from penstock.io.memory import aligned_buffer
from penstock.pool.api import PoolError
from penstock.pool.mac import check_of
from penstock.pool.net import memory_attachment, nixl_agent
from penstock.pool.net.nixl_agent import NixlAgent, NixlTransfer
from penstock.pool.net.node import PoolNode
from penstock.pool.net.one_sided_agent import Access, Operation, Span
from penstock.pool.net.remote import RemotePool
from penstock.pool.setup.open import open_local_pool
from tests.pool.helpers import Outcome, block_bytes, key_of, write
from tests.pool.net.one_sided_rig import MIB, NIXL, OneSidedRig, counted
from tests.waiting import wait_until

pytestmark = NIXL
SIZE = SLOT = 4096
SLOTS = 8
KEYS = [key_of(("landing", i)) for i in range(SLOTS)]


class Agent(NixlAgent):
    """The client's agent, with faults of the way to the device."""

    registers: Callable[[], None] = staticmethod(lambda: None)
    begins: Callable[[], None] = staticmethod(lambda: None)
    arrived: Callable[[Sequence[Span]], None] = staticmethod(lambda spans: None)

    def register(self, memory: memoryview | DeviceMemory, access: Access = "read") -> Any:
        if isinstance(memory, DeviceMemory):
            Agent.registers()
        return super().register(memory, access)

    def begin(
        self, operation: Operation, peer: Any, spans: Sequence[Span], local: DeviceMemory | None = None
    ) -> NixlTransfer:
        if local is not None:
            Agent.begins()
        found = super().begin(operation, peer, spans, local)
        if local is not None:
            ended = found.ended

            def spoiled() -> bool:
                done = ended()
                if done:
                    Agent.arrived(spans)
                return done

            return _Ended(spoiled)  # type: ignore[return-value]
        return found


class _Ended:
    def __init__(self, ended: Callable[[], bool]) -> None:
        self.ended = ended


class Rig:
    """A client of one node, with staging memory of a few slots and their twin."""

    def __init__(self, undo: contextlib.ExitStack, wanted: str) -> None:
        self.pool = open_local_pool([8 * MIB], [])
        undo.callback(lambda: (self.pool.check_integrity(), self.pool.close(5.0)))
        self.node = OneSidedRig(undo).node(self.pool)
        self.host = aligned_buffer(SLOTS * SLOT)
        self.twin = DeviceStaging(Cpu(torch.device("cpu")), self.host, SLOT, SIZE)
        self.client = RemotePool(*self.node.address)
        undo.callback(self.client.close, 5.0)
        self.client.register(self.host, self.twin)
        wait_until(lambda: wanted in self.client.one_sided, f"{wanted!r}")
        for key in KEYS:
            assert write(self.client, key, size_bytes=SIZE) == "ok"

    def slot(self, number: int) -> memoryview:
        return self.host[number * SLOT : (number + 1) * SLOT]

    def read(self, keys: Sequence[BlockKey] = KEYS, **more: Any) -> list[str]:
        """Each block into the slot of its number."""
        outcomes = [Outcome() for _ in keys]
        for number, (key, outcome) in enumerate(zip(keys, outcomes, strict=True)):
            self.twin.clear(number)
            self.client.read(key, SIZE, self.slot(number), 10.0, outcome, **more)
        return [outcome.reason() for outcome in outcomes]

    def check(self, on_device: Sequence[bool], keys: Sequence[BlockKey] = KEYS) -> None:
        """Each block is where it should be, and the right one."""
        for number, (key, lands) in enumerate(zip(keys, on_device, strict=True)):
            block = self.twin.block_in(number)
            assert (block is not None) == lands, number
            got = bytes(self.slot(number)) if block is None else ctypes.string_at(block.address, block.nbytes)
            assert got == block_bytes(key, SIZE)


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Rig]]:
    monkeypatch.setattr(memory_attachment, "open_agent", lambda kind: Agent())
    for fault in ("registers", "begins", "arrived"):
        monkeypatch.setattr(Agent, fault, staticmethod(lambda *given: None))
    with contextlib.ExitStack() as undo:
        yield lambda wanted=", into device memory": Rig(undo, wanted)


def refuse() -> None:
    raise PoolError("device", "injected")


def spoil(spans: Sequence[Span]) -> None:
    """A byte of each block, on the device."""
    for here, _, size_bytes in spans:
        ctypes.memset(here + size_bytes // 2, 0xA5, 1)
        ctypes.memset(here + size_bytes // 2 + 1, 0x5A, 1)


def test_blocks_land_on_the_device_and_not_in_the_hosts_memory(start: Callable[..., Rig]) -> None:
    rig = start()
    rig.host[:] = bytes(len(rig.host))
    with counted() as read:
        assert rig.read() == ["ok"] * SLOTS
    assert read == {"messages": 0, "one-sided": 0, "device": SLOTS * SIZE}
    rig.check([True] * SLOTS)
    assert not any(rig.host), "nothing passed through the host's memory"
    lending = rig.node.pool_lending
    assert lending is not None
    wait_until(lambda: lending.leased_bytes == 0, "the leases are returned")


def test_a_span_lands_where_it_can(start: Callable[..., Rig]) -> None:
    """One slot was given up, one place is no slot, one block is not there."""
    rig = start()
    rig.twin.retire(1)
    elsewhere = aligned_buffer(SIZE)
    rig.client.register(elsewhere)
    places = [rig.slot(0), rig.slot(1), elsewhere, rig.slot(3)]
    ended: list[list[PoolError | None]] = []
    wait_until(lambda: rig.client._memory.ready([(elsewhere, SIZE)]), "registered")  # noqa: SLF001
    with counted() as read:
        rig.client.read_many([*KEYS[:3], key_of("?")], SIZE, places, 10.0, ended.append)
        wait_until(lambda: bool(ended), "the span's end")
    assert [error and error.reason for error in ended[0]] == [None, None, None, "missing"]
    assert read == {"messages": 0, "one-sided": 2 * SIZE, "device": SIZE}
    rig.check([True, False], KEYS[:2])
    assert bytes(elsewhere) == block_bytes(KEYS[2], SIZE) and rig.twin.block_in(3) is None


def test_a_block_that_has_a_check_of_its_own_goes_to_the_host(start: Callable[..., Rig]) -> None:
    rig = start()
    with counted() as read:
        assert rig.read(KEYS[:1], check=check_of(None, KEYS[0])) == ["ok"]
    assert read["one-sided"] == SIZE and "device" not in read
    rig.check([False], KEYS[:1])


def test_a_block_that_is_damaged_on_the_device_comes_again_and_three_turn_that_way_off(
    start: Callable[..., Rig],
) -> None:
    rig = start()
    Agent.arrived = staticmethod(spoil)
    with counted() as read:
        assert rig.read(KEYS[:1]) == ["ok"]
    rig.check([False], KEYS[:1])
    assert read == {"messages": SIZE, "one-sided": 0}
    assert ", into device memory" in rig.client.one_sided, "one alone is the block's"
    assert rig.read() == ["ok"] * SLOTS
    rig.check([False] * SLOTS)
    wait_until(lambda: "not into device memory: checksum" in rig.client.one_sided, "why not")
    with counted() as read:
        assert rig.read() == ["ok"] * SLOTS
    rig.check([False] * SLOTS)
    assert read["one-sided"] == SLOTS * SIZE, "through the host's memory"


def test_a_device_that_cannot_verify_costs_no_block(start: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch) -> None:
    rig = start()

    def lost(*given: object) -> list[int]:
        raise RuntimeError("the device is lost (injected)")

    monkeypatch.setattr(Cpu, "checksums", lost)
    assert rig.read() == ["ok"] * SLOTS
    rig.check([False] * SLOTS)
    monkeypatch.undo()


@pytest.mark.parametrize("fault", ["registers", "begins"])
def test_a_card_that_does_not_reach_the_device_reads_into_the_host(start: Callable[..., Rig], fault: str) -> None:
    setattr(Agent, fault, staticmethod(refuse))
    rig = start("not into device memory: device: injected")
    with counted() as read:
        assert rig.read() == ["ok"] * SLOTS
    assert read == {"messages": 0, "one-sided": SLOTS * SIZE}
    rig.check([False] * SLOTS)


def test_a_transfer_to_the_device_that_fails_is_made_again(start: Callable[..., Rig]) -> None:
    """And the node is attached anew, with a probe of that way."""
    rig = start()
    left = [1]

    def once() -> None:
        if left and left.pop():
            refuse()

    Agent.begins = staticmethod(once)
    assert rig.read(KEYS[:1]) == ["ok"]
    rig.check([False], KEYS[:1])
    wait_until(lambda: rig.read(KEYS[:1]) == ["ok"] and ", into device memory" in rig.client.one_sided, "attached anew")
    assert rig.read() == ["ok"] * SLOTS
    rig.check([True] * SLOTS)


def test_a_node_that_starts_again_is_read_into_the_device_again(start: Callable[..., Rig]) -> None:
    rig = start()
    assert rig.read() == ["ok"] * SLOTS
    port = rig.node.address[1]
    rig.node.close(5.0)
    assert rig.read(KEYS[:1]) == ["network"] and rig.twin.block_in(0) is None
    with contextlib.ExitStack() as undo:
        OneSidedRig(undo).node(rig.pool, port)
        wait_until(
            lambda: rig.read(KEYS[:1]) == ["ok"] and ", into device memory" in rig.client.one_sided, "attached anew"
        )
        assert rig.read() == ["ok"] * SLOTS
        rig.check([True] * SLOTS)
        rig.client.close(5.0)


def test_a_slot_that_was_given_up_takes_nothing_that_lands_late(start: Callable[..., Rig]) -> None:
    rig = start()
    held: list[Sequence[Span]] = []

    def late(spans: Sequence[Span]) -> None:
        if not held:
            held.append(spans)
            rig.twin.retire(0)

    Agent.arrived = staticmethod(late)
    assert rig.read(KEYS[:1]) == ["ok"]
    assert rig.twin.block_in(0) is None, "the slot is another block's by now"
    assert rig.twin.place(rig.slot(0), SIZE) is None and rig.twin.place(rig.slot(1), SIZE) is not None


def test_only_whole_blocks_at_the_begin_of_a_slot_have_a_place(start: Callable[..., Rig]) -> None:
    rig = start()
    assert rig.twin.place(rig.host[SLOT // 2 :], SIZE) is None
    assert rig.twin.place(rig.slot(0), SIZE - 1) is None
    assert rig.twin.place(aligned_buffer(SLOT), SIZE) is None
    memory = rig.twin.memory
    assert rig.twin.place(rig.slot(7), SIZE) == memory.address + 7 * SLOT
    assert rig.twin.scratch + 4096 == memory.address + memory.size_bytes
    assert isinstance(rig.node, PoolNode)


def test_memory_is_given_back_once_no_card_is_registered_with_it(
    start: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    freed: list[DeviceMemory] = []
    monkeypatch.setattr(Cpu, "free_landing", lambda self, memory: freed.append(memory))
    rig = start()
    assert rig.read() == ["ok"] * SLOTS
    rig.twin.close()
    assert not freed and rig.twin.place(rig.slot(0), SIZE) is None
    assert rig.read() == ["ok"] * SLOTS, "into the host's memory"
    rig.check([False] * SLOTS)
    rig.client.close(5.0)
    assert freed == [rig.twin.memory]


def test_nixl_hears_which_gpu_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be carried out here: memory of a GPU on this side, of the host on the other."""
    asked: list[tuple[object, ...]] = []

    class Binding:
        def register_memory(self, parts: object, kind: str) -> str:
            asked.append(("register", parts, kind))
            if kind == "VRAM" and len(asked) > 3:
                raise RuntimeError("no backend for it")
            return "registered"

        def get_xfer_descs(self, parts: object, kind: str) -> tuple[object, str]:
            return parts, kind

        def initialize_xfer(self, *given: object) -> str:
            asked.append(given)
            return "handle"

        def transfer(self, handle: str) -> str:
            return "DONE"

        def release_xfer_handle(self, handle: str) -> None: ...

    monkeypatch.setattr(nixl_agent, "_agent", lambda *given: Binding())
    agent, memory = NixlAgent(), DeviceMemory(0x7F00_0000_0000, 1 << 20, "VRAM", 3)
    assert agent.register(memory, "local") == "registered"
    assert agent.begin("READ", "node", [(memory.address + 4096, 0x5000, 8192)], memory).ended()
    assert asked == [
        ("register", [(0x7F00_0000_0000, 1 << 20, 3, "")], "VRAM"),
        ("READ", ([(0x7F00_0000_1000, 8192, 3)], "VRAM"), ([(0x5000, 8192, 0)], "DRAM"), "node", b""),
    ]
    agent.register(aligned_buffer(4096))
    assert asked[2][2] == "DRAM"
    with pytest.raises(PoolError, match="NIXL cannot register 1048576 bytes of the GPU: no backend for it"):
        agent.register(memory)
