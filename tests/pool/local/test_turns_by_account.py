"""Reads and writes of a member take turns by account: a flood by one, under any number of names, holds nobody up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from penstock.core.pool.fair_queue import FairQueue
from penstock.core.pool.policy import PoolPolicy
from penstock.io.memory import aligned_buffer
from penstock.io.open import open_engine
from penstock.pool.api import Done, PoolError
from penstock.pool.local.local_pool import LocalPool
from penstock.pool.members.device import open_device_member
from tests.pool.faulty_engine import FaultyEngine
from tests.pool.helpers import Outcome, key_of, new_block, staged, until, write

PAGE = 4096
SLAB = 4 << 20
STORES_MAX = 256


class Rig:
    """A pool with one device that can be held, and the order in which things end."""

    def __init__(self, folder: Path) -> None:
        self.engine = FaultyEngine(open_engine(folder / "a.slab", SLAB, 8))
        member = open_device_member("ssd:0", "a.slab", self.engine, folder / "a.db")
        self.pool = LocalPool([member], [1.0], PoolPolicy(default_quota_bytes=SLAB // 5))
        self.order: list[str] = []

    def write(self, tenant: str, key: bytes) -> Outcome:
        end = Outcome()
        self.pool.write(new_block(key, tenant=tenant), staged(key, PAGE), 60.0, self._noted(tenant, end))
        return end

    def read(self, tenant: str, key: bytes) -> Outcome:
        end = Outcome()
        self.pool.read(key, PAGE, aligned_buffer(PAGE), 60.0, self._noted(tenant, end))
        return end

    def _noted(self, tenant: str, end: Outcome) -> Done:
        def done(error: PoolError | None) -> None:
            self.order.append(tenant if error is None else error.reason)
            end(error)

        return done


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path)
    with ExitStack() as undo:
        undo.callback(rig.pool.close, 10.0)
        undo.callback(rig.engine.hold.clear)
        yield rig


def test_a_flood_of_writes_does_not_keep_out_those_of_another(rig: Rig) -> None:
    rig.engine.hold.set()
    flood = [rig.write("flood", key_of(("flood", i))) for i in range(STORES_MAX + 40)]
    until(lambda: rig.pool.stat(1.0).members[0].queued_stores >= STORES_MAX)
    few = [rig.write("few", key_of(("few", i))) for i in range(20)]
    rig.engine.hold.clear()
    assert [end.reason(60.0) for end in few] == ["ok"] * 20
    reasons = [end.reason(60.0) for end in flood]
    assert set(reasons) == {"ok", "dropped"} and reasons.count("ok") >= STORES_MAX - 40
    stored = [name for name in rig.order if name != "dropped"]
    assert "few" not in stored[80:], "twenty writes wait for about twenty of the other, not for all"
    rig.pool.check_integrity()


def test_reads_under_many_invented_names_are_one_turn(rig: Rig) -> None:
    honest = [key_of(("honest", i)) for i in range(10)]
    for key in honest:
        assert write(rig.pool, key, tenant="honest") == "ok"
    for i in range(2):  # they take the places that are left, and are turns of their own
        assert write(rig.pool, key_of(("first", i)), tenant=f"first {i}") == "ok"
    for i in range(20):
        assert write(rig.pool, key_of(("evil", i)), tenant=f"evil {i}") == "ok"
    evil = [key_of(("evil", 2 + i)) for i in range(18)]
    rig.engine.hold.set()
    flood = [rig.read("evil", key) for _ in range(10) for key in evil]
    few = [rig.read("honest", key) for key in honest]
    rig.engine.hold.clear()
    assert [end.reason(60.0) for end in (*flood, *few)] == ["ok"] * 190
    assert "honest" not in rig.order[40:]


def test_reads_go_before_a_flood_of_writes(rig: Rig) -> None:
    assert write(rig.pool, key_of("kept"), tenant="honest") == "ok"
    rig.engine.hold.set()
    flood = [rig.write("flood", key_of(("flood", i))) for i in range(STORES_MAX)]
    until(lambda: rig.pool.stat(1.0).members[0].queued_stores >= STORES_MAX - 8)
    end = rig.read("honest", key_of("kept"))
    rig.engine.hold.clear()
    assert end.reason(60.0) == "ok" and [one.reason(60.0) for one in flood] == ["ok"] * STORES_MAX
    assert rig.order.index("honest") <= 16


def test_the_one_with_most_in_a_full_queue_gives_its_last_item() -> None:
    queue: FairQueue[str] = FairQueue()
    for i in range(3):
        queue.put(f"a{i}", b"a", 1)
    queue.put("b0", b"b", 1)
    assert queue.displace(b"a") is None and queue.displace(b"b") == "a2" and queue.displace(b"b") is None
    assert queue.displace(b"c") == "a1" and queue.displace(b"c") is None
    queue.check_integrity()
    assert sorted(queue.drain()) == ["a0", "b0"]
