"""Random histories of lend, read, evict, overwrite and restart, with NIXL's own reads, against a model.

The model knows which block lies where, and which leases run. What must hold: bytes that pass their check are the
block's; bytes of a block that is still leased do pass; a leased block is not evicted; everything ends."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator

import pytest

from penstock.io.memory import address_of, aligned_buffer
from penstock.pool.api import PoolError
from penstock.pool.local.local_pool import LocalPool
from penstock.pool.mac import check_of
from penstock.pool.net import wire
from penstock.pool.net.nixl_agent import NixlAgent
from penstock.pool.net.pool_lending import NodeMemory, PoolLending, decode_node_memory
from penstock.pool.setup.open import open_local_pool
from tests.pool.helpers import Outcome, block_bytes, key_of, new_block, staged
from tests.pool.net.one_sided_rig import NIXL

pytestmark = NIXL
HISTORIES = int(os.environ.get("PENSTOCK_LEND_HISTORIES", "1000"))
STEPS = 12
SIZE = 4096
BLOCKS = 6  # of the pool; keys are more
KEYS = [key_of(("history", number)) for number in range(9)]


class Client:
    """Takes answers; its identity is what leases belong to."""

    def __init__(self) -> None:
        self.answers: list[wire.LentMany] = []

    def answer(self, reply: wire.LentMany) -> None:
        self.answers.append(reply)

    answer_now = answer


class Node:
    """One start of a node: a pool and its lent memory."""

    def __init__(self, agent: NixlAgent, reader: NixlAgent) -> None:
        self.reader = reader
        self.pool: LocalPool = open_local_pool([BLOCKS * SIZE], [])
        self.lending = PoolLending(self.pool, agent, SIZE)
        self.memory: NodeMemory = decode_node_memory(self.lending.attach(Client(), b""))
        self.peer = reader.add_peer(self.memory.metadata)
        self.present: set[bytes] = set()
        self.leased: dict[int, tuple[Client, bytes]] = {}

    def pinned(self) -> set[bytes]:
        return {key for _, key in self.leased.values()}

    def end(self) -> None:
        self.lending.check_integrity()
        self.lending.close(5.0)
        assert self.pool.evict(KEYS) == len(self.present), "a block stayed pinned"
        self.pool.check_integrity()
        self.pool.close(5.0)
        self.reader.remove_peer(self.peer)


@pytest.fixture(scope="module")
def agents() -> Iterator[tuple[NixlAgent, NixlAgent, memoryview]]:
    reader, into = NixlAgent(), aligned_buffer(SIZE)
    made = reader.register(into)
    yield NixlAgent(), reader, into
    reader.deregister(made)


class History:
    def __init__(self, agents: tuple[NixlAgent, NixlAgent, memoryview], seed: int) -> None:
        self.agent, self.reader, self.into = agents
        self.random = random.Random(seed)
        self.node = Node(self.agent, self.reader)
        self.clients = [Client(), Client()]
        self.known: list[tuple[Node, bytes, wire.LentBlock]] = []  # what was ever lent by this start of the node

    def write(self) -> None:
        key = self.random.choice(KEYS)
        outcome = Outcome()
        self.node.pool.write(new_block(key), staged(key, SIZE), 5.0, outcome)
        reason = outcome.reason()
        assert reason == "ok" or (reason == "full" and len(self.node.pinned()) > 0), reason
        found = self.node.pool.lookup(KEYS, 1.0)
        self.node.present = {key for key, hit in zip(KEYS, found, strict=True) if hit is not None}
        assert self.node.pinned() <= self.node.present, "a leased block was evicted"

    def lend(self) -> None:
        client, keys = self.random.choice(self.clients), self.random.sample(KEYS, self.random.randint(1, 3))
        client.answers.clear()
        self.node.lending.lend(
            client, self.node.pool, wire.LendMany(1, b"".join(keys), [SIZE] * len(keys), 5.0), lambda keys, read: []
        )
        (answer,) = client.answers
        for block in answer.blocks:
            key = keys[block.index]
            if block.lease:
                assert key in self.node.present
                self.node.leased[block.lease] = client, key
                self.known.append((self.node, key, block))
            else:
                assert block.reason == ("dropped" if key in self.node.present else "missing")

    def read(self) -> None:
        """Read anything that was ever lent, also when its lease has ended."""
        if not self.known:
            return
        node, key, block = self.random.choice(self.known)
        region = node.memory.regions[block.region]
        self.into[:] = b"\xee" * SIZE
        reading = self.reader.begin("READ", node.peer, [(address_of(self.into), region.address + block.offset, SIZE)])
        while not reading.ended():
            time.sleep(0)
        error = check_of(None, key)(self.into, block.checksum, block.mac)
        if error is None:
            assert bytes(self.into) == block_bytes(key, SIZE), "other bytes passed the check"
        else:
            assert isinstance(error, PoolError) and error.reason == "checksum"
            assert block.lease not in node.leased, "the bytes of a leased block did not pass"

    def give_back(self) -> None:
        client = self.random.choice(self.clients)
        some = self.random.sample(list(self.node.leased), min(3, len(self.node.leased)))
        self.node.lending.returned(client, some)
        for lease in some:
            if self.node.leased[lease][0] is client:
                del self.node.leased[lease]

    def leave(self) -> None:
        client = self.random.choice(self.clients)
        self.node.lending.gone(client)
        self.node.leased = {lease: one for lease, one in self.node.leased.items() if one[0] is not client}

    def evict(self) -> None:
        keys = self.random.sample(KEYS, 3)
        free = {key for key in keys if key in self.node.present} - self.node.pinned()
        assert self.node.pool.evict(keys) == len(free)
        self.node.present -= free

    def restart(self) -> None:
        self.node.end()
        self.node, self.known = Node(self.agent, self.reader), []

    def run(self) -> None:
        steps = [self.write] * 4 + [self.lend] * 4 + [self.read] * 5 + [self.give_back] * 2 + [self.evict] * 2
        for step in self.random.choices([*steps, self.leave, self.restart], k=STEPS):
            step()
            self.node.lending.check_integrity()
        self.node.end()


@pytest.mark.slow
def test_random_histories(agents: tuple[NixlAgent, NixlAgent, memoryview]) -> None:
    for seed in range(HISTORIES):
        try:
            History(agents, seed).run()
        except BaseException as error:
            error.add_note(f"history {seed}")
            raise
