"""Requests leave nothing to the garbage collector: where it must free each of them, it runs often, and its runs last
longer the more objects an engine has."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FunctionType

import pytest

from penstock.core.keys import BlockKey
from penstock.pool.api import PoolError
from penstock.pool.net.remote import RemotePool
from tests.pool.helpers import key_of, new_block, read, staged, write
from tests.pool.net.node_rig import WAIT_S, NodeRig
from tests.pool.net.one_sided_rig import BOTH_WAYS, way

__all__ = ["way"]  # a fixture

WARM, REQUESTS = 8, 64
SIZE = 4096


def many(begin: Callable[[Callable[[list[PoolError | None]], None]], None]) -> None:
    ended = threading.Event()
    begin(lambda errors: ended.set())
    assert ended.wait(WAIT_S)


def one_read(client: RemotePool, number: int) -> None:
    assert read(client, key_of(0), SIZE) == "ok"


def span_read(client: RemotePool, number: int) -> None:
    keys: list[BlockKey] = [key_of(0), key_of(1)]
    intos = [staged(key, SIZE) for key in keys]
    many(lambda done: client.read_many(keys, SIZE, intos, WAIT_S, done))


def one_write(client: RemotePool, number: int) -> None:
    assert write(client, key_of(f"new {number}"), size_bytes=SIZE) == "ok"


def span_write(client: RemotePool, number: int) -> None:
    blocks = [new_block(key_of(f"new {number} {one}"), size_bytes=SIZE) for one in range(2)]
    datas = [staged(block.key, SIZE) for block in blocks]
    many(lambda done: client.write_many(blocks, datas, WAIT_S, done))


def lookup(client: RemotePool, number: int) -> None:
    assert client.lookup([key_of(0)], WAIT_S)


def kind_of(one: object) -> str:
    """The module and name of a function, or of an object's class."""
    named = one if isinstance(one, FunctionType) else type(one)
    return f"{named.__module__}.{named.__qualname__}"


@BOTH_WAYS
@pytest.mark.parametrize("request_", [one_read, span_read, one_write, span_write, lookup])
def test_requests_leave_nothing_to_the_garbage_collector(
    tmp_path: Path, request_: Callable[[RemotePool, int], None]
) -> None:
    rig = NodeRig(tmp_path)
    with rig.undo, contextlib.ExitStack() as undo:
        client = rig.client(rig.node(rig.pool()))
        assert [write(client, key_of(number), size_bytes=SIZE) for number in range(2)] == ["ok"] * 2
        for number in range(WARM):
            request_(client, number)
        gc.collect()
        for end in (gc.garbage.clear, partial(gc.set_debug, 0), gc.enable):
            undo.callback(end)
        gc.disable()
        gc.set_debug(gc.DEBUG_SAVEALL)  # what is freed is listed: threads of other tests leave things too
        for number in range(WARM, WARM + REQUESTS):
            request_(client, number)
        gc.collect()
        found = Counter(name for one in gc.garbage if (name := kind_of(one)).startswith("penstock.pool."))
        assert found.total() < REQUESTS, f"objects of {REQUESTS} requests hold each other: {found}"
