"""A node counts the reads of all its clients together, and says with its answers which blocks are hot."""

from __future__ import annotations

import itertools
import queue
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from penstock.core.keys import BlockKey
from penstock.core.pool.policy import PoolPolicy
from penstock.io.memory import aligned_buffer
from penstock.pool.api import PoolError
from penstock.pool.local.local_pool import LocalPool
from penstock.pool.net.remote import RemotePool
from tests.pool.helpers import key_of, read, until, write
from tests.pool.net.node_rig import MIB, NodeRig
from tests.pool.net.one_sided_rig import BOTH_WAYS

pytestmark = BOTH_WAYS
KEYS = [key_of(at) for at in range(8)]


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[NodeRig]:
    made = NodeRig(tmp_path)
    with made.undo:
        yield made


class Clients:
    """Three clients of one node, whose blocks lie in memory or on an SSD."""

    def __init__(self, rig: NodeRig, pool: LocalPool, share: float) -> None:
        pool.set_policy(PoolPolicy(copies_share=share))
        node = rig.node(pool)
        self.all = [rig.client(node) for _ in range(3)]
        self.hot: list[list[BlockKey]] = [[] for _ in self.all]
        for client, hot in zip(self.all, self.hot, strict=True):
            client.watch_hot(hot.extend)
        assert [write(self.all[0], key) for key in KEYS] == ["ok"] * len(KEYS)


def read_span(client: RemotePool, keys: Sequence[BlockKey]) -> list[PoolError | None]:
    ended: queue.SimpleQueue[list[PoolError | None]] = queue.SimpleQueue()
    client.read_many(keys, 4096, [aligned_buffer(4096) for _ in keys], 10.0, ended.put)
    return ended.get(timeout=20.0)


@pytest.mark.parametrize("slab", [False, True], ids=["memory", "ssd"])
def test_a_block_that_three_clients_read_once_each_is_hot(rig: NodeRig, slab: bool) -> None:
    clients = Clients(rig, rig.pool(memory=0, slab=16 * MIB) if slab else rig.pool(), 0.1)
    for client, (single, *span) in zip(clients.all, itertools.repeat(KEYS[:5])):
        assert read(client, single) == "ok"
        assert read_span(client, [*span, key_of("absent")])[:-1] == [None] * 4
    until(lambda: sorted(clients.hot[-1]) == sorted(KEYS[:5]))
    assert clients.hot[:-1] == [[], []]


def test_a_node_that_takes_no_copies_counts_nothing(rig: NodeRig) -> None:
    clients = Clients(rig, rig.pool(), 0.0)
    for client in clients.all * 3:
        assert read(client, KEYS[0]) == "ok" and read_span(client, KEYS) == [None] * len(KEYS)
    assert clients.hot == [[], [], []]


def test_a_callback_that_raises_costs_no_read(rig: NodeRig) -> None:
    clients = Clients(rig, rig.pool(), 0.1)

    def fail(keys: Sequence[BlockKey]) -> None:
        raise ValueError(len(keys))

    for client in clients.all:
        client.watch_hot(fail)
    for client in clients.all * 3:
        assert read(client, KEYS[0]) == "ok" and read_span(client, KEYS) == [None] * len(KEYS)
