"""Blocks that the agent moves for its vLLM's connector, out of and into memory that both map, and what is refused."""

from __future__ import annotations

import mmap
import os
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from penstock.cluster.agent_wire import AgentSocket, Moved, ReadBlock, SendBlock, Staging
from penstock.cluster.handoff.relay_links import RelayLinks
from penstock.cluster.vllm_agent.block_mover import BlockMover
from penstock.core.new_block import NewBlock
from penstock.framing import ProtocolError
from penstock.io.sealed_memory import create_sealed
from penstock.pool.setup.open import open_local_pool
from penstock.vllm.agent_peers import AgentPeers
from tests.vllm.handoff_rig import DecodeHost
from tests.waiting import wait_until

SIZE, SLOTS = 8192, 4
KEY, OTHER = b"k" * 16, b"o" * 16
WAIT_S = 20.0


class Both:
    """A connector's peers, and the agent's mover that gets their orders, with one memory; a decode host with room."""

    def __init__(self) -> None:
        self.host = DecodeHost(SIZE, open_local_pool((1 << 20,), ()), blocks=8)
        self.host.reserve("h", [KEY, OTHER])
        self.links = RelayLinks()
        self.mover = BlockMover(self.links)
        self.descriptor = create_sealed("staging", SIZE * SLOTS)
        self.memory = memoryview(mmap.mmap(self.descriptor, SIZE * SLOTS))
        self.mover.use(Staging(SIZE * SLOTS), os.dup(self.descriptor))
        self.peers = AgentPeers(self.memory, self._order)
        self.answers = True
        self.ended: list[Any] = []

    def _order(self, message: ReadBlock | SendBlock) -> bool:
        answer = self.peers.moved if self.answers else _ignore
        if isinstance(message, ReadBlock):
            self.mover.read(message, answer)
        else:
            self.mover.send(message, answer)
        return True

    def slot(self, number: int) -> memoryview:
        return self.memory[number * SIZE : (number + 1) * SIZE]

    def wait(self) -> Any:
        wait_until(lambda: bool(self.ended), "an order has ended", WAIT_S)
        return self.ended.pop(0)

    def close(self) -> None:
        self.mover.close(5.0)
        self.links.close(5.0)
        self.host.close()
        os.close(self.descriptor)


def _ignore(message: Moved) -> None:
    """An answer that is lost."""


@pytest.fixture
def both() -> Iterator[Both]:
    made = Both()
    yield made
    made.close()


def test_a_block_goes_to_the_relay_and_back(both: Both) -> None:
    both.slot(1)[:] = b"x" * SIZE
    both.peers.hand_over(both.host.address, NewBlock(KEY, OTHER, SIZE), both.slot(1), WAIT_S, both.ended.append)
    assert both.wait() is None and both.host.buffer.has([KEY]) == [True]
    both.peers.read(both.host.address, KEY, SIZE, both.slot(3), WAIT_S, both.ended.append)
    assert both.wait() is None
    assert both.slot(3) == b"x" * SIZE and both.slot(2) == bytes(SIZE)


def test_memory_that_is_not_staging_is_not_touched(both: Both) -> None:
    elsewhere = memoryview(bytearray(SIZE))
    both.peers.read(both.host.address, KEY, SIZE, elsewhere, WAIT_S, both.ended.append)
    assert both.wait().reason == "device"
    moved: list[Moved] = []
    both.mover.send(
        SendBlock(1, both.host.address, KEY, OTHER, SIZE, 0, b"", 0.0, SIZE * SLOTS - 1, WAIT_S, 1e12), moved.append
    )
    assert [one.reason for one in moved] == ["device"]


def test_what_the_relay_refuses_and_a_relay_that_is_gone_are_answered(both: Both) -> None:
    both.peers.hand_over(both.host.address, NewBlock(b"n" * 16, OTHER, SIZE), both.slot(0), WAIT_S, both.ended.append)
    assert both.wait().reason == "missing"
    both.peers.read("127.0.0.1:1", KEY, SIZE, both.slot(0), WAIT_S, both.ended.append)
    assert both.wait().reason == "network"


def test_a_block_whose_time_is_over_is_not_sent(both: Both) -> None:
    """Its slot may have another block by then."""
    moved: list[Moved] = []
    late = SendBlock(1, both.host.address, KEY, OTHER, SIZE, 0, b"", 0.0, 0, WAIT_S, time.monotonic() - 1.0)
    both.mover.send(late, moved.append)
    wait_until(lambda: bool(moved), "it is answered", WAIT_S)
    assert moved[0].reason == "deadline" and both.host.buffer.has([KEY]) == [False]


def test_an_order_without_an_answer_ends_behind_its_timeout(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.vllm.agent_peers.GRACE_S", 0.3)
    both.answers = False
    both.peers.hand_over(both.host.address, NewBlock(KEY, OTHER, SIZE), both.slot(0), 0.2, both.ended.append)
    both.peers.end_late()
    assert not both.ended, "the agent may still read the slot"

    def over() -> bool:
        both.peers.end_late()
        return bool(both.ended)

    wait_until(over, "it is given up", WAIT_S)
    assert both.wait().reason == "deadline"
    both.peers.moved(Moved(1))
    assert not both.ended, "an answer that comes later is nobody's"


def test_without_an_agent_an_order_ends_at_once(both: Both) -> None:
    peers = AgentPeers(both.memory, lambda message: False)
    peers.read(both.host.address, KEY, SIZE, both.slot(0), WAIT_S, both.ended.append)
    assert both.wait().reason == "network"


def test_only_memory_of_a_sealed_size_is_mapped(both: Both) -> None:
    with pytest.raises(ProtocolError, match="without its descriptor"):
        both.mover.use(Staging(SIZE), None)
    with pytest.raises(ProtocolError, match="cannot be mapped"):
        both.mover.use(Staging(SIZE), os.memfd_create("plain"))
    with pytest.raises(ProtocolError, match="cannot be mapped"):
        both.mover.use(Staging(SIZE), os.dup(both.descriptor))


def test_a_descriptor_comes_with_its_message_only_and_none_is_left_open() -> None:
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    ends: list[AgentSocket] = []
    thread = threading.Thread(target=lambda: ends.append(AgentSocket(other)))
    thread.start()
    sender = AgentSocket(one)
    thread.join(WAIT_S)
    (receiver,) = ends
    before = len(os.listdir("/proc/self/fd"))
    descriptor = create_sealed("staging", SIZE)
    for _ in range(3):
        sender.send(Staging(SIZE), descriptor)
        assert receiver.receive_from_connector() == Staging(SIZE)
    found = receiver.take_descriptor()
    assert found is not None and os.fstat(found).st_size == SIZE and receiver.take_descriptor() is None
    os.close(found)
    order = ReadBlock(7, "h:1", KEY, SIZE, 0, 1.0)
    sender.send(order)
    assert receiver.receive_from_connector() == order and receiver.take_descriptor() is None
    sender.send(Staging(SIZE), descriptor)
    receiver.receive_from_connector()
    sender.close()
    receiver.close()
    os.close(descriptor)
    assert len(os.listdir("/proc/self/fd")) == before - 2
