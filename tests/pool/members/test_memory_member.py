"""Memory members: bound to a node, paced to a bandwidth, and what they tell of themselves."""

from __future__ import annotations

import time

import pytest

from penstock.io.memory import aligned_buffer
from penstock.io.numa import numa_nodes
from penstock.pool.local.local_pool import LocalPool
from penstock.pool.members.memory import MemoryMember
from tests.pool.helpers import Outcome, key_of, new_block, read, staged, write

MIB = 1 << 20


def test_a_member_on_a_node_serves_and_one_on_no_node_is_refused() -> None:
    pool = LocalPool([MemoryMember("memory:0", MIB, numa_node=numa_nodes()[0])], [1.0])
    assert write(pool, key_of(1)) == read(pool, key_of(1)) == "ok"
    pool.close(5.0)
    with pytest.raises(ValueError, match=r"memory member memory:0: numa_node is \d+; allowed: 0"):
        MemoryMember("memory:0", MIB, numa_node=max(numa_nodes()) + 1)


def test_paced_memory_takes_its_time_and_is_not_read_in_place() -> None:
    member = MemoryMember("memory:0", 8 * MIB, pace_bytes_per_s=20.0 * MIB)
    pool = LocalPool([member], [1.0])
    assert write(pool, key_of(1), size_bytes=MIB) == "ok"
    assert pool.lease(key_of(1)) is None
    begin_s = time.monotonic()
    ends = [Outcome() for _ in range(8)]
    for end in ends:
        pool.read(key_of(1), MIB, aligned_buffer(MIB), 30.0, end)
    assert [end.reason() for end in ends] == ["ok"] * 8
    assert time.monotonic() - begin_s > 0.9 * 8 / 20
    moved, busy_s = member.observed()
    assert moved == 8 * MIB and busy_s > 0.9 * 8 / 20 and member.queued() == (0, 0)
    pool.close(5.0)


def test_close_does_not_wait_for_the_pace() -> None:
    pool = LocalPool([MemoryMember("memory:0", MIB, pace_bytes_per_s=1000.0)], [1.0])
    end = Outcome()
    pool.write(new_block(key_of(1), size_bytes=65536), staged(key_of(1), 65536), 300.0, end)
    begin_s = time.monotonic()
    pool.close(200.0)  # at its pace the block would take 65 s
    assert end.reason() in ("ok", "closed") and time.monotonic() - begin_s < 60.0


def test_measured_at_the_pace_and_without_it() -> None:
    paced, plain = MemoryMember("a", 8 * MIB, pace_bytes_per_s=50e6), MemoryMember("b", 8 * MIB)
    assert paced.measure("read", MIB, 0.2) < 75e6 < plain.measure("read", MIB, 0.1)
    assert plain.measure("write", 64 * MIB, 0.05) > 0  # a block larger than the member
