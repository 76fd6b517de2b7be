"""What tests of one-sided reads share: nodes whose memory is registered, and clients that read into registered memory.

On a host without an RDMA device NIXL reads through shared memory, which is one-sided too."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from typing import Any

import pytest

from penstock.core.keys import BlockKey
from penstock.core.layout import staging_bytes
from penstock.io.memory import aligned_buffer
from penstock.pool.api import Pool
from penstock.pool.net import one_sided_writes, ways
from penstock.pool.net.nixl_agent import NixlAgent
from penstock.pool.net.node import PoolNode
from penstock.pool.net.one_sided_agent import OneSidedAgent
from penstock.pool.net.remote import RemotePool
from penstock.pool.node_backend import NodeBackend
from tests.pool import helpers
from tests.pool.helpers import Outcome, block_bytes
from tests.waiting import wait_until

MIB = 1 << 20
NIXL = pytest.mark.skipif(importlib.util.find_spec("nixl_cu12") is None, reason="the nixl extra is not installed")
WAYS = ["messages", pytest.param("one-sided", marks=NIXL)]


class Arena:
    """Memory that is registered once, handed out in turns: for reads of one test, which are few at a time."""

    def __init__(self, size_bytes: int = 16 * MIB) -> None:
        self.memory = aligned_buffer(size_bytes)
        self._next = 0

    def take(self, size_bytes: int) -> memoryview:
        """Zeroed, like `aligned_buffer`."""
        length = staging_bytes(size_bytes)
        if self._next + length > len(self.memory):
            self._next = 0
        found = self.memory[self._next : self._next + length]
        self._next += length
        found[:] = bytes(length)
        return found[:size_bytes]


def attach(client: RemotePool, memory: memoryview) -> None:
    """Have blocks read one-sided into this memory from now on."""
    client.register(memory)
    wait_until(lambda: not client.one_sided.startswith("off"), "the node's memory is attached")


def use_registered_memory(monkeypatch: pytest.MonkeyPatch, *modules: Any) -> Arena:
    """Tests of these modules read into registered memory, and write from it, from now on, also the smallest blocks."""
    monkeypatch.setattr(one_sided_writes, "SPAN_BYTES_MIN", 0)
    arena = Arena(64 * MIB)
    for module in (helpers, *modules):
        if hasattr(module, "aligned_buffer"):
            monkeypatch.setattr(module, "aligned_buffer", arena.take)
    return arena


BOTH_WAYS = pytest.mark.usefixtures("way")


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Runs a test of the pool over the network in both ways, by `usefixtures("way")`. One-sided: nodes of this process
    that have no pace lend blocks, and every client of theirs has attached before it is used. A test that then reads
    blocks of nodes, and none of them one-sided, fails."""
    if request.param == "messages":
        yield "messages"
        return
    arena = use_registered_memory(monkeypatch, request.module)
    start, connect = PoolNode.__init__, RemotePool.__init__

    @wraps(start)
    def with_agent(self: PoolNode, *given: Any, **options: Any) -> None:
        paced = options.get("pace_bytes_per_s") is not None
        start(self, *given, **({} if paced else {"one_sided": NixlAgent()}) | options)

    @wraps(connect)
    def attached(self: RemotePool, *given: Any, **options: Any) -> None:
        connect(self, *given, **options)
        if self.up and self._link.node.one_sided:
            attach(self, arena.memory)
        else:
            self.register(arena.memory)

    monkeypatch.setattr(PoolNode, "__init__", with_agent)
    monkeypatch.setattr(RemotePool, "__init__", attached)
    with counted() as read:
        yield "one-sided"
    assert read["one-sided"] or not read["messages"], "nothing was read one-sided"


class OneSidedRig:
    """Nodes and clients, closed in reverse order."""

    def __init__(self, undo: contextlib.ExitStack) -> None:
        self.undo = undo
        self.arena = Arena()

    def node(self, pool: NodeBackend, port: int = 0, agent: OneSidedAgent | None = None, **options: object) -> PoolNode:
        options.setdefault("staging_capacity_bytes", 16 * MIB)
        made: PoolNode = PoolNode(pool, "127.0.0.1", port, one_sided=agent or NixlAgent(), **options)  # type: ignore[arg-type]
        self.undo.callback(made.close, 5.0)
        return made

    def client(self, node: PoolNode, **options: object) -> RemotePool:
        made = RemotePool(*node.address, **options)  # type: ignore[arg-type]
        self.undo.callback(made.close, 5.0)
        attach(made, self.arena.memory)
        return made

    def read(self, pool: Pool, keys: Sequence[BlockKey], size_bytes: int = 4096, timeout_s: float = 10.0) -> list[str]:
        """Read blocks at the same time; "ok" only for the right bytes."""
        outcomes, places = [Outcome() for _ in keys], [self.arena.take(staging_bytes(size_bytes)) for _ in keys]
        for key, outcome, into in zip(keys, outcomes, places, strict=True):
            pool.read(key, size_bytes, into, timeout_s, outcome)
        reasons = [outcome.reason() for outcome in outcomes]
        for key, reason, into in zip(keys, reasons, places, strict=True):
            assert reason != "ok" or bytes(into[:size_bytes]) == block_bytes(key, size_bytes), "wrong bytes were served"
        return reasons


@contextlib.contextmanager
def counted(count: Callable[[], dict[str, int]] = ways.read_bytes) -> Iterator[dict[str, int]]:
    """Bytes that are read in the context from pool nodes (or what else `count` says), by way; known at its end.
    "device" is there only where bytes came that way."""
    before, found = count(), dict[str, int]()
    yield found
    found.update({way: bytes_now - before.get(way, 0) for way, bytes_now in count().items()})
    if not found.get(ways.DEVICE, 1):
        del found[ways.DEVICE]


def counted_writes() -> contextlib.AbstractContextManager[dict[str, int]]:
    """As `counted`, for bytes that are written to pool nodes."""
    return counted(ways.written_bytes)
