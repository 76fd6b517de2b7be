"""Blocks larger than a node's staging memory: stored and served where it may grow, else one clear line at connect."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.pool.block_size import expect_blocks
from penstock.pool.net import node as node_module
from penstock.pool.net import wire
from penstock.pool.net.connect import add_node, open_union
from penstock.pool.net.node import PoolNode
from penstock.pool.net.remote import RemotePool
from penstock.pool.net.staging import Staging
from penstock.pool.setup.open import open_local_pool
from penstock.pool.union.union_pool import UnionPool
from penstock.pool.wrapped import WrappedPool
from tests.pool.helpers import key_of, read, until, write
from tests.pool.net.node_rig import MIB, WAIT_S, NodeRig
from tests.pool.net.one_sided_rig import BOTH_WAYS


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[NodeRig]:
    made = NodeRig(tmp_path)
    with made.undo:
        yield made


@pytest.fixture
def little_staging(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_module, "STAGING_BYTES", MIB)


def lines(caplog: pytest.LogCaptureFixture, text: str) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and text in r.getMessage()]


@pytest.mark.parametrize("members", [{"memory": 16 * MIB}, {"memory": 0, "slab": 16 * MIB}])
def test_a_block_larger_than_staging_is_stored_and_served(
    way: str,
    rig: NodeRig,
    little_staging: None,
    members: dict[str, int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    node = rig.node(rig.pool(**members))
    client = rig.client(node)
    assert client.block_bytes_max >= 15 * MIB and client.expect_blocks(3 * MIB) == []
    for number in range(3):
        assert write(client, key_of(number), size_bytes=3 * MIB) == "ok"
        assert read(client, key_of(number), size_bytes=3 * MIB) == "ok"
    grown = way == "messages"  # one-sided, blocks pass through other memory
    assert node.staging.capacity_bytes == (7 if grown else 1) * MIB, "it grew once"
    until(lambda: node.staging.free_bytes == node.staging.capacity_bytes)
    assert len(lines(caplog, "staging memory grew to 7 MiB for blocks of 3 MiB")) == int(grown)


@BOTH_WAYS
def test_a_block_of_another_node_larger_than_staging_is_passed_on(rig: NodeRig, little_staging: None) -> None:
    behind = rig.node(rig.pool(16 * MIB))
    union = open_union(None, [f"127.0.0.1:{behind.address[1]}"], for_node=True)
    rig.undo.callback(union.close, 5.0)
    client = rig.client(rig.node(union))
    assert write(client, key_of("a"), size_bytes=3 * MIB) == "ok"
    assert [hit is not None for hit in client.lookup([key_of("a")], 5.0)] == [True]
    assert read(client, key_of("a"), size_bytes=3 * MIB) == "ok"


def test_where_staging_is_given_a_larger_block_is_one_line_and_refused_unsent(
    rig: NodeRig, caplog: pytest.LogCaptureFixture
) -> None:
    client = rig.client(rig.node(rig.pool(16 * MIB), staging_capacity_bytes=MIB))
    assert client.block_bytes_max == MIB
    (line,) = client.expect_blocks(2 * MIB)
    assert line.startswith(f"pool node {client.place} takes blocks of at most 1 MiB, this engine's have 2 MiB")
    assert "allowed: fewer tokens per block, or more --staging" in line
    assert len(lines(caplog, line)) == 1
    assert [write(client, key_of(i), size_bytes=2 * MIB) for i in range(4)] == ["full"] * 4
    assert len(lines(caplog, "this node takes at most 1048576")) == 1
    assert client.expect_blocks(MIB) == [] and write(client, key_of("a"), size_bytes=MIB) == "ok"


def test_a_node_that_comes_later_is_compared_then(rig: NodeRig, caplog: pytest.LogCaptureFixture) -> None:
    pool = rig.pool(16 * MIB)
    first = PoolNode(pool, "127.0.0.1", 0)
    client = rig.client(first)
    assert client.expect_blocks(2 * MIB) == [] and not lines(caplog, "takes blocks of at most")
    first.close(5.0)
    second = PoolNode(pool, *first.address, staging_capacity_bytes=MIB)
    rig.undo.callback(second.close, 5.0)
    until(lambda: client.up, WAIT_S)
    assert len(lines(caplog, f"pool node {client.place} takes blocks of at most 1 MiB")) == 1


def test_members_smaller_than_a_block_are_said(rig: NodeRig, caplog: pytest.LogCaptureFixture) -> None:
    pool = open_local_pool([MIB, 8 * MIB], [], weights=[1.0, 1.0])
    rig.undo.callback(pool.close, 5.0)
    assert pool.block_bytes_max == 8 * MIB
    (line,) = expect_blocks(WrappedPool(pool), 2 * MIB)
    assert line.startswith("member memory:0 has room for 1 MiB, a block takes 2 MiB: none is stored there")
    assert lines(caplog, line) == [line]
    client = rig.client(rig.node(pool))
    assert client.expect_blocks(2 * MIB) == []
    (line,) = client.expect_blocks(9 * MIB)
    assert "takes blocks of at most 8 MiB" in line
    (line,) = client.expect_blocks(wire.PAYLOAD_BYTES_MAX + 1)
    assert "do not travel to pool node" in line and "allowed: at most 1 GiB" in line


def test_a_union_asks_all_its_children_and_those_that_come(rig: NodeRig, caplog: pytest.LogCaptureFixture) -> None:
    small, large = rig.node(staging_capacity_bytes=MIB), rig.node(staging_capacity_bytes=8 * MIB)
    nodes = [RemotePool(*node.address) for node in (small, large)]
    union = UnionPool(open_local_pool([MIB], [], weights=[1e9]), nodes, [1e9, 1e9, 1e9])
    rig.undo.callback(union.close, 5.0)
    assert union.block_bytes_max == 8 * MIB
    said = union.expect_blocks(2 * MIB)
    assert ["memory:0" in line for line in said] == [True, False] and nodes[0].place in said[1]
    assert write(union, key_of("a"), size_bytes=2 * MIB) == "ok", "by the one that takes it"
    third = rig.node(staging_capacity_bytes=MIB)
    add_node(union, f"127.0.0.1:{third.address[1]}", 1e9)
    assert lines(caplog, f"pool node 127.0.0.1:{third.address[1]} takes blocks of at most 1 MiB")


def test_staging_grows_within_its_limit_and_for_others_too() -> None:
    staging = Staging(4096, 4096 * 9)
    assert staging.largest_bytes(False) == 4 * 4096
    assert staging.take(5 * 4096, 0.0) is None and staging.capacity_bytes == 4096
    slot = staging.take(4 * 4096, 0.0, shared=True)
    assert slot is not None and len(slot.view) == 4 * 4096 and staging.capacity_bytes == 9 * 4096
    slot.give()
    slot.give()
    assert staging.free_bytes == staging.capacity_bytes, "given back once"
    assert staging.largest_bytes(False) == 8 * 4096 and staging.largest_bytes(True) == 4 * 4096
