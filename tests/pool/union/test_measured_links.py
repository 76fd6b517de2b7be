"""Nodes whose links were measured while a host was busy: they get their share all the same, a little later."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from penstock.pool.api import PoolStat
from penstock.pool.local.local_pool import LocalPool
from penstock.pool.members.memory import MemoryMember
from penstock.pool.union import children as union_children
from penstock.pool.union.union_pool import UnionPool
from tests.pool.helpers import chain, until, write
from tests.pool.union.memory_nodes import MemoryNode

MIB = 1 << 20


class MeasuredNode(MemoryNode):
    """Measurements of its link find what the test says."""

    def __init__(self, place: str, moves: float) -> None:
        super().__init__(place)
        self.moves = moves
        self.measured = self.looks = 0

    def measure_bytes_per_s(self, budget_s: float) -> float:
        self.measured += 1
        return self.moves

    def begin_stat(self, timeout_s: float) -> Callable[[], PoolStat]:
        self.looks += 1
        return super().begin_stat(timeout_s)

    def measured_within(self, looks: int) -> int:
        """How often it is measured while the union looks so often."""
        measured, until_looks = self.measured, self.looks + looks
        until(lambda: self.looks >= until_looks)
        return self.measured - measured


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(union_children, "LOOK_EVERY_S", 0.01)
    monkeypatch.setattr("penstock.core.bandwidth.AGAIN_S", 0.0)
    monkeypatch.setattr("penstock.core.bandwidth.AGAIN_MAX", 1000)


@pytest.fixture
def local() -> Iterator[LocalPool]:
    pool = LocalPool([MemoryMember("memory:0", MIB)], [1e9])
    yield pool
    pool.close(5.0)


def blocks_on(node: MeasuredNode, union: UnionPool, name: str) -> int:
    """How many of 100 new blocks it gets."""
    before = len(node.held)
    for at, (key, parent) in enumerate(chain(name, 100)):
        assert write(union, key, parent, position=at) == "ok"
    return len(node.held) - before


def test_a_node_that_was_measured_on_a_busy_host_gets_its_share_once_it_is_idle(local: LocalPool) -> None:
    node = MeasuredNode("a:1", 1e5)
    union = UnionPool(local, [node])
    try:
        assert blocks_on(node, union, "a") == 0, "a ten-thousandth of the local pool"
        node.moves = 1e9
        until(lambda: union.weights["a:1"] == 0.5)
        assert blocks_on(node, union, "b") == 50
        assert node.measured_within(50) == 0, "its link is not what limits it"
    finally:
        union.close(5.0)


def test_a_slower_measurement_takes_no_share_away(local: LocalPool) -> None:
    node = MeasuredNode("a:1", 0.5e9)
    union = UnionPool(local, [node])
    try:
        node.moves, measured = 1e3, node.measured
        until(lambda: node.measured >= measured + 4)
        assert union.weights["a:1"] == pytest.approx(1 / 3)
    finally:
        union.close(5.0)


def test_a_node_that_is_read_is_not_measured_and_has_the_share_that_its_reads_show(local: LocalPool) -> None:
    node = MeasuredNode("a:1", 0.25e9)
    union = UnionPool(local, [node])
    try:
        children = union._children  # noqa: SLF001 (reads that last as long as the test)
        meter, now_s = children.all[1].meter, time.monotonic()
        meter.started(now_s)
        node.measured_within(2)
        assert node.measured_within(50) == 0
        assert union.weights["a:1"] == pytest.approx(0.2)
        with children.lock:
            meter.started(now_s)
            meter.ended(2, int(0.5e9), now_s + 1.0)
        until(lambda: union.weights["a:1"] == pytest.approx(1 / 3))
        assert node.measured_within(50) > 0
    finally:
        union.close(5.0)
