"""What one client of a relay may open and be lent has bounds, and ends with its connection: the others are served."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from penstock.cluster.handoff import incoming as incoming_module
from penstock.cluster.handoff import lending as lending_module
from penstock.cluster.handoff.buffer import DecodeBuffer
from penstock.cluster.handoff.incoming import Incoming
from penstock.cluster.handoff.relay import RelayNode
from penstock.core.keys import BlockKey
from penstock.pool.api import PoolError
from penstock.pool.checksum import block_checksum
from penstock.pool.losses import losses
from penstock.pool.net import wire
from penstock.pool.net.connection import Connection, Pending
from penstock.pool.net.link_watch import link_watch
from penstock.pool.net.shared_memory import SharedMemoryMover
from penstock.pool.setup.open import open_local_pool
from tests.asking import WAIT_S, wait_until
from tests.flooded import BLOCK_BYTES

BLOCKS = 64


def key_of(number: int) -> BlockKey:
    return number.to_bytes(16, "little")


class Relay:
    """A relay whose buffer holds all blocks of one hand-off, which has ended: it may give each of them up."""

    def __init__(self) -> None:
        self.storage = open_local_pool([1 << 20], [])
        mover = SharedMemoryMover()
        self.buffer = DecodeBuffer(BLOCK_BYTES, BLOCKS, self.storage, mover.allocate)
        self.incoming = Incoming(SimpleNamespace(), self.buffer, self.storage, 600.0, 2.0)
        self.node = RelayNode(self.buffer, self.incoming, "127.0.0.1", 0, mover=mover)
        self.buffer.reserve("before", [key_of(number) for number in range(BLOCKS)], lambda: None)
        for number in range(BLOCKS):
            into = self.buffer.begin_write(key_of(number))
            assert isinstance(into, memoryview)
            self.buffer.end_write(key_of(number), (block_checksum(key_of(number), into[:BLOCK_BYTES]), b""))
        self.buffer.release("before")
        self.clients: list[Client] = []

    def client(self) -> Client:
        self.clients.append(Client(self.node))
        return self.clients[-1]

    @property
    def early(self) -> int:
        return len(self.incoming._early)  # noqa: SLF001 (nothing may be left behind)

    def close(self) -> None:
        for client in self.clients:
            client.close()
        self.node.close(WAIT_S)
        self.incoming.close(WAIT_S)
        self.buffer.check_integrity()
        self.storage.close(WAIT_S)


class Client:
    """One connection of a prefill engine."""

    def __init__(self, node: RelayNode) -> None:
        watch = link_watch.acquire()
        self._undo = contextlib.ExitStack()
        self._undo.callback(link_watch.release, watch)
        self._connection = Connection(
            node.address, WAIT_S, lambda _: None, lambda *_: None, wire.Hello("control"), watch, urgent=True
        )
        self._connection.start()
        self._ids = iter(range(1, 1 << 30))

    def begin(self, kind: Any, *fields: Any, id: int | None = None) -> tuple[threading.Event, list[Any]]:
        """Send a request; what is told when the answer is there, and that answer or its error."""
        answered, answers = threading.Event(), list[Any]()

        def end(reply: Any, error: PoolError | None) -> None:
            answers.append(reply if error is None else error)
            answered.set()

        number = id if id is not None else next(self._ids)
        pending = Pending(kind(number, *fields), number, float("inf"), end)
        assert self._connection.add(pending)
        self._connection.send(pending)
        return answered, answers

    def ask(self, kind: Any, *fields: Any, id: int | None = None) -> Any:
        answered, answers = self.begin(kind, *fields, id=id)
        assert answered.wait(WAIT_S)
        return answers[0]

    def lend(self, number: int, timeout_s: float = 600.0, id: int | None = None) -> Any:
        return self.ask(wire.Lend, key_of(number), BLOCK_BYTES, timeout_s, id=id)

    def close(self) -> None:
        self._connection.cut("closed")
        self._connection.join(WAIT_S)
        self._undo.close()


@pytest.fixture
def relay() -> Iterator[Relay]:
    made = Relay()
    yield made
    made.close()


def room(relay: Relay) -> None:
    """The whole buffer can be had by a new hand-off."""
    wait_until(lambda: relay.buffer.free_blocks == BLOCKS, "every block to be given back")


def test_openings_end_with_their_connection(relay: Relay) -> None:
    """They held a place for the hour that they asked for."""
    client = relay.client()
    for number in range(300):
        client.begin(wire.Open, f"never {number}", False, 3600.0)
    wait_until(lambda: relay.early == 300, "the openings")
    client.close()
    wait_until(lambda: relay.early == 0, "the openings to be withdrawn")
    deadlines = relay.incoming._deadlines  # noqa: SLF001 (nothing may be left behind)
    wait_until(lambda: len(deadlines) < 200, "most of their deadlines to go")


def test_one_address_opens_its_share_and_others_theirs(relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(incoming_module, "EARLY_OF_SOURCE_MAX", 5)
    client = relay.client()
    for number in range(5):
        client.begin(wire.Open, f"never {number}", False, 600.0)
    wait_until(lambda: relay.early == 5, "the openings")
    refused = client.ask(wire.Open, "one more", False, 600.0)
    assert isinstance(refused, PoolError) and refused.reason == "dropped"
    assert "5 hand-offs were opened from this address before the router named them" in refused.detail
    replies: list[Any] = []
    withdraw = relay.incoming.opening("another address", False, 600.0, replies.append, "10.0.0.2")
    assert relay.early == 6 and not replies
    withdraw()
    withdraw()
    assert relay.early == 5 and not replies
    client.close()
    wait_until(lambda: relay.early == 0, "the openings to be withdrawn")
    late = relay.client().ask(wire.Open, "in time", False, 0.05)
    assert late.reason == "deadline"


def test_one_connection_is_lent_half_of_the_buffer(relay: Relay) -> None:
    client = relay.client()
    lent = [client.lend(number) for number in range(BLOCKS)]
    assert [isinstance(one, wire.Lent) for one in lent] == [True] * (BLOCKS // 2) + [False] * (BLOCKS // 2)
    assert lent[-1].reason == "dropped" and "32 blocks are lent to this connection already" in lent[-1].detail
    second = relay.client()
    more = [second.lend(number) for number in range(BLOCKS)]
    assert sum(isinstance(one, wire.Lent) for one in more) == BLOCKS // 4
    assert "48 blocks are lent to this address already" in more[-1].detail
    for one in (client, second):
        one.close()
    room(relay)


def test_a_lent_block_that_is_not_returned_is_taken_back(relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stayed until somebody else was lent one, for as long as the client had said."""
    monkeypatch.setattr(lending_module, "LEND_S_MAX", 0.2)
    before = losses().get("lent_blocks_taken_back", 0)
    client = relay.client()
    assert all(isinstance(client.lend(number), wire.Lent) for number in range(10))
    room(relay)
    assert losses()["lent_blocks_taken_back"] == before + 10


def test_a_number_that_is_used_twice_holds_no_block_for_ever(relay: Relay) -> None:
    client = relay.client()
    for number in range(20):
        assert isinstance(client.lend(number, id=7), wire.Lent)
    client.close()
    room(relay)


def test_many_attached_memories_displace_none_of_another_address(relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lending_module, "CLIENTS_MAX", 4)
    lending = relay.node.lending
    assert lending is not None
    mover = SharedMemoryMover()
    memory = mover.allocate(1 << 16)
    described = mover.export(memory)
    lending.attach(b"honest", mover.kind, described, "10.0.0.2")
    for number in range(20):
        lending.attach(b"%d" % number, mover.kind, described, "10.0.0.3")
    ended = threading.Event()
    found: list[PoolError | None] = []

    def end(error: PoolError | None) -> None:
        found.append(error)
        ended.set()

    checksum = block_checksum(key_of(1), memory[:BLOCK_BYTES])
    offer = wire.Offer(1, b"honest", key_of(1), BLOCK_BYTES, checksum, 0, WAIT_S)
    lending.take(offer, memoryview(bytearray(BLOCK_BYTES)), float("inf"), end)
    assert ended.wait(WAIT_S) and found == [None]
    mover.close()
