"""Random histories of grants, writes (also of those that may not write any more), commits and lost clients, against a
model: what the node says is stored is there as it was sent, and nobody is granted space that another one has."""

from __future__ import annotations

import os
import queue
import random
from dataclasses import dataclass, field

import pytest

from penstock.core.layout import staging_bytes
from penstock.io.memory import address_of, aligned_buffer
from penstock.pool.checksum import block_checksum
from penstock.pool.net import wire
from penstock.pool.net.pool_grants import QUARANTINE_S, PoolGrants
from penstock.pool.setup.open import open_local_pool
from tests.pool.helpers import WAIT_S, block_bytes, key_of, new_block, read

HISTORIES = int(os.environ.get("PENSTOCK_LEND_HISTORIES", "1000"))
STEPS = 16
SIZE, SPACE = 4096, 8 * 4096


class Client:
    """Takes answers; its identity is what grants belong to."""

    def __init__(self) -> None:
        self.answers: queue.SimpleQueue[wire.Reply] = queue.SimpleQueue()

    def answer(self, reply: wire.Reply) -> None:
        self.answers.put(reply)


@dataclass(eq=False)
class Granted:
    """A grant as its client knows it; `sent`: the bytes that it has written there."""

    client: Client
    lease: int
    offset: int
    keys: list[bytes]
    until_s: float
    blocked_until_s: float  # nobody else is granted the space before
    ended: bool = False
    sent: dict[int, bytes] = field(default_factory=dict)


class History:
    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.now_s = 100.0
        self.memory = aligned_buffer(SPACE)
        self.grants = PoolGrants(self.memory, lambda address, size: (1, 0, address - self.base), lambda: self.now_s)
        self.base = address_of(self.memory)
        self.pool = open_local_pool([64 * SIZE], [])
        self.clients = [Client(), Client(), Client()]
        self.known: list[Granted] = []
        self.stored = set[bytes]()
        self.next = 0

    def grant(self) -> None:
        client, blocks = self.random.choice(self.clients), self.random.randint(1, 3)
        timeout_s = self.random.choice([1.0, 20.0])
        reply = self.grants.grant(client, wire.Grant(1, blocks, self.random.choice([SIZE, SIZE - 96]), timeout_s))
        if not reply.lease:
            return
        for one in self.known:
            if not one.ended and one.blocked_until_s > self.now_s:
                apart = reply.offset + blocks * SIZE <= one.offset or one.offset + len(one.keys) * SIZE <= reply.offset
                assert apart, "space was granted that another one may use"
        keys = [key_of(("history", self.next + number)) for number in range(blocks)]
        self.next += blocks
        until_s = self.now_s + timeout_s
        self.known.append(Granted(client, reply.lease, reply.offset, keys, until_s, until_s + QUARANTINE_S))

    def fill(self) -> None:
        """Write to any space that was ever granted, also by whom it was taken from."""
        if self.known:
            one = self.random.choice(self.known)
            for number in range(len(one.keys)):
                if self.random.random() < 0.8:
                    at = one.offset + number * SIZE
                    self.memory[at : at + SIZE] = block_bytes(one.keys[number], SIZE)

    def commit(self) -> None:
        if not self.known:
            return
        one = self.random.choice(self.known)
        client = one.client if self.random.random() < 0.9 else self.random.choice(self.clients)
        lies = [self.memory[one.offset + at * SIZE : one.offset + (at + 1) * SIZE] for at in range(len(one.keys))]
        whole = [bytes(view) == block_bytes(key, SIZE) for view, key in zip(lies, one.keys, strict=True)]
        sums = [block_checksum(key, memoryview(block_bytes(key, SIZE))) for key in one.keys]
        span = wire.WriteMany.of(0, [new_block(key) for key in one.keys], sums)
        self.grants.commit(client, self.pool, wire.Commit(1, one.lease, span, 5.0))
        reply = client.answers.get(timeout=WAIT_S)
        may = client is one.client and not one.ended and one.until_s > self.now_s
        if not may:
            assert isinstance(reply, wire.Failed) and reply.reason == "dropped"
            return
        one.ended = True
        assert isinstance(reply, wire.WrittenMany)
        errors = wire.errors_of(reply.states, reply.detail)
        assert [error is None for error in errors] == whole
        assert all(error is None or error.reason == "checksum" for error in errors)
        self.stored.update(key for key, fine in zip(one.keys, whole, strict=True) if fine)

    def give_back(self) -> None:
        if self.known:
            one = self.random.choice(self.known)
            self.grants.returned(self.random.choice([one.client, *self.clients]), [one.lease])
            one.ended = one.ended or one.lease not in self.grants._slots  # noqa: SLF001 (what the node goes by)

    def leave(self) -> None:
        at = self.random.randrange(len(self.clients))
        gone, self.clients[at] = self.clients[at], Client()
        self.grants.gone(gone)
        for one in self.known:
            if one.client is gone and one.until_s > self.now_s:
                one.until_s, one.blocked_until_s = self.now_s, self.now_s + QUARANTINE_S

    def wait(self) -> None:
        self.now_s += self.random.choice([0.5, 2.0, 25.0, QUARANTINE_S])

    def run(self) -> None:
        steps = [self.grant] * 4 + [self.fill] * 4 + [self.commit] * 4 + [self.give_back, self.leave, self.wait]
        for step in self.random.choices(steps, k=STEPS):
            step()
            self.grants.check_integrity()
        self.memory[:] = b"\xee" * SPACE  # what lies in space that was granted is no part of any block
        assert [read(self.pool, key) for key in self.stored] == ["ok"] * len(self.stored)
        self.now_s += 1000.0
        assert self.grants.free_bytes == SPACE
        self.grants.close(5.0)
        self.pool.check_integrity()
        self.pool.close(5.0)


@pytest.mark.slow
def test_random_histories() -> None:
    assert staging_bytes(SIZE - 96) == SIZE
    for seed in range(HISTORIES):
        try:
            History(seed).run()
        except BaseException as error:
            error.add_note(f"history {seed}")
            raise
