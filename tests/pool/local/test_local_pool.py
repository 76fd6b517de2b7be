"""The embedded pool with real memory and real slabs: round trips, eviction, restart, damage, faults."""

from __future__ import annotations

import errno
import itertools
import queue
import random
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penstock.io.api import BlockEngine, IoCompletion, IoOp
from penstock.io.memory import aligned_buffer
from penstock.io.open import open_engine
from penstock.pool.api import PoolError
from penstock.pool.local.local_pool import EVICTED_AT_ONCE, KEYS_AT_ONCE, LocalPool
from penstock.pool.members.device import DeviceMember, open_device_member
from penstock.pool.members.header import HEADER_BYTES
from penstock.pool.members.memory import MemoryMember
from penstock.pool.setup.open import open_local_pool
from tests.children import with_tests
from tests.pool.helpers import ROOT, Outcome, block_bytes, chain, key_of, member, new_block, read, staged, until, write
from tests.pool.stored_tables import alter, offsets

MIB = 1 << 20
Opener = Callable[..., LocalPool]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opener]:
    """Opens pools that are closed, and checked, at the end."""
    pools: list[LocalPool] = []

    def open_(memory: Sequence[int] = (), slab: int = 0, weights: Sequence[float] | None = (1.0,)) -> LocalPool:
        slabs = [(tmp_path / "kv.slab", slab)] if slab else []
        pools.append(open_local_pool(memory, slabs, weights=weights))
        return pools[-1]

    yield open_
    for pool in pools:
        pool.check_integrity()
        pool.close(5.0)


KINDS = pytest.mark.parametrize("kind", ["memory", "slab"])


def one_member(opened: Opener, kind: str, capacity: int) -> LocalPool:
    return opened([capacity]) if kind == "memory" else opened(slab=capacity + HEADER_BYTES)


@KINDS
def test_round_trip_of_odd_sizes(opened: Opener, kind: str) -> None:
    pool = one_member(opened, kind, 8 * MIB)
    for size in (1, 4095, 4096, 4097, 100_000, 2 * MIB):
        assert write(pool, key_of(size), size_bytes=size) == "ok"
        assert read(pool, key_of(size), size_bytes=size) == "ok"
    name = pool.members[0].name
    assert [hit.route if hit else None for hit in pool.lookup([key_of(1), key_of("?")], 1.0)] == [(name,), None]


@KINDS
def test_a_block_is_stored_once_and_misses_and_wrong_sizes_say_so(opened: Opener, kind: str) -> None:
    pool = one_member(opened, kind, MIB)
    assert [write(pool, key_of("a")), write(pool, key_of("a"))] == ["ok", "ok"]
    assert pool.stat(1.0).members[0].blocks == 1
    assert read(pool, key_of("b")) == "missing"
    assert read(pool, key_of("a"), size_bytes=8192) == "layout"
    assert write(pool, key_of("a"), size_bytes=8192) == "layout"
    assert pool.evict([key_of("a"), key_of("b")]) == 1
    assert read(pool, key_of("a")) == "missing"


@KINDS
def test_bad_buffers_and_keys_are_refused(opened: Opener, kind: str) -> None:
    pool = one_member(opened, kind, MIB)
    assert write(pool, key_of("a"), size_bytes=8192) == "ok"
    outcome = Outcome()
    pool.read(key_of("a"), 8192, aligned_buffer(4096), 5.0, outcome)
    assert outcome.reason() == "layout"
    for key, parent, size, length in (
        (b"short", ROOT, 4096, 4096),
        (key_of(1), key_of(1), 4096, 4096),
        (key_of(1), ROOT, 0, 4096),
        (key_of(1), ROOT, 8192, 4096),
    ):
        outcome = Outcome()
        pool.write(new_block(key, parent, size), aligned_buffer(length), 5.0, outcome)
        assert outcome.reason() == "layout"


@KINDS
def test_a_full_pool_evicts_leaves_of_the_least_recently_used_prefix(opened: Opener, kind: str) -> None:
    pool = one_member(opened, kind, 16 * 4096)
    old, used = chain("old", 8), chain("used", 8)
    for key, parent in (*old, *used):
        assert write(pool, key, parent) == "ok"
    pool.lookup([key for key, _ in old], 1.0)  # the other one is now the least recently used
    for position, (key, parent) in enumerate(chain("new", 4)):
        assert write(pool, key, parent, position=position) == "ok"
    hits = pool.lookup([key for key, _ in used], 1.0)
    assert [hit is not None for hit in hits] == [True] * 4 + [False] * 4
    assert all(pool.lookup([key for key, _ in old], 1.0))
    assert pool.stat(1.0).evictions == 4


def test_leased_blocks_stay_and_a_pool_of_them_is_full(opened: Opener) -> None:
    pool = opened([4 * 4096])
    leases = []
    for position, (key, parent) in enumerate(chain("a", 4)):
        assert write(pool, key, parent, position=position) == "ok"
        lease = pool.lease(key)
        assert lease is not None and bytes(lease.view) == block_bytes(key, 4096)
        leases.append(lease)
    assert write(pool, key_of("b")) == "full"
    assert pool.evict([key for key, _ in chain("a", 4)]) == 0
    for lease in leases:
        lease.release()
        lease.release()
    assert write(pool, key_of("b")) == "ok"
    assert pool.stat(1.0).writes_dropped == 1


def test_a_block_larger_than_every_member_is_refused(opened: Opener) -> None:
    assert write(opened([MIB]), key_of("a"), size_bytes=2 * MIB) == "full"


def test_only_memory_members_lease(opened: Opener) -> None:
    pool = opened(slab=MIB)
    assert write(pool, key_of("a")) == "ok"
    assert pool.lease(key_of("a")) is None and pool.host_buffers() == []
    assert [len(buffer) for buffer in opened([MIB]).host_buffers()] == [MIB]


def test_blocks_are_spread_over_members_by_weight(opened: Opener) -> None:
    pool = opened([MIB], slab=MIB, weights=[3.0, 1.0])
    for position, (key, parent) in enumerate(chain("a", 40)):
        assert write(pool, key, parent, position=position) == "ok"
    stat = pool.stat(1.0)
    assert [m.blocks for m in stat.members] == [30, 10]
    assert [m.weight for m in stat.members] == [0.75, 0.25]
    assert all(read(pool, key) == "ok" for key, _ in chain("a", 40))


def test_measured_weights_are_given_less_than_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    budgets_s: list[float] = []
    for kind in (MemoryMember, DeviceMember):
        measure = kind.measure

        def counted(self: Any, direction: Any, block_bytes: int, budget_s: float, measure: Any = measure) -> float:
            budgets_s.append(budget_s)
            return float(measure(self, direction, block_bytes, budget_s))

        monkeypatch.setattr(kind, "measure", counted)
    pool = open_local_pool([64 * MIB], [(tmp_path / "kv.slab", 64 * MIB)])
    assert len(budgets_s) == 2 and sum(budgets_s) < 1.0
    assert all(m.weight > 0 for m in pool.stat(1.0).members)
    pool.close(5.0)


def test_closed_pool_ends_everything_as_closed(opened: Opener) -> None:
    pool = opened([MIB])
    pool.close(5.0)
    assert [read(pool, key_of("a")), write(pool, key_of("a"))] == ["closed", "closed"]
    with pytest.raises(PoolError, match="closed"):
        pool.lookup([key_of("a")], 1.0)


def test_a_restart_pins_blocks_and_their_order_of_use(tmp_path: Path) -> None:
    slab = [(tmp_path / "kv.slab", 8 * 4096 + HEADER_BYTES)]
    pool = open_local_pool([], slab)
    for key, parent in (*chain("a", 4), *chain("b", 4)):
        assert write(pool, key, parent) == "ok"
    pool.lookup([key for key, _ in chain("a", 4)], 1.0)
    pool.close(5.0)
    pool = open_local_pool([], slab)
    pool.check_integrity()
    assert all(read(pool, key) == "ok" for key, _ in (*chain("a", 4), *chain("b", 4)))
    for position, (key, parent) in enumerate(chain("c", 2)):
        assert write(pool, key, parent, position=position) == "ok"
    assert [hit is not None for hit in pool.lookup([key for key, _ in chain("b", 4)], 1.0)] == [
        True,
        True,
        False,
        False,
    ]
    pool.close(5.0)


def test_every_flipped_bit_in_a_slab_is_found_and_nothing_wrong_is_served(tmp_path: Path) -> None:
    path = tmp_path / "kv.slab"
    pool = open_local_pool([], [(path, 2 * MIB)])
    keys = [key for key, _ in chain("a", 40)]
    for key, parent in chain("a", 40):
        assert write(pool, key, parent, size_bytes=20_000) == "ok"
    pool.close(5.0)
    generator = random.Random(7)
    rows = offsets(Path(f"{path}.db"))
    damaged = keys[::2]
    with path.open("r+b") as slab:
        for key in damaged:
            at = rows[key] + generator.randrange(20_000)
            slab.seek(at)
            byte = slab.read(1)[0]
            slab.seek(at)
            slab.write(bytes([byte ^ 1 << generator.randrange(8)]))
    pool = open_local_pool([], [(path, 2 * MIB)])
    assert {key: read(pool, key, size_bytes=20_000) for key in keys} == {
        key: "checksum" if key in damaged else "ok" for key in keys
    }
    assert pool.stat(1.0).checksum_errors == len(damaged)
    assert all(read(pool, key, size_bytes=20_000) == "missing" for key in damaged)
    pool.close(5.0)


def test_blocks_swapped_on_the_slab_do_not_pass_for_each_other(tmp_path: Path) -> None:
    path = tmp_path / "kv.slab"
    pool = open_local_pool([], [(path, MIB)])
    a, b = key_of("a"), key_of("b")
    assert [write(pool, a), write(pool, b)] == ["ok", "ok"]
    pool.close(5.0)
    at_a, at_b = (offsets(Path(f"{path}.db"))[key] for key in (a, b))
    with path.open("r+b") as slab:
        for key, at in ((a, at_b), (b, at_a)):
            slab.seek(at)
            slab.write(block_bytes(key, 4096))
    pool = open_local_pool([], [(path, MIB)])
    assert [read(pool, a), read(pool, b)] == ["checksum", "checksum"]
    pool.close(5.0)


def damage(path: Path, how: str) -> None:
    table = path.with_name(path.name + ".db")
    if how == "slab cut":
        with path.open("r+b") as slab:
            slab.truncate(HEADER_BYTES + 4 * 4096)
    elif how == "slab gone":
        path.unlink()
    elif how == "table unreadable":
        table.write_bytes(b"this is not a database" * 1000)
    elif how == "rows overlap":
        alter(table, lambda rows: rows.__setitem__("offset", HEADER_BYTES))
    elif how == "rows outside":
        alter(table, lambda rows: rows.__setitem__("offset", rows["offset"] + np.uint64(1 << 40)))


@pytest.mark.parametrize(
    ("how", "left"),
    [
        ("slab cut", 4),
        ("slab gone", 0),
        ("table unreadable", 0),
        ("rows overlap", 1),
        ("rows outside", 0),
    ],
)
def test_a_damaged_slab_or_table_loses_blocks_but_serves_nothing_wrong(tmp_path: Path, how: str, left: int) -> None:
    path = tmp_path / "kv.slab"
    pool = open_local_pool([], [(path, MIB)])
    for position, (key, parent) in enumerate(chain("a", 10)):
        assert write(pool, key, parent, position=position) == "ok"
    pool.close(5.0)
    damage(path, how)
    pool = open_local_pool([], [(path, MIB)])
    pool.check_integrity()
    assert pool.stat(1.0).members[0].blocks == left
    assert pool.notes
    outcomes = [read(pool, key) for key, _ in chain("a", 10)]
    assert set(outcomes) <= {"ok", "missing", "checksum"}
    assert how == "rows overlap" or outcomes.count("ok") == left
    assert write(pool, key_of("new")) == "ok" and read(pool, key_of("new")) == "ok"
    pool.close(5.0)


def test_foreign_files_and_other_formats_are_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "letters"
    path.write_bytes(b"dear all")
    with pytest.raises(OSError, match="not a Penstock slab"):
        open_local_pool([], [(path, MIB)])
    assert path.read_bytes() == b"dear all"
    path = tmp_path / "kv.slab"
    open_local_pool([], [(path, MIB)]).close(5.0)
    with sqlite3.connect(f"{path}.db") as db:
        db.execute("UPDATE meta SET value = 99 WHERE name = 'format'")
    with pytest.raises(OSError, match="format 99"):
        open_local_pool([], [(path, MIB)])
    with path.open("r+b") as slab:
        slab.seek(16)
        slab.write(b"\x07")
    with pytest.raises(OSError, match="format 7"):
        open_local_pool([], [(path, MIB)])


def test_a_slab_serves_one_pool_at_a_time(tmp_path: Path) -> None:
    pool = open_local_pool([], [(tmp_path / "kv.slab", MIB)])
    with pytest.raises(BlockingIOError, match="already locked"):
        open_local_pool([], [(tmp_path / "kv.slab", MIB)])
    pool.close(5.0)


class FaultyEngine:
    """A real block engine whose reads fail, or whose completions are held back, on request."""

    def __init__(self, inner: BlockEngine) -> None:
        self.inner = inner
        self.name, self.capacity_bytes = inner.name, inner.capacity_bytes
        self.alignment_bytes, self.depth, self.notes = inner.alignment_bytes, 2, inner.notes
        self.fail: set[str] = set()
        self.hold = threading.Event()
        self._held: list[IoCompletion] = []

    def register(self, buffer: memoryview) -> None:
        self.inner.register(buffer)

    def submit(self, ops: Sequence[IoOp]) -> None:
        self.inner.submit(ops)

    def poll(self, timeout_s: float) -> list[IoCompletion]:
        found = [
            IoCompletion(c.tag, OSError(errno.EIO, "injected")) if c.tag and c.tag.kind in self.fail else c
            for c in self.inner.poll(timeout_s)
        ]
        self._held.extend(found)
        if self.hold.is_set():
            return []
        found, self._held = self._held, []
        return found

    def wake(self) -> None:
        self.inner.wake()

    def in_flight(self) -> int:
        return self.inner.in_flight() + len(self._held)

    def sync(self) -> None:
        self.inner.sync()

    def close(self, timeout_s: float) -> None:
        self.inner.close(timeout_s)


@pytest.fixture
def faulty(tmp_path: Path) -> Iterator[tuple[LocalPool, FaultyEngine]]:
    path = tmp_path / "faulty.slab"
    engine = FaultyEngine(open_engine(path, 4 * MIB, 8))
    slab = open_device_member("ssd:0", str(path), engine, tmp_path / "faulty.db")
    pool = LocalPool([MemoryMember("memory:0", MIB), slab], [1.0, 1.0])
    yield pool, engine
    engine.hold.clear()
    pool.check_integrity()
    pool.close(5.0)


def test_a_member_that_keeps_failing_is_fenced(faulty: tuple[LocalPool, FaultyEngine]) -> None:
    pool, engine = faulty
    keys = [key for key, _ in chain("a", 20)]
    for position, (key, parent) in enumerate(chain("a", 20)):
        assert write(pool, key, parent, position=position) == "ok"
    on_slab = [k for k, hit in zip(keys, pool.lookup(keys, 1.0), strict=True) if hit and hit.route == ("ssd:0",)]
    assert len(on_slab) == 10
    engine.fail.add("load")
    assert [read(pool, key) for key in on_slab[:4]] == ["device"] * 3 + ["missing"]
    stat = member(pool.stat(1.0), "ssd:0")
    assert not stat.healthy and stat.errors == 3
    assert [hit is None for hit in pool.lookup(on_slab, 1.0)] == [True] * 10
    for position, (key, parent) in enumerate(chain("b", 10)):
        assert write(pool, key, parent, position=position) == "ok"
    assert member(pool.stat(1.0), "memory:0").blocks == 20


def test_failed_writes_are_dropped_and_their_space_comes_back(faulty: tuple[LocalPool, FaultyEngine]) -> None:
    pool, engine = faulty
    engine.fail.add("store")
    outcomes = [write(pool, key, parent) for key, parent in chain("a", 4)]
    assert sorted(outcomes) == ["device", "device", "ok", "ok"]
    engine.fail.clear()
    assert member(pool.stat(1.0), "ssd:0").used_bytes == 0
    assert pool.stat(1.0).writes_dropped == 2


def test_waiting_requests_end_by_their_deadline_behind_a_slow_device(
    faulty: tuple[LocalPool, FaultyEngine],
) -> None:
    """Two operations are in the device's hands and cannot be cut off; all that wait behind them end in time."""
    pool, engine = faulty
    keys = [key for key, _ in chain("a", 20)]
    for position, (key, parent) in enumerate(chain("a", 20)):
        assert write(pool, key, parent, position=position) == "ok"
    on_slab = [k for k, hit in zip(keys, pool.lookup(keys, 1.0), strict=True) if hit and hit.route == ("ssd:0",)]
    engine.hold.set()
    stuck = [Outcome(), Outcome()]
    for key, outcome in zip(on_slab, stuck, strict=False):
        pool.read(key, 4096, aligned_buffer(4096), 0.2, outcome)
    until(lambda: engine.in_flight() >= 2)
    waiting = [Outcome() for _ in range(4)]
    for key, outcome in zip(on_slab[2:], waiting, strict=False):
        pool.read(key, 4096, aligned_buffer(4096), 0.2, outcome)
    assert [outcome.reason(5.0) for outcome in waiting] == ["deadline"] * 4
    assert all(outcome.pending() for outcome in stuck)
    assert pool.evict(on_slab[:2]) == 0, "blocks in flight stay"
    engine.hold.clear()
    assert [outcome.reason(5.0) for outcome in stuck] == ["ok", "ok"]


def test_a_table_that_cannot_be_written_stops_stores_until_it_can(tmp_path: Path) -> None:
    path = tmp_path / "kv.slab"
    pool = open_local_pool([], [(path, 64 * MIB)])
    assert write(pool, key_of("a")) == "ok"
    other = sqlite3.connect(f"{path}.db", isolation_level=None)
    until(lambda: other.execute("SELECT count(*) FROM blocks").fetchone() == (1,))
    other.execute("BEGIN IMMEDIATE")
    assert write(pool, key_of("b")) == "device", "what cannot be durable is not acknowledged"
    names = itertools.count()
    until(lambda: write(pool, key_of(("c", next(names)))) == "device")
    assert [read(pool, key_of("a")), read(pool, key_of("b"))] == ["ok", "missing"]
    other.execute("ROLLBACK")
    other.close()
    until(lambda: write(pool, key_of("d")) == "ok")
    pool.close(5.0)
    pool = open_local_pool([], [(path, 64 * MIB)])
    assert [read(pool, key_of(name)) for name in "abd"] == ["ok", "missing", "ok"]
    pool.close(5.0)


WRITER = """
import sys, threading, time
from pathlib import Path
from typing import Any
from tests.pool.helpers import chain, new_block, staged
from penstock.pool.setup.open import open_local_pool
pool = open_local_pool([], [(Path(sys.argv[1]), 2 << 20)])
blocks = chain("a", 3000)
stored = threading.Event()
said = False
for key, parent in blocks * 1000:
    pool.write(new_block(key, parent, 9000), staged(key, 9000), 10.0, lambda error: error or stored.set())
    if not said and stored.wait(60.0):
        print("ready", flush=True)
        said = True
    time.sleep(0.0005)
"""


def test_after_a_crash_every_row_names_complete_data(tmp_path: Path) -> None:
    """A process that writes and evicts all the time is killed, three times over one slab."""
    path = tmp_path / "kv.slab"
    for kill_after_s in (0.3, 0.5, 0.7):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, env=with_tests())
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(kill_after_s)
        process.kill()
        process.wait(10.0)
        process.stdout.close()
        pool = open_local_pool([], [(path, 2 * MIB)])
        pool.check_integrity()
        blocks = pool.stat(1.0).members[0].blocks
        outcomes = [read(pool, key, size_bytes=9000) for key, _ in chain("a", 3000)]
        assert outcomes.count("ok") == blocks > 0
        assert set(outcomes) == {"ok", "missing"}
        assert not pool.notes
        pool.close(5.0)


@pytest.mark.slow
def test_random_operations_against_a_dictionary(tmp_path: Path) -> None:
    """Writes, reads, evictions, leases and restarts in random order: nothing but the right bytes is ever served."""
    generator = random.Random(20)
    slab = [(tmp_path / "kv.slab", 40 * 4096 + HEADER_BYTES)]
    pool = open_local_pool([24 * 4096], slab, weights=[1.0, 1.0])
    sizes = {i: generator.choice((3000, 4096, 9000, 20_000)) for i in range(60)}
    stored: set[int] = set()
    for step in range(1200):
        i = generator.randrange(60)
        match generator.randrange(12):
            case 0 | 1 | 2 | 3 | 4:
                parent = key_of(i - 1) if i % 6 else ROOT
                assert write(pool, key_of(i), parent, sizes[i]) == "ok"
                stored.add(i)
            case 5:
                pool.evict([key_of(i)])
                assert read(pool, key_of(i), sizes[i]) == "missing"
                stored.discard(i)
            case 6:
                lease = pool.lease(key_of(i))
                if lease is not None:
                    assert bytes(lease.view) == block_bytes(key_of(i), sizes[i])
                    lease.release()
            case 7 if step % 100 == 99 or generator.randrange(40) == 0:
                pool.close(5.0)
                pool = open_local_pool([24 * 4096], slab, weights=[1.0, 1.0])
            case _:
                assert read(pool, key_of(i), sizes[i]) in (("ok", "missing") if i in stored else ("missing",))
        pool.check_integrity()
    assert pool.stat(1.0).checksum_errors == 0
    pool.close(5.0)


def test_many_threads_at_once(tmp_path: Path) -> None:
    pool = open_local_pool([32 * 4096], [(tmp_path / "kv.slab", 32 * 4096 + HEADER_BYTES)], weights=[1.0, 1.0])
    failures: list[str] = []

    def work(seed: int) -> None:
        generator = random.Random(seed)
        for _ in range(80):
            i = generator.randrange(100)
            kind = read if generator.randrange(2) else write
            outcome = kind(pool, key_of(i))
            # Two writers of one key: the second is told so.
            if outcome not in ("ok", "missing", "dropped"):
                failures.append(f"{kind.__name__} {outcome}")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30.0)
    assert not failures and not any(thread.is_alive() for thread in threads)
    pool.check_integrity()
    pool.close(5.0)


def test_queued_writes_over_the_limit_are_dropped_not_kept(faulty: tuple[LocalPool, FaultyEngine]) -> None:
    pool, engine = faulty
    engine.hold.set()
    outcomes = [Outcome() for _ in range(700)]
    data = staged(key_of("x"), 100)
    for i, outcome in enumerate(outcomes):
        pool.write(new_block(key_of(i), size_bytes=100), data, 0.5, outcome)
    engine.hold.clear()
    reasons = [outcome.reason(5.0) for outcome in outcomes]
    assert "dropped" in reasons
    assert set(reasons) <= {"ok", "dropped", "full", "deadline"}
    assert pool.stat(1.0).writes_dropped == len(reasons) - reasons.count("ok")


def test_blocks_written_together_end_each_as_if_written_alone(opened: Opener) -> None:
    pool = opened([MIB, MIB], slab=2 * MIB, weights=[1.0, 1.0, 1.0])
    news = [new_block(key_of(i), key_of(i - 1), 4096, i) for i in range(150)]
    datas = [staged(new.key, new.size_bytes) for new in news]
    assert write(pool, key_of(3), key_of(2), 4096) == "ok"
    assert write(pool, key_of(5), key_of(4), 8192) == "ok"
    news[9] = new_block(key_of(9), key_of(9), 4096)
    news[11] = news[10]
    ends: queue.SimpleQueue[list[PoolError | None]] = queue.SimpleQueue()
    pool.write_many(news, datas, 10.0, ends.put)
    results = ends.get(timeout=20.0)
    reasons = {at: error.reason for at, error in enumerate(results) if error is not None}
    assert len(results) == 150 and reasons == {5: "layout", 9: "layout", 11: "dropped"}
    for at, new in enumerate(news):
        if at not in reasons:
            assert read(pool, new.key) == "ok"
    pool.write_many([], [], 1.0, ends.put)
    assert ends.get(timeout=5.0) == []
    stat = pool.stat(1.0)
    assert stat.writes_dropped == 3 and sum(one.blocks for one in stat.members) == 148
    pool.check_integrity()
    pool.close(5.0)
    pool.write_many(news[:2], datas[:2], 1.0, ends.put)
    assert [error.reason for error in ends.get(timeout=5.0) if error] == ["closed"] * 2


def test_the_end_of_small_blocks_written_together_is_told_on_another_thread(opened: Opener) -> None:
    """They are stored on the caller's thread, which may hold a lock that `done` needs."""
    pool = opened([MIB])
    lock, ends = threading.Lock(), queue.SimpleQueue[list[PoolError | None]]()
    news = [new_block(key_of(i), key_of(i - 1), 4096, i) for i in range(20)]

    def done(errors: list[PoolError | None]) -> None:
        with lock:
            ends.put(errors)

    with lock:
        pool.write_many(news, [staged(new.key, 4096) for new in news], 10.0, done)
        assert ends.empty()
    assert ends.get(timeout=20.0) == [None] * 20
    assert all(read(pool, new.key) == "ok" for new in news)
    assert pool.stat(1.0).members[0].written_bytes == 20 * 4096
    late: queue.SimpleQueue[list[PoolError | None]] = queue.SimpleQueue()
    other = [new_block(key_of(("late", i)), key_of(0), 4096, i) for i in range(20)]
    pool.write_many(other, [staged(new.key, 4096) for new in other], 0.0, late.put)
    assert {error and error.reason for error in late.get(timeout=20.0)} == {"deadline"}
    pool.check_integrity()


def test_blocks_written_together_evict_what_is_worth_least(opened: Opener) -> None:
    pool = opened([MIB, MIB], weights=[1.0, 1.0])
    for name in range(6):
        news = [new_block(key_of((name, i)), key_of((name, i - 1)), 4096, i) for i in range(200)]
        ends: queue.SimpleQueue[list[PoolError | None]] = queue.SimpleQueue()
        pool.write_many(news, [staged(new.key, 4096) for new in news], 10.0, ends.put)
        assert ends.get(timeout=20.0) == [None] * 200
    assert all(found is not None for found in pool.lookup([new.key for new in news], 1.0))
    stat = pool.stat(1.0)
    assert stat.evictions == 6 * 200 - 512 == dict(stat.evictions_by)["own"]


class Turns(Sequence[bytes]):
    """Keys that ask the pool something each time a part of them is taken: nobody may hold its lock then."""

    def __init__(self, keys: Sequence[bytes], pool: LocalPool) -> None:
        self._keys, self._pool = keys, pool
        self.parts: list[int] = []

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, at: Any) -> Any:
        part = self._keys[at]
        self.parts.append(len(part))
        asked = threading.Thread(target=self._pool.stat, args=(1.0,), daemon=True)
        asked.start()
        asked.join(10.0)
        assert not asked.is_alive(), "the pool's lock is held while a part of the keys is taken"
        return part


def test_many_keys_are_looked_up_and_evicted_in_turns_with_others(opened: Opener) -> None:
    pool = opened([4 * MIB])
    keys = [key_of(number) for number in range(10 * KEYS_AT_ONCE + 5)]
    for key in (keys[0], keys[700], keys[-1]):
        assert write(pool, key, size_bytes=1000) == "ok"
    asked = Turns(keys, pool)
    found = pool.lookup(asked, 1.0)
    assert asked.parts == [KEYS_AT_ONCE] * 10 + [5]
    assert [at for at, hit in enumerate(found) if hit is not None] == [0, 700, len(keys) - 1]
    dropped = Turns(keys, pool)
    assert pool.evict(dropped) == 3
    assert dropped.parts == [EVICTED_AT_ONCE] * (10 * KEYS_AT_ONCE // EVICTED_AT_ONCE) + [5]
    assert pool.lookup([], 1.0) == [] and pool.evict([]) == 0
