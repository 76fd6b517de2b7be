"""A member on any block engine: its header, acknowledgements, fences and probes, with injected faults."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import pytest

from penstock.core.layout import staging_bytes
from penstock.io.api import BlockEngine, IoOp
from penstock.io.memory import aligned_buffer
from penstock.io.open import open_engine
from penstock.pool.api import PoolError
from penstock.pool.block import Block
from penstock.pool.local.local_pool import LocalPool
from penstock.pool.members import device, journal, probe
from penstock.pool.members.device import DeviceMember, open_device_member, open_slab_member
from penstock.pool.members.header import HEADER_BYTES, SlabRefused
from penstock.pool.members.journal import Journal
from penstock.pool.members.work import Work
from penstock.pool.setup.open import open_local_pool
from tests.pool.faulty_engine import FaultyEngine
from tests.pool.helpers import ROOT, Outcome, block_bytes, chain, key_of, member, new_block, read, staged, until, write

MIB = 1 << 20


class Rig:
    """One member on a faulty engine, and the pool of it."""

    def __init__(self, folder: Path) -> None:
        self.path, self.table = folder / "kv.slab", folder / "kv.db"
        self.engine = FaultyEngine(open_engine(self.path, 4 * MIB, 8))
        self.member = open_device_member("ssd:0", str(self.path), self.engine, self.table)
        self.pool = LocalPool([self.member], [1.0])

    def begin_write(self, key: bytes, timeout_s: float = 10.0) -> Outcome:
        outcome = Outcome()
        self.pool.write(new_block(key), staged(key, 4096), timeout_s, outcome)
        return outcome

    def rows(self) -> int:
        with contextlib.closing(sqlite3.connect(self.table)) as db:
            return int(db.execute("SELECT count(*) FROM blocks").fetchone()[0])

    def healthy(self) -> bool:
        return bool(member(self.pool.stat(1.0), "ssd:0").healthy)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path)
    yield rig
    rig.engine.hold.clear()
    rig.engine.hold_sync.clear()
    rig.pool.check_integrity()
    rig.pool.close(5.0)


@pytest.fixture
def quick_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "FIRST_PAUSE_S", 0.05)
    monkeypatch.setattr(probe, "PAUSE_S_MAX", 0.2)


# --- acknowledged means durable ---


def test_a_write_is_acknowledged_when_its_row_is_committed(rig: Rig) -> None:
    rig.engine.hold_sync.set()
    first, key = rig.begin_write(key_of("a")), key_of("a")
    until(lambda: rig.pool.lookup([key], 1.0) != [None])
    assert read(rig.pool, key) == "ok", "it can be read at once"
    second = rig.begin_write(key)
    assert first.pending() and second.pending() and rig.rows() == 0
    rig.engine.hold_sync.clear()
    assert [first.reason(), second.reason()] == ["ok", "ok"] and rig.rows() == 1


def test_a_device_that_hangs_in_a_sync_costs_the_deadline_only(rig: Rig) -> None:
    rig.engine.hold_sync.set()
    key = key_of("a")
    assert rig.begin_write(key, timeout_s=0.2).reason(5.0) == "deadline"
    assert read(rig.pool, key) == "ok"
    assert rig.begin_write(key, timeout_s=0.2).reason(5.0) == "deadline", "still not durable"
    rig.engine.hold_sync.clear()
    until(lambda: rig.rows() == 1)
    assert write(rig.pool, key) == "ok"


def test_a_sync_that_fails_loses_the_block_and_says_so(rig: Rig) -> None:
    rig.engine.fail_sync = True
    assert write(rig.pool, key_of("a")) == "device"
    assert read(rig.pool, key_of("a")) == "missing" and rig.rows() == 0
    until(lambda: write(rig.pool, key_of("b")) == "device")
    rig.engine.fail_sync = False
    until(lambda: write(rig.pool, key_of("c")) == "ok")
    assert rig.rows() == 1
    assert member(rig.pool.stat(1.0), "ssd:0").used_bytes == 4096


def test_a_block_that_leaves_before_its_row_is_committed_ends_its_write(rig: Rig) -> None:
    rig.engine.hold_sync.set()
    outcome = rig.begin_write(key_of("a"))
    until(lambda: rig.pool.lookup([key_of("a")], 1.0) != [None])
    assert rig.pool.evict([key_of("a")]) == 1
    rig.engine.hold_sync.clear()
    assert outcome.reason() == "ok"
    assert write(rig.pool, key_of("b")) == "ok"
    assert rig.rows() == 1


def test_many_writes_share_a_commit(rig: Rig) -> None:
    rig.engine.hold_sync.set()
    outcomes = [rig.begin_write(key) for key, _ in chain("a", 64)]
    keys = [key for key, _ in chain("a", 64)]
    until(lambda: None not in rig.pool.lookup(keys, 1.0))
    before = rig.engine.syncs
    rig.engine.hold_sync.clear()
    assert [outcome.reason() for outcome in outcomes] == ["ok"] * 64
    assert rig.engine.syncs - before <= 3 and rig.rows() == 64


# --- wrong data ---


def test_stale_data_is_never_served(rig: Rig) -> None:
    """A drive that acknowledges writes it never does: another block lies there, or an older one of the same key."""
    old, other = key_of("old"), key_of("other")
    assert write(rig.pool, old) == "ok"
    at = next(iter(rig.engine.order[-1:]))
    assert rig.pool.evict([old]) == 1
    rig.engine.lose_writes = True
    assert write(rig.pool, other) == "ok" and rig.engine.order[-1] == at, "the same extent"
    assert read(rig.pool, other) == "checksum"
    assert write(rig.pool, old) == "ok" and rig.engine.order[-1] == at
    assert read(rig.pool, old) == "ok", "the same bytes of the same key: right"
    assert rig.pool.evict([old]) == 1
    changed, outcome = staged(old, 4096), Outcome()
    changed[100] ^= 1
    rig.pool.write(new_block(old), changed, 5.0, outcome)
    assert outcome.reason() == "ok" and rig.engine.order[-1] == at
    assert read(rig.pool, old) == "checksum", "an older version of the same key"


def test_a_slab_cut_while_it_is_open_fails_reads_and_serves_nothing_wrong(tmp_path: Path) -> None:
    path = tmp_path / "kv.slab"
    pool = open_local_pool([], [(path, 4 * MIB)])
    keys = [key for key, _ in chain("a", 8)]
    for key, parent in chain("a", 8):
        assert write(pool, key, parent, size_bytes=400_000) == "ok"
    with path.open("r+b") as slab:
        slab.truncate(2 * MIB + 512)
    outcomes = [read(pool, key, size_bytes=400_000) for key in keys]
    assert set(outcomes) <= {"ok", "device", "checksum", "missing"} and 3 <= outcomes.count("ok") < 8
    pool.close(5.0)


# --- fences and probes ---


def test_a_fenced_member_that_answers_again_is_used_again(rig: Rig, quick_probes: None) -> None:
    keys = [key for key, _ in chain("a", 8)]
    for key, parent in chain("a", 8):
        assert write(rig.pool, key, parent) == "ok"
    rig.engine.fail.add("read")
    assert [read(rig.pool, key) for key in keys[:4]] == ["device"] * 3 + ["missing"]
    assert rig.member.fenced is not None and not rig.healthy()
    assert write(rig.pool, key_of("b")) == "device"
    tries = len(rig.engine.order)
    until(lambda: rig.engine.order[tries:].count(0) >= 2)
    assert rig.member.fenced is not None, "probes that fail change nothing"
    rig.engine.fail.clear()
    until(lambda: rig.healthy() and rig.member.fenced is None)
    assert [read(rig.pool, key) for key in keys] == ["missing"] * 3 + ["ok"] * 5
    assert write(rig.pool, key_of("b")) == "ok"


def test_a_device_that_comes_back_with_another_header_stays_fenced(rig: Rig, quick_probes: None) -> None:
    assert write(rig.pool, key_of("a")) == "ok"
    rig.engine.fail.add("write")
    assert [write(rig.pool, key_of(i)) for i in range(3)] == ["device"] * 3
    rig.engine.fail.clear()
    with rig.path.open("r+b") as slab:
        slab.seek(20)
        slab.write(b"another!")
    tries = len(rig.engine.order)
    until(lambda: len(rig.engine.order) > tries + 1)
    assert rig.member.fenced is not None


def test_a_device_that_hangs_is_fenced_and_comes_back(
    rig: Rig, quick_probes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "STUCK_S", 0.1)
    keys = [key for key, _ in chain("a", 6)]
    for key, parent in chain("a", 6):
        assert write(rig.pool, key, parent) == "ok"
    rig.engine.hold.set()
    outcomes = [Outcome() for _ in keys]
    for key, outcome in zip(keys, outcomes, strict=True):
        rig.pool.read(key, 4096, aligned_buffer(4096), 0.15, outcome)
    assert [outcome.reason(5.0) for outcome in outcomes[2:]] in (["deadline"] * 4, ["device"] * 4)
    until(lambda: rig.member.fenced is not None)
    assert "has not answered" in str(rig.member.fenced) and not rig.healthy()
    rig.engine.hold.clear()
    assert [outcome.reason(5.0) for outcome in outcomes[:2]] == ["ok", "ok"]
    until(rig.healthy)
    assert read(rig.pool, keys[0]) == "ok"


def test_pauses_between_probes_grow_and_start_over_after_a_good_while() -> None:
    page = b"p" * HEADER_BYTES
    tried = probe.Probe(page)
    tried.fenced(100.0)
    assert not tried.due(100.9) and tried.due(101.0)
    at_s, pauses = 101.0, []
    for _ in range(8):
        work = tried.work(at_s)
        assert not tried.due(at_s + 1000.0), "one at a time"
        work.finish(work, PoolError("device", "no"))
        begin_s = at_s
        while not tried.due(at_s):
            at_s += 1.0
        pauses.append(at_s - begin_s)
    assert pauses == [2, 4, 8, 16, 32, 60, 60, 60] and not tried.answered
    work = tried.work(at_s)
    work.buffer[:] = page
    work.finish(work, None)
    assert tried.answered
    tried.unfenced(at_s)
    tried.fenced(at_s + 1.0)
    assert not tried.due(at_s + 60.0), "back so soon: the pause stays long"
    tried.unfenced(at_s + 100.0)
    tried.fenced(at_s + 200.0)
    assert tried.due(at_s + 201.0)


# --- the queue and what it shows ---


def test_loads_of_two_tenants_take_turns(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    try:
        blocks = []
        for tenant in (b"a" * 8, b"b" * 8):
            for i in range(6):
                key, outcome = key_of((tenant, i)), Outcome()
                new = new_block(key)
                new = type(new)(key, ROOT, 4096, new.position, tenant)
                rig.pool.write(new, staged(key, 4096), 10.0, outcome)
                assert outcome.reason() == "ok"
                blocks.append((key, rig.engine.order[-1]))
        rig.engine.hold.set()
        outcomes = [Outcome() for _ in range(14)]
        for (key, _), outcome in zip([blocks[0], blocks[0], *blocks], outcomes, strict=True):
            rig.pool.read(key, 4096, aligned_buffer(4096), 10.0, outcome)
        until(lambda: rig.member.queued() == (12, 0))
        begin = len(rig.engine.order)
        rig.engine.hold.clear()
        assert [outcome.reason() for outcome in outcomes] == ["ok"] * 14
        owner = {at: number // 6 for number, (_, at) in enumerate(blocks)}
        turns = [owner[at] for at in rig.engine.order[begin:]]
        assert all(abs(turns[:n].count(0) - turns[:n].count(1)) <= 2 for n in range(13)), turns
    finally:
        rig.pool.close(5.0)


def test_observed_counts_only_while_two_reads_are_under_way(rig: Rig) -> None:
    assert write(rig.pool, key_of("a"), size_bytes=MIB) == "ok"
    for _ in range(5):
        assert read(rig.pool, key_of("a"), size_bytes=MIB) == "ok"
    assert rig.member.observed() == (0, 0.0)
    outcomes = [Outcome() for _ in range(20)]
    for outcome in outcomes:
        rig.pool.read(key_of("a"), MIB, aligned_buffer(MIB), 10.0, outcome)
    assert [outcome.reason() for outcome in outcomes] == ["ok"] * 20
    moved, busy_s = rig.member.observed()
    assert 2 * MIB <= moved <= 20 * MIB and busy_s > 0


def test_work_put_while_the_worker_polls_wakes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With polls of an hour, only `wake` gets the second read to the device."""
    monkeypatch.setattr(device, "POLL_S", 3600.0)
    rig = Rig(tmp_path)
    assert [write(rig.pool, key_of("a")), write(rig.pool, key_of("b"))] == ["ok", "ok"]
    rig.engine.hold.set()
    outcomes = [Outcome(), Outcome()]
    for number, (name, outcome) in enumerate(zip("ab", outcomes, strict=True), 1):
        rig.pool.read(key_of(name), 4096, aligned_buffer(4096), 3600.0, outcome)
        until(lambda number=number: rig.engine.in_flight() == number)  # type: ignore[misc]
    rig.engine.hold.clear()
    rig.engine.wake()
    assert [outcome.reason() for outcome in outcomes] == ["ok", "ok"]
    rig.pool.close(5.0)


@pytest.mark.parametrize("prefer", ["uring", "threads"])
def test_every_engine_makes_a_member(tmp_path: Path, prefer: Literal["uring", "threads"]) -> None:
    path = tmp_path / "kv.slab"
    for round_ in range(2):
        engine = open_engine(path, 8 * MIB, 8, prefer)
        pool = LocalPool([open_device_member("ssd:0", str(path), engine, tmp_path / "kv.db")], [1.0])
        assert pool.stat(1.0).members[0].kind == engine.name
        for key, parent in chain("a", 20):
            assert (read(pool, key, 100_000) if round_ else write(pool, key, parent, 100_000)) == "ok"
        pool.close(5.0)


def test_bandwidth_is_measured_in_free_space_only(tmp_path: Path) -> None:
    slab = [(tmp_path / "kv.slab", 16 * MIB)]
    pool = open_local_pool([], slab)
    for key, parent in chain("a", 5):
        assert write(pool, key, parent, size_bytes=MIB) == "ok"
    assert pool.evict([key for key, _ in chain("a", 5)][1:4:2]) == 2
    pool.close(5.0)
    one = open_slab_member("ssd:0", slab[0][0], slab[0][1], None, 8)
    assert one.measure("write", 2 * MIB, 0.05) > 0 and one.measure("read", 2 * MIB, 0.05) > 0
    with pytest.raises(PoolError, match="full"):
        one.measure("write", 64 * MIB, 0.05)
    one.close(5.0)
    pool = open_local_pool([], slab)
    assert [read(pool, key, size_bytes=MIB) for key, _ in chain("a", 5)].count("ok") == 3
    pool.close(5.0)


# --- opening ---


def test_what_is_on_the_device_is_refused_through_the_engine_and_the_engine_closed(tmp_path: Path) -> None:
    path = tmp_path / "letters"
    path.write_bytes(b"dear all".ljust(MIB, b"."))
    engine = FaultyEngine(open_engine(path, MIB, 8))
    with pytest.raises(SlabRefused, match="letters holds something that is not a Penstock slab"):
        open_device_member("ssd:0", str(path), engine, tmp_path / "kv.db")
    assert engine.closed and path.read_bytes()[:8] == b"dear all"


def test_a_device_that_fails_at_the_header_is_one_error(tmp_path: Path) -> None:
    engine = FaultyEngine(open_engine(tmp_path / "kv.slab", MIB, 8))
    engine.fail.add("read")
    with pytest.raises(OSError, match="injected"):
        open_device_member("ssd:0", "/dev/x", engine, tmp_path / "kv.db")
    assert engine.closed


@pytest.fixture
def loop_device(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A block device of 8 MiB over a file."""
    if os.geteuid() != 0 or shutil.which("losetup") is None:
        pytest.skip("loop devices need root and losetup")
    backing = tmp_path / "backing"
    backing.write_bytes(bytes(8 * MIB))
    made = subprocess.run(["losetup", "-f", "--show", str(backing)], capture_output=True, text=True)
    if made.returncode != 0:
        pytest.skip(f"no loop device: {made.stderr.strip()}")
    name = made.stdout.strip()
    yield name, backing
    subprocess.run(["losetup", "-d", name], check=False)


def test_a_block_device_keeps_its_blocks_and_says_when_it_shrank(loop_device: tuple[str, Path], tmp_path: Path) -> None:
    name, backing = loop_device
    table = tmp_path / "kv.db"

    def opened(capacity: int) -> tuple[LocalPool, DeviceMember]:
        one = open_slab_member("ssd:0", Path(name), capacity, table, 8)
        return LocalPool([one], [1.0]), one

    pool, _ = opened(8 * MIB)
    keys = [key for key, _ in chain("a", 6)]
    for key, parent in chain("a", 6):
        assert write(pool, key, parent, size_bytes=MIB) == "ok"
    pool.close(5.0)
    with backing.open("r+b") as file:
        file.truncate(4 * MIB)
    subprocess.run(["losetup", "-c", name], check=True)
    with pytest.raises(OSError, match="the device has 4194304 bytes, fewer than the capacity of 8388608"):
        opened(8 * MIB)
    pool, one = opened(4 * MIB)
    assert one.notes and "was cut to 4194304 bytes: 3 of 6 blocks dropped" in " ".join(one.notes)
    assert sorted(read(pool, key, size_bytes=MIB) for key in keys) == ["missing"] * 3 + ["ok"] * 3
    pool.close(5.0)


AS_NOBODY = """
import os, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from penstock.pool.setup.open import open_local_pool
open_local_pool([], [(Path(sys.argv[2] + ".own"), 1 << 20)]).close(5.0)  # all modules are there now
os.setgroups([]); os.setgid(65534); os.setuid(65534)
try:
    open_local_pool([], [(Path(sys.argv[2]), 1 << 20)])
except OSError as error:
    print(f"{error.strerror or error}: {error.filename}")
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
def test_the_slab_of_another_user_is_refused_in_one_line(folder_for_others: Path) -> None:
    path = folder_for_others / "kv.slab"
    open_local_pool([], [(path, MIB)]).close(5.0)
    script = [sys.executable, "-c", AS_NOBODY, str(Path(__file__).parents[3]), str(path)]

    def refusal() -> str:
        ended = subprocess.run(script, capture_output=True, text=True, timeout=30.0, cwd="/")
        assert not ended.stderr and ended.stdout.count("\n") == 1, ended
        return ended.stdout

    assert "permission" in refusal().lower()
    path.chmod(0o666)
    assert "others have access to it (mode 666)" in refusal()
    os.chown(path, 0, 65534)
    path.chmod(0o660)  # as root lends a slab to the group of a service
    assert "kv.slab.db cannot be opened" in refusal()


def test_a_table_on_a_full_disk_refuses_stores_until_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    commit, commits = Journal._commit, list[object]()  # noqa: SLF001 (how often it tries)
    monkeypatch.setattr(Journal, "_commit", lambda self, batch: (commits.append(batch), commit(self, batch))[1])
    monkeypatch.setattr(journal, "RETRY_S", 0.01)
    small = tmp_path / "small"
    small.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(small)], capture_output=True)
    if made.returncode != 0:
        pytest.skip(f"no file system of its own for the test: {made.stderr.decode().strip()}")
    try:
        pool = open_local_pool([], [(tmp_path / "kv.slab", 4 * MIB)], state=small)
        assert write(pool, key_of("a")) == "ok"
        with contextlib.suppress(OSError), (small / "ballast").open("wb", buffering=0) as ballast:
            while ballast.write(bytes(4096)):
                pass
        names = iter(range(100_000))
        until(lambda: write(pool, key_of(("b", next(names)))) == "device")
        tried = len(commits)
        until(lambda: len(commits) > tried + 5)
        assert write(pool, key_of(("b", next(names)))) == "device" and pool.stat(1.0).members[0].used_bytes
        assert caplog.text.count("nothing is stored there meanwhile") == 1, "it was full all the time"
        assert read(pool, key_of("a")) == "ok"
        (small / "ballast").unlink()
        until(lambda: write(pool, key_of(("c", next(names)))) == "ok")
        pool.close(5.0)
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_close_ends_writes_that_wait_for_a_hanging_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(tmp_path)
    monkeypatch.setattr(device, "JOURNAL_CLOSE_S", 0.2)
    rig.engine.hold_sync.set()
    outcome = rig.begin_write(key_of("a"), timeout_s=60.0)
    until(lambda: rig.pool.lookup([key_of("a")], 1.0) != [None])
    rig.pool.close(0.2)
    assert outcome.reason() == "closed" and not rig.engine.closed, "a sync still uses it"
    rig.engine.hold_sync.clear()
    rig.engine.close(5.0)
    assert rig.rows() in (0, 1)


def test_a_store_computes_the_checksum_of_exactly_its_bytes(rig: Rig) -> None:
    """Padding past the block's size is stored and never verified."""
    key, outcome = key_of("odd"), Outcome()
    data = aligned_buffer(staging_bytes(5000))
    data[:5000] = block_bytes(key, 5000)
    data[5000:] = b"\xff" * (len(data) - 5000)
    rig.pool.write(new_block(key, size_bytes=5000), data, 5.0, outcome)
    assert outcome.reason() == "ok" and read(rig.pool, key, size_bytes=5000) == "ok"


def test_loads_after_the_deadline_and_into_short_buffers_end_at_once(rig: Rig) -> None:
    assert write(rig.pool, key_of("a")) == "ok"
    ends: list[PoolError | None] = []
    block = Block(key_of("a"), ROOT, 0, HEADER_BYTES, 8192, 0)
    for buffer, deadline_s in ((aligned_buffer(8192), 0.0), (aligned_buffer(4096), time.monotonic() + 5.0)):
        rig.member.put(Work("load", block, buffer, deadline_s, lambda work, error: ends.append(error)))
    until(lambda: len(ends) == 2)
    assert [end.reason if end else None for end in ends] == ["deadline", "layout"]


class Batches(FaultyEngine):
    """Notes how many operations come together. `broken`: they are refused, for no reason of their own."""

    def __init__(self, inner: BlockEngine) -> None:
        super().__init__(inner, depth=inner.depth)
        self.batches: list[int] = []
        self.broken = False

    def submit(self, ops: Sequence[IoOp]) -> None:
        self.batches.append(len(ops))
        if self.broken and len(self.batches) == 1:
            raise RuntimeError("injected")
        self.inner.submit(ops)


@pytest.mark.parametrize("fault", ["none", "one is wrong", "the engine breaks"])
def test_loads_that_wait_are_given_to_the_engine_together_and_each_ends(fault: str, tmp_path: Path) -> None:
    path, loads = tmp_path / "kv.slab", 4 * device.LOADS_TOGETHER
    engine = Batches(open_engine(path, 4 * MIB, 64))
    one = open_device_member("ssd:0", str(path), engine, tmp_path / "kv.db")
    engine.batches.clear()
    engine.broken = fault == "the engine breaks"
    ends: dict[int, str] = {}

    def ended(work: Work, error: PoolError | None) -> None:
        assert work.block.offset not in ends
        ends[work.block.offset] = error.reason if error else "ok"

    offsets = [HEADER_BYTES + 4096 * number for number in range(loads)]
    wrong = 8 * MIB if fault == "one is wrong" else None
    for at in offsets if wrong is None else [*offsets[:3], wrong, *offsets[3:-1]]:
        block = Block(key_of(at), ROOT, 0, at, 4096, 0)
        assert one.put(Work("load", block, aligned_buffer(4096), time.monotonic() + 60.0, ended)) is None
    one.start()
    until(lambda: len(ends) == loads)
    one.close(5.0)
    together = device.LOADS_TOGETHER
    if fault == "none":
        assert set(ends.values()) == {"ok"} and engine.batches == [together] * 4
    elif fault == "one is wrong":
        assert ends.pop(8 * MIB) == "layout" and set(ends.values()) == {"ok"}
        assert engine.batches == [together, *[1] * together, *[together] * 3]
    else:
        assert set(ends.values()) == {"device"} and engine.batches[0] == together
