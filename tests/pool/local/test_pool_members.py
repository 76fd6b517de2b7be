"""Members that come, go, fail and come back, and who gets their space: with real memory, slabs and bytes."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from penstock.core.bandwidth import CHANGE_EVERY_S
from penstock.core.new_block import tenant_tag
from penstock.core.pool.policy import PoolPolicy
from penstock.io.memory import aligned_buffer
from penstock.io.open import open_engine
from penstock.pool.api import PoolError
from penstock.pool.local import drain, local_pool
from penstock.pool.local.local_pool import LocalPool
from penstock.pool.members import probe
from penstock.pool.members.device import DeviceMember, open_device_member, open_slab_member
from penstock.pool.members.header import HEADER_BYTES
from penstock.pool.members.memory import MemoryMember
from tests.pool.faulty_engine import FaultyEngine
from tests.pool.helpers import ROOT, Outcome, block_bytes, chain, key_of, member, new_block, read, staged, until, write

MIB = 1 << 20
PAGE = 4096
Maker = Callable[..., LocalPool]


@pytest.fixture
def made() -> Iterator[Maker]:
    """Makes pools that are checked and closed at the end."""
    pools: list[LocalPool] = []

    def make(*members: object, weights: list[float] | None = None, **policy: object) -> LocalPool:
        pool = LocalPool(list(members), weights or [1.0] * len(members), PoolPolicy(**policy))  # type: ignore[arg-type]
        pools.append(pool)
        return pool

    yield make
    for pool in pools:
        pool.check_integrity()
        pool.close(5.0)


def slab(folder: Path, number: int = 0, pages: int = 256) -> DeviceMember:
    return open_slab_member(f"ssd:{number}", folder / f"{number}.slab", pages * PAGE + HEADER_BYTES, None, 8)


def faulty_slab(folder: Path, number: int = 0) -> tuple[DeviceMember, FaultyEngine]:
    path = folder / f"faulty{number}.slab"
    engine = FaultyEngine(open_engine(path, 4 * MIB, 8))
    return open_device_member(f"ssd:{number}", str(path), engine, folder / f"faulty{number}.db"), engine


def fill(pool: LocalPool, name: object, length: int, size: int = PAGE) -> list[bytes]:
    for position, (key, parent) in enumerate(chain(name, length)):
        assert write(pool, key, parent, size, position=position) == "ok"
    return [key for key, _ in chain(name, length)]


def on(pool: LocalPool, keys: list[bytes], name: str) -> list[bytes]:
    hits = pool.lookup(keys, 1.0)
    return [key for key, hit in zip(keys, hits, strict=True) if hit and hit.route == (name,)]


def names(pool: LocalPool) -> list[str]:
    return [one.name for one in pool.stat(1.0).members]


# --- drain and add ---


def test_a_drained_member_loses_nothing_that_fits_and_is_gone(made: Maker, tmp_path: Path) -> None:
    pool = made(slab(tmp_path, 0), slab(tmp_path, 1), MemoryMember("memory:0", MIB))
    keys = fill(pool, "a", 90, 3000)
    assert len(on(pool, keys, "ssd:0")) == 30
    pool.drain_member("ssd:0")
    until(lambda: "ssd:0" not in names(pool))
    assert all(read(pool, key, 3000) == "ok" for key in keys)
    stat = pool.stat(1.0)
    assert stat.moved_blocks == 30 and sum(one.blocks for one in stat.members) == 90
    pool.check_integrity()
    assert fill(pool, "b", 10) and not on(pool, [key for key, _ in chain("b", 10)], "ssd:0")
    with pytest.raises(ValueError, match="no member 'ssd:0'"):
        pool.drain_member("ssd:0")


def test_what_was_moved_to_a_slab_survives_a_restart_and_the_old_rows_are_gone(made: Maker, tmp_path: Path) -> None:
    pool = made(slab(tmp_path, 0), slab(tmp_path, 1))
    keys = fill(pool, "a", 40)
    pool.drain_member("ssd:0")
    until(lambda: "ssd:0" not in names(pool))
    pool.close(5.0)
    pool = made(slab(tmp_path, 1))
    assert all(read(pool, key) == "ok" for key in keys)
    pool.add_member(slab(tmp_path, 0), 1.0)
    assert member(pool.stat(1.0), "ssd:0").blocks == 0 and not pool.notes


@pytest.mark.slow
def test_reads_work_at_every_moment_of_a_drain(made: Maker, tmp_path: Path) -> None:
    pool = made(slab(tmp_path, 0, 2048), slab(tmp_path, 1, 4096))
    keys = fill(pool, "a", 300, 8 * PAGE)
    outcomes: list[str] = []
    stop = threading.Event()

    def reader(seed: int) -> None:
        generator = random.Random(seed)
        while not stop.is_set():
            outcomes.append(read(pool, generator.choice(keys), 8 * PAGE))

    threads = [threading.Thread(target=reader, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    until(lambda: len(outcomes) > 20)
    pool.drain_member("ssd:0")
    until(lambda: "ssd:0" not in names(pool), 30.0)
    seen = len(outcomes)
    until(lambda: len(outcomes) > seen + 20)
    stop.set()
    for thread in threads:
        thread.join(10.0)
    assert set(outcomes) == {"ok"}
    assert pool.stat(1.0).moved_blocks == 150


def test_the_most_worth_moves_first_and_what_finds_no_room_is_dropped(made: Maker) -> None:
    pool = made(MemoryMember("memory:0", 20 * PAGE), MemoryMember("memory:1", 20 * PAGE))
    keys = [key_of(i) for i in range(32)]
    for i, key in enumerate(keys):
        assert write(pool, key, position=i) == "ok"
    pool.lookup(keys[8:], 1.0)
    leaving = on(pool, keys, "memory:0")
    pool.drain_member("memory:0")
    until(lambda: "memory:0" not in names(pool))
    stat = pool.stat(1.0)
    assert stat.moved_blocks == 4 and stat.members[0].blocks == 20
    hits = pool.lookup(leaving, 1.0)
    assert [hit is not None for hit in hits] == [False] * 12 + [True] * 4


def test_a_lease_outlives_the_drain_and_a_draining_member_shows(made: Maker) -> None:
    pool = made(MemoryMember("memory:0", 64 * PAGE), MemoryMember("memory:1", 64 * PAGE))
    keys = fill(pool, "a", 8)
    key = on(pool, keys, "memory:0")[0]
    lease = pool.lease(key)
    assert lease is not None
    pool.drain_member("memory:0")
    until(lambda: member(pool.stat(1.0), "memory:0").blocks == 0)
    stat = member(pool.stat(1.0), "memory:0")
    assert (stat.state, stat.used_bytes) == ("draining", PAGE)
    assert bytes(lease.view) == block_bytes(key, PAGE) and read(pool, key) == "ok"
    with pytest.raises(ValueError, match="drained already"):
        pool.drain_member("memory:0")
    pool.check_integrity()
    lease.release()
    until(lambda: names(pool) == ["memory:1"])


def test_a_reader_that_never_ends_does_not_keep_a_member_for_ever(made: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drain, "READERS_WAIT_S", 0.05)
    pool = made(MemoryMember("memory:0", 64 * PAGE), MemoryMember("memory:1", 64 * PAGE))
    keys = fill(pool, "a", 8)
    key = on(pool, keys, "memory:0")[0]
    lease = pool.lease(key)
    assert lease is not None
    pool.drain_member("memory:0")
    until(lambda: names(pool) == ["memory:1"])
    pool.check_integrity()
    assert bytes(lease.view) == block_bytes(key, PAGE)
    pool.add_member(MemoryMember("memory:2", 64 * PAGE), 1.0)
    lease.release()
    pool.add_member(MemoryMember("memory:3", 64 * PAGE), 1.0)
    assert sorted(names(pool)) == ["memory:1", "memory:2", "memory:3"]


def test_damage_found_while_moving_drops_the_block_and_is_counted(made: Maker, tmp_path: Path) -> None:
    pool = made(slab(tmp_path, 0), MemoryMember("memory:0", MIB))
    keys = fill(pool, "a", 20)
    leaving = on(pool, keys, "ssd:0")
    data = (tmp_path / "0.slab").read_bytes()
    at = data.index(block_bytes(leaving[3], PAGE)[:64])
    with (tmp_path / "0.slab").open("r+b") as file:
        file.seek(at)
        file.write(bytes([data[at] ^ 1]))
    pool.drain_member("ssd:0")
    until(lambda: names(pool) == ["memory:0"])
    assert pool.stat(1.0).checksum_errors == 1 and pool.stat(1.0).moved_blocks == len(leaving) - 1
    assert [key for key in keys if read(pool, key) != "ok"] == [leaving[3]]


def test_a_member_that_fails_while_it_drains_goes_with_what_could_be_read(made: Maker, tmp_path: Path) -> None:
    broken, engine = faulty_slab(tmp_path)
    pool = made(broken, MemoryMember("memory:0", MIB))
    keys = fill(pool, "a", 20)
    engine.fail.add("read")
    pool.drain_member("ssd:0")
    until(lambda: names(pool) == ["memory:0"])
    assert member(pool.stat(1.0), "memory:0").blocks == 10
    assert sum(read(pool, key) == "ok" for key in keys) == 10


def test_closing_in_the_middle_of_a_drain_ends_everything(made: Maker, tmp_path: Path) -> None:
    hanging, engine = faulty_slab(tmp_path)
    pool = made(hanging, MemoryMember("memory:0", MIB))
    keys = fill(pool, "a", 20)
    engine.hold.set()
    pool.drain_member("ssd:0")
    outcome = Outcome()
    pool.read(on(pool, keys, "ssd:0")[0], PAGE, aligned_buffer(PAGE), 5.0, outcome)
    threading.Timer(0.2, engine.hold.clear).start()
    pool.close(5.0)
    assert outcome.reason() in ("ok", "closed")
    with pytest.raises(PoolError, match="closed"):
        pool.drain_member("memory:0")


def test_a_new_member_takes_its_share_and_brings_its_blocks(made: Maker, tmp_path: Path) -> None:
    first = made(slab(tmp_path, 0))
    old = fill(first, "old", 10)
    first.close(5.0)
    pool = made(MemoryMember("memory:0", MIB))
    pool.register(aligned_buffer(PAGE))
    pool.add_member(slab(tmp_path, 0), 3.0)
    assert all(read(pool, key) == "ok" for key in old)
    fill(pool, "new", 40)
    assert [one.blocks for one in pool.stat(1.0).members] == [10, 40]
    with pytest.raises(ValueError, match="already"):
        pool.add_member(MemoryMember("memory:0", MIB), 1.0)


def test_what_cannot_be_drained_is_refused(made: Maker) -> None:
    pool = made(MemoryMember("memory:0", MIB))
    with pytest.raises(ValueError, match="no member 'ssd:9'; it has memory:0"):
        pool.drain_member("ssd:9")
    with pytest.raises(ValueError, match="last one"):
        pool.drain_member("memory:0")


def test_a_chain_of_members_that_come_and_go(made: Maker, tmp_path: Path) -> None:
    """Twelve times a member is added and the oldest drained, under writes and reads; numbers are used again."""
    pool = made(MemoryMember("memory:0", MIB), MemoryMember("memory:1", MIB))
    keys = fill(pool, "a", 40)
    for step in range(2, 14):
        pool.add_member(MemoryMember(f"memory:{step}", MIB), 1.0)
        keys += fill(pool, step, 4)
        pool.drain_member(f"memory:{step - 2}")
        until(lambda step=step: len(names(pool)) == 2)  # type: ignore[misc]
        pool.check_integrity()
    assert all(read(pool, key) == "ok" for key in keys)
    assert len(pool.members) <= 4


# --- fences ---


@pytest.fixture
def quick_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "FIRST_PAUSE_S", 0.05)
    monkeypatch.setattr(probe, "PAUSE_S_MAX", 0.2)


def test_blocks_of_a_fenced_member_are_rewritten_elsewhere_and_the_rest_comes_back(
    made: Maker, tmp_path: Path, quick_probes: None
) -> None:
    broken, engine = faulty_slab(tmp_path)
    pool = made(broken, MemoryMember("memory:0", MIB))
    keys = fill(pool, "a", 40)
    lost = on(pool, keys, "ssd:0")
    engine.fail.update(("read", "write"))
    assert [read(pool, key) for key in lost[:3]] == ["device"] * 3
    assert member(pool.stat(1.0), "ssd:0").state == "fenced"
    assert on(pool, lost, "ssd:0") == []
    assert [write(pool, key) for key in lost[:10]] == ["ok"] * 10
    assert on(pool, lost, "memory:0") == lost[:10]
    pool.check_integrity()
    engine.fail.clear()
    until(lambda: member(pool.stat(1.0), "ssd:0").state == "ok")
    assert on(pool, lost, "memory:0") == lost[:10] and on(pool, lost, "ssd:0") == lost[10:]
    assert all(read(pool, key) == "ok" for key in keys)
    pool.close(5.0)
    pool = made(faulty_slab(tmp_path)[0])
    assert sum(read(pool, key) == "ok" for key in lost) == 10, "rows of what was rewritten are gone"


def test_a_pool_whose_other_member_is_fenced_still_finds_room(made: Maker, tmp_path: Path) -> None:
    """Prefixes lie on both members: their ends on the fenced one do not keep the rest from being evicted."""
    broken, engine = faulty_slab(tmp_path)
    pool = made(MemoryMember("memory:0", 64 * PAGE), broken)
    for name in range(8):
        fill(pool, name, 16)
    engine.fail.update(("read", "write"))
    keys = [key for key, _ in chain(0, 16)]
    for key in on(pool, keys, "ssd:0")[:3]:
        read(pool, key)
    assert member(pool.stat(1.0), "ssd:0").state == "fenced"
    for i in range(100):
        assert write(pool, key_of(("new", i))) == "ok"
    pool.check_integrity()
    assert member(pool.stat(1.0), "memory:0").blocks == 64


# --- quotas, admission, fairness, shares ---


def test_a_tenant_over_its_quota_gives_way_and_others_keep_their_blocks(made: Maker) -> None:
    pool = made(MemoryMember("memory:0", 64 * PAGE), quota_bytes={tenant_tag("small"): 16 * PAGE})
    for i in range(16):
        assert write(pool, key_of(("large", i)), tenant="large") == "ok"
    for i in range(48):
        assert write(pool, key_of(("small", i)), tenant="small") == "ok", "free space may be used"
    held = dict(pool.stat(1.0).tenants)
    assert held == {tenant_tag("small").hex(): 48 * PAGE, tenant_tag("large").hex(): 16 * PAGE}
    for i in range(100):
        assert write(pool, key_of(("more", i)), tenant="small") == "ok"
    assert all(pool.lookup([key_of(("large", i)) for i in range(16)], 1.0))
    for i in range(16, 48):
        assert write(pool, key_of(("large", i)), tenant="large") == "ok"
    held = dict(pool.stat(1.0).tenants)
    assert held == {tenant_tag("small").hex(): 16 * PAGE, tenant_tag("large").hex(): 48 * PAGE}


def test_new_blocks_go_to_memory_and_reused_ones_to_ssds(made: Maker, tmp_path: Path) -> None:
    pool = made(MemoryMember("memory:0", 8 * PAGE), slab(tmp_path), write_admission="reused")
    keys = [key_of(i) for i in range(24)]
    for i, key in enumerate(keys):
        assert write(pool, key, position=i) == "ok"
    stat = pool.stat(1.0)
    assert [one.blocks for one in stat.members] == [8, 0] and stat.writes_not_admitted == 12
    for i, key in enumerate(keys[:16]):
        assert write(pool, key, position=i) == "ok"
    assert member(pool.stat(1.0), "ssd:0").blocks > 0 and pool.stat(1.0).writes_not_admitted == 12


def test_without_memory_a_new_block_is_dropped_and_its_second_write_is_stored(made: Maker, tmp_path: Path) -> None:
    pool = made(slab(tmp_path), write_admission="reused")
    assert [write(pool, key_of("a")), write(pool, key_of("a")), read(pool, key_of("a"))] == ["dropped", "ok", "ok"]
    pool.lookup([key_of("b")], 1.0)
    pool.lookup([key_of("b")], 1.0)
    assert write(pool, key_of("b")) == "ok", "two requests asked for it"
    stat = pool.stat(1.0)
    assert (stat.writes_not_admitted, stat.writes_dropped) == (1, 1)


def test_a_flood_of_one_tenants_loads_does_not_hold_up_the_other(made: Maker, tmp_path: Path) -> None:
    held, engine = faulty_slab(tmp_path)
    pool = made(held)
    flood, few = [key_of(("flood", i)) for i in range(100)], [key_of(("few", i)) for i in range(10)]
    for key in flood:
        assert write(pool, key, tenant="flood") == "ok"
    for key in few:
        assert write(pool, key, tenant="few") == "ok"
    engine.hold.set()
    order: list[str] = []
    ends: list[Outcome] = []

    def load(key: bytes, tenant: str) -> None:
        outcome = Outcome()
        ends.append(outcome)

        def done(error: PoolError | None) -> None:
            order.append(tenant)
            outcome(error)

        pool.read(key, PAGE, aligned_buffer(PAGE), 10.0, done)

    for key in flood:
        load(key, "flood")
    for key in few:
        load(key, "few")
    engine.hold.clear()
    assert [outcome.reason() for outcome in ends] == ["ok"] * 110
    assert "few" not in order[30:], "ten loads of one wait for about ten of the other, not for all hundred"


class Paced(MemoryMember):
    """Memory that says how fast it was read, as a test wants it."""

    counters = (0, 0.0)

    def observed(self) -> tuple[int, float]:
        return self.counters


def test_shares_follow_a_member_that_degrades_and_recovers(made: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 1000.0
    monkeypatch.setattr(local_pool.time, "monotonic", lambda: now_s)  # type: ignore[attr-defined]
    slow = Paced("memory:0", MIB)
    pool = made(slow, Paced("memory:1", MIB), weights=[1e9, 1e9], follow_bandwidth=True)

    def run(rate: float) -> tuple[float, float]:
        nonlocal now_s
        for _ in range(30):
            now_s += 1.1
            moved, busy_s = slow.counters
            slow.counters = (moved + int(rate), busy_s + 1.0)
            stat = pool.stat(1.0)
        return stat.members[0].weight, stat.members[0].read_bytes_per_s

    assert run(1e9)[0] == 0.5
    weight, seen = run(0.25e9)
    assert weight == pytest.approx(0.2, abs=0.02) and seen == pytest.approx(0.25e9, rel=0.1)
    assert run(1e9)[0] == 0.5
    assert CHANGE_EVERY_S > 5


def test_weights_that_are_given_stay(made: Maker) -> None:
    slow = Paced("memory:0", MIB)
    pool = made(slow, Paced("memory:1", MIB), weights=[3.0, 1.0])
    slow.counters = (10, 10.0)
    assert [one.weight for one in pool.stat(1.0).members] == [0.75, 0.25]


def test_random_histories_of_a_whole_pool(made: Maker, tmp_path: Path) -> None:
    """Writes, reads, leases, evictions, members that come and go; only the right bytes are ever served."""
    generator = random.Random(33)
    pool = made(
        MemoryMember("memory:0", 40 * PAGE),
        slab(tmp_path, 0, 40),
        quota_bytes={tenant_tag("t0"): 20 * PAGE},
        default_quota_bytes=50 * PAGE,
    )
    sizes = {i: generator.choice((3000, 4096, 9000, 20_000)) for i in range(60)}
    leases = []
    number = 1
    for step in range(900):
        i = generator.randrange(60)
        match generator.randrange(14):
            case 0 | 1 | 2 | 3 | 4 | 5:
                parent = key_of(i - 1) if i % 6 else ROOT
                outcome = write(pool, key_of(i), parent, sizes[i], tenant=f"t{i % 3}", rebuild_s=i * 1e-4)
                assert outcome in ("ok", "full")
            case 6:
                lease = pool.lease(key_of(i))
                if lease is not None:
                    leases.append((i, lease))
            case 7 if leases:
                i, lease = leases.pop(generator.randrange(len(leases)))
                assert bytes(lease.view) == block_bytes(key_of(i), sizes[i])
                lease.release()
            case 8:
                pool.evict([key_of(i)])
            case 9 if step % 40 == 0 and len(names(pool)) < 5:
                number += 1
                fresh = MemoryMember(f"memory:{number}", 40 * PAGE)
                pool.add_member(fresh if step % 80 else slab(tmp_path, number, 40), 1.0)
            case 10 if step % 20 == 0:
                ok = [one.name for one in pool.stat(1.0).members if one.state == "ok"]
                if len(ok) > 2:
                    pool.drain_member(generator.choice(ok))
            case _:
                assert read(pool, key_of(i), sizes[i]) in ("ok", "missing")
        if step % 5 == 0:
            pool.check_integrity()
    for _, lease in leases:
        lease.release()
    until(lambda: all(one.state == "ok" for one in pool.stat(1.0).members))
    assert pool.stat(1.0).checksum_errors == 0


def test_writes_and_loads_that_wait_show(made: Maker, tmp_path: Path) -> None:
    held, engine = faulty_slab(tmp_path)
    pool = made(held)
    keys = fill(pool, "a", 10)
    engine.hold.set()
    ends = [Outcome() for _ in range(20)]
    for key, end in zip(keys, ends, strict=False):
        pool.read(key, PAGE, aligned_buffer(PAGE), 10.0, end)
    for i, end in enumerate(ends[10:]):
        key = key_of(("w", i))
        pool.write(new_block(key), staged(key, PAGE), 10.0, end)
    until(lambda: member(pool.stat(1.0), "ssd:0").queued_loads == 8)
    assert member(pool.stat(1.0), "ssd:0").queued_stores == 10
    engine.hold.clear()
    assert [end.reason() for end in ends] == ["ok"] * 20
