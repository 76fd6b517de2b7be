"""How many messages ask for blocks that are read one-sided: those that wait while others are on their way share one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from penstock.io.memory import aligned_buffer
from penstock.pool.api import PoolError
from penstock.pool.net import one_sided_reads, wire
from penstock.pool.net.one_sided_reads import BlockRead, OneSidedReads
from tests.pool.helpers import key_of, until
from tests.pool.net.node_rig import WAIT_S

SIZE = 4096
DEADLINE_S = 1e12


class Link:
    """Keeps the messages, and what their answers call."""

    def __init__(self) -> None:
        self.node, self.place = SimpleNamespace(one_sided="nixl"), "a node"
        self.asked: list[tuple[wire.LendMany, Callable[[Any, PoolError | None], None]]] = []

    def next_id(self) -> int:
        return len(self.asked)

    def begin(self, message: wire.LendMany, timeout_s: float, ended: Any, part: Any) -> None:
        self.asked.append((message, ended))

    def answer(self, number: int) -> None:
        message, ended = self.asked[number]
        lent = [wire.LentBlock(index, 1 + index) for index in range(len(message.sizes))]
        ended(wire.LentMany(message.id, 0, lent), None)

    @property
    def blocks(self) -> list[int]:
        return [len(message.sizes) for message, _ in self.asked]


class Memory:
    """Keeps the transfers."""

    def __init__(self) -> None:
        self.attached = SimpleNamespace(memory=SimpleNamespace(epoch=0), address=lambda region, offset, size: offset)
        self.under_way: list[Callable[[PoolError | None], None]] = []
        self.failures = self.verified = 0
        self.twin = None

    def watch(self, watcher: object) -> None:
        pass

    def look_soon(self) -> None:
        pass

    def succeeded(self) -> None:
        self.verified += 1

    def ready(self, parts: Sequence[tuple[memoryview, int]]) -> bool:
        return True

    def run(self, task: Callable[[], None]) -> bool:
        task()
        return True

    def take_returns(self) -> list[int]:
        return []

    def give_back(self, leases: Sequence[int]) -> None:
        pass

    def failed(self, error: PoolError, detach: bool) -> None:
        self.failures += 1

    def begin(self, operation: str, attached: object, spans: Sequence[object], ended: Any, local: object) -> None:
        self.under_way.append(ended)


class Rig:
    def __init__(self) -> None:
        self.link, self.memory = Link(), Memory()
        self.in_messages: list[BlockRead] = []
        self.reads = OneSidedReads(self.link, self.memory, self.in_messages.append)  # type: ignore[arg-type]

    def arrive(self, number: int) -> None:
        """A transfer ends, and its blocks are verified."""
        self.memory.under_way[number](None)
        until(lambda: self.memory.verified > number, WAIT_S)

    def read(self, name: str) -> None:
        block = BlockRead(key_of(name), SIZE, aligned_buffer(SIZE), DEADLINE_S, lambda *_: None, lambda *_: None)
        assert self.reads.read([block])


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.reads.close(WAIT_S)


def test_blocks_wait_until_no_more_are_on_their_way_and_share_a_message(rig: Rig) -> None:
    for number in range(16):
        rig.read(str(number))
        if number + 1 in (1, 2, 4, 8, 16):
            rig.link.answer(len(rig.link.asked) - 1)
    assert rig.link.blocks == [1, 1, 2, 4, 8], "alone, a block does not wait"
    rig.read("one more")
    for number in range(4):
        rig.arrive(number)
    assert rig.link.blocks[5:] == [], "8 are on their way"
    rig.arrive(4)
    assert rig.link.blocks[5:] == [1]


def test_a_steady_reader_has_half_of_its_blocks_lent_by_each_message(rig: Rig) -> None:
    window, answered = 8, 0
    for number in range(window):
        rig.read(str(number))
    for number in range(16):
        while answered < len(rig.link.asked):
            rig.link.answer(answered)
            answered += 1
        rig.arrive(number)
        for one in range(rig.link.blocks[number]):
            rig.read(f"{number} {one}")
    assert rig.link.blocks[-4:] == [window // 2] * 4


def test_blocks_wait_while_enough_are_on_their_way(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_sided_reads, "AHEAD_BYTES_MAX", 2 * SIZE)
    for number in range(4):
        rig.read(f"first {number}")
        if number in (0, 1, 3):
            rig.link.answer(len(rig.link.asked) - 1)
    assert rig.link.blocks == [1, 1, 2]
    for number in range(8):
        rig.read(f"then {number}")
    assert rig.link.blocks == [1, 1, 2], "16 KiB are on their way"
    rig.arrive(0)
    assert rig.link.blocks == [1, 1, 2], "12 KiB"
    rig.arrive(1)
    assert rig.link.blocks == [1, 1, 2, 8], "one message for all that waited"


@pytest.mark.parametrize("fault", ["transfer", "lend"])
def test_blocks_that_fail_hold_up_no_others(rig: Rig, fault: str) -> None:
    for number in range(3):
        rig.read(str(number))
        if number < 2:
            rig.link.answer(number) if fault == "transfer" else rig.link.asked[number][1](None, PoolError("full", ""))
    for ended in rig.memory.under_way[:]:
        ended(PoolError("network", "as planned"))
    assert rig.link.blocks == [1, 1, 1], "the third was asked for"
    assert len(rig.in_messages) == 2 and rig.memory.failures == 2


def test_blocks_are_verified_where_the_system_starts_no_thread_for_that(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_starts(*given: Any, **options: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(one_sided_reads, "GuardedWorker", none_starts)
    rig.read("a block")
    rig.link.answer(0)
    rig.memory.under_way[0](None)
    assert rig.memory.verified == 1
