"""Threads of the pool: none ends by an exception without a word, and what waits behind one ends, or goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from penstock.io.api import IoCompletion, IoOp
from penstock.io.memory import aligned_buffer
from penstock.io.open import open_engine
from penstock.pool import callbacks
from penstock.pool.api import PoolError
from penstock.pool.block import Block
from penstock.pool.callbacks import call_soon, callback_worker
from penstock.pool.checksum import block_checksum
from penstock.pool.local import drain
from penstock.pool.local.local_pool import LocalPool
from penstock.pool.local.write_span import Stored, WriteSpan
from penstock.pool.local.writes import Writes
from penstock.pool.losses import losses
from penstock.pool.members import probe
from penstock.pool.members.device import open_device_member
from penstock.pool.members.journal import Journal
from penstock.pool.members.memory import MemoryMember
from penstock.pool.members.slab_index import RowTable
from penstock.pool.members.work import Work
from penstock.pool.setup.open import open_local_pool
from penstock.pool.union import children
from penstock.pool.union.children import Children
from penstock.pool.union.union_pool import UnionPool
from penstock.process import guarded_thread
from penstock.process.guarded_thread import thread_failures
from tests.pool.faulty_engine import FaultyEngine
from tests.pool.helpers import Outcome, chain, key_of, member, new_block, read, staged, until, write

MIB = 1 << 20
WAIT_S = 30.0


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guarded_thread, "RESTART_PAUSE_S", 0.01)
    monkeypatch.setattr(probe, "FIRST_PAUSE_S", 0.05)
    monkeypatch.setattr(probe, "PAUSE_S_MAX", 0.2)


class Rig:
    """One slab member on an engine that fails as a test says, and the pool of it."""

    def __init__(self, folder: Path) -> None:
        self.engine = FaultyEngine(open_engine(folder / "kv.slab", 4 * MIB, 8))
        self.member = open_device_member("ssd:0", str(folder / "kv.slab"), self.engine, folder / "kv.db")
        self.pool = LocalPool([self.member], [1.0])


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path)
    yield made
    made.engine.hold.clear()
    made.pool.check_integrity()
    made.pool.close(10.0)


def once(real: Callable[..., Any], times: int = 1, error: type[Exception] = ZeroDivisionError) -> Callable[..., Any]:
    """Raises so often, then is `real`."""
    left = [times]

    def call(*arguments: Any, **more: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise error("as planned")
        return real(*arguments, **more)

    return call


def broken(*_: object) -> None:
    raise KeyError("as planned")


def work(kind: Any, size: int, finish: Callable[[Work, PoolError | None], None], timeout_s: float = 30.0) -> Work:
    block = Block(b"k" * 16, b"p" * 16, 0, 4096, size, 0)
    return Work(kind, block, aligned_buffer(size), time.monotonic() + timeout_s, finish)


@pytest.mark.parametrize("kind", ["load", "store"])
def test_a_memory_member_outlives_callbacks_that_raise(kind: str) -> None:
    one = MemoryMember("memory:0", MIB)
    one.start()
    before = thread_failures().get("penstock-work-callback", 0)
    for timeout_s in (30.0, -1.0):  # done, and late
        assert one.put(work(kind, 4096, broken, timeout_s)) is None
    ended = Outcome()
    assert one.put(work(kind, 4096, lambda _, error: ended(error))) is None
    assert ended.reason(WAIT_S) == "ok"
    assert thread_failures()["penstock-work-callback"] == before + 2
    one.close(5.0)


def test_a_copy_that_fails_ends_its_own_load(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = open_local_pool([MIB], [])
    assert write(pool, key_of("a")) == "ok"
    one = pool.members[0]
    assert isinstance(one, MemoryMember)
    monkeypatch.setattr(one, "_take_turn", once(one._take_turn))  # noqa: SLF001 (a fault is put in here)
    assert read(pool, key_of("a")) == "device"
    assert member(pool.stat(1.0), "memory:0").errors == 1
    assert write(pool, key_of("a")) == read(pool, key_of("a")) == "ok"
    pool.check_integrity()
    pool.close(5.0)


def test_a_device_member_outlives_callbacks_that_raise(rig: Rig) -> None:
    for _ in range(4):
        assert rig.member.put(work("load", 4096, broken)) is None
    assert write(rig.pool, key_of("a")) == read(rig.pool, key_of("a")) == "ok"
    assert rig.member.fenced is None


@pytest.mark.parametrize("call", ["poll", "submit"])
def test_a_device_members_loop_that_raises_is_fenced_and_comes_back(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    assert write(rig.pool, key_of("a")) == "ok"
    before = thread_failures().get("penstock-device-member", 0)
    monkeypatch.setattr(rig.engine, call, once(getattr(rig.engine, call)))
    outcomes = [Outcome() for _ in range(8)]
    for outcome in outcomes:
        rig.pool.read(key_of("a"), 4096, aligned_buffer(4096), 20.0, outcome)
    assert {outcome.reason(WAIT_S) for outcome in outcomes} <= {"ok", "device", "missing"}
    assert thread_failures()["penstock-device-member"] == before + 1
    until(lambda: rig.member.fenced is None, WAIT_S)
    until(lambda: write(rig.pool, key_of("a")) == "ok", WAIT_S)
    assert read(rig.pool, key_of("a")) == "ok"


def test_completions_behind_one_that_fails_are_not_lost(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker looks at several completions of one poll, and the first of them raises."""
    keys = [key for key, _ in chain("a", 2)]
    for key, parent in chain("a", 2):
        assert write(rig.pool, key, parent) == "ok"
    rig.engine.hold.set()
    outcomes = [Outcome() for _ in keys]
    for key, outcome in zip(keys, outcomes, strict=True):
        rig.pool.read(key, 4096, aligned_buffer(4096), 20.0, outcome)
    until(lambda: rig.engine.in_flight() == 2, WAIT_S)
    monkeypatch.setattr(rig.member, "_failed", once(rig.member._failed))  # noqa: SLF001 (a fault is put in here)
    rig.engine.fail_held(1)
    rig.engine.hold.clear()
    rig.engine.wake()
    assert [outcome.reason(WAIT_S) for outcome in outcomes] == ["device", "ok"]


def test_a_journal_that_raises_loses_what_is_under_way_and_goes_on(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    assert write(rig.pool, key_of("old")) == "ok"
    monkeypatch.setattr(Journal, "_commit", once(Journal._commit))  # noqa: SLF001 (a fault is put in here)
    assert write(rig.pool, key_of("a")) == "device"
    assert rig.pool.lookup([key_of("a")], 1.0) == [None], "what has no row is not there"
    until(lambda: rig.member.refuses_stores is None, WAIT_S)
    assert write(rig.pool, key_of("b")) == "ok"
    assert read(rig.pool, key_of("old")) == read(rig.pool, key_of("b")) == "ok"


def test_deletions_outlive_a_journal_that_raises(rig: Rig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Otherwise the row of a block that is gone would name an extent that another block has by then."""
    assert write(rig.pool, key_of("gone")) == "ok"
    monkeypatch.setattr(Journal, "_commit", once(Journal._commit))  # noqa: SLF001 (a fault is put in here)
    assert rig.pool.evict([key_of("gone")]) == 1
    until(lambda: write(rig.pool, key_of("new")) == "ok", WAIT_S)
    rig.pool.close(10.0)
    table = RowTable(tmp_path / "kv.db")
    assert {block.key for block, _ in table.rows()[0]} == {key_of("new")}
    table.close()


def test_a_row_that_is_refused_costs_its_own_write_only(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a NaN in a row did before it was refused at the door: here it is put in behind that."""
    real = Writes._stored_many  # noqa: SLF001 (a fault is put in here)

    def stored_many(self: Writes, deadline_s: float, span: WriteSpan, stored: Stored) -> None:
        for _, block, _ in stored:
            if block.key == key_of("bad"):
                block.rebuild_s = float("nan")
        real(self, deadline_s, span, stored)

    monkeypatch.setattr(Writes, "_stored_many", stored_many)
    before = losses().get("row_refused", 0)
    outcomes = {name: Outcome() for name in ("a", "b", "bad", "c", "d")}
    for name, outcome in outcomes.items():
        rig.pool.write(new_block(key_of(name)), staged(key_of(name), 4096), 20.0, outcome)
    ends = {name: outcome.reason(WAIT_S) for name, outcome in outcomes.items()}
    assert ends == {"a": "ok", "b": "ok", "bad": "device", "c": "ok", "d": "ok"}
    assert losses()["row_refused"] == before + 1
    assert read(rig.pool, key_of("bad")) == "missing" and read(rig.pool, key_of("d")) == "ok"
    assert rig.member.refuses_stores is None


def test_a_drain_goes_on_after_a_block_that_it_could_not_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = open_local_pool([MIB, 4 * MIB], [], weights=[1.0, 1.0])
    for key, parent in chain("a", 40):
        assert write(pool, key, parent) == "ok"
    monkeypatch.setattr(drain, "block_checksum", once(block_checksum, 3))
    monkeypatch.setattr(drain.Drain, "_pass", once(drain.Drain._pass))  # noqa: SLF001 (a fault is put in here)
    pool.drain_member("memory:0")
    until(lambda: [m.name for m in pool.stat(1.0).members] == ["memory:1"], WAIT_S)
    found = [hit is not None for hit in pool.lookup([key for key, _ in chain("a", 40)], 1.0)]
    assert found.count(False) == 3 and pool.stat(1.0).moved_blocks > 5
    pool.check_integrity()
    pool.close(5.0)


def test_a_union_goes_on_looking_after_its_children(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "LOOK_EVERY_S", 0.01)
    union = UnionPool(open_local_pool([MIB], [], weights=[1e9]), [])
    looked = threading.Event()
    real = Children._update  # noqa: SLF001 (a fault is put in here)

    def look(self: Children) -> None:
        real(self)
        looked.set()

    before = thread_failures().get("penstock-union", 0)
    monkeypatch.setattr(Children, "_update", once(look, 2))
    assert looked.wait(WAIT_S) and thread_failures()["penstock-union"] == before + 2
    union.close(5.0)


def test_callbacks_that_raise_or_find_no_room_are_called_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callbacks, "WAITING_MAX", 2)
    worker = callback_worker()
    started, go_on = threading.Event(), threading.Event()

    def hold(_: PoolError | None) -> None:
        started.set()
        go_on.wait(WAIT_S)

    call_soon(worker, hold, None)
    assert started.wait(WAIT_S)
    ends = [Outcome() for _ in range(3)]
    call_soon(worker, broken, None)
    for end in ends:
        call_soon(worker, end, PoolError("full", "as planned"))
    assert ends[2].reason(WAIT_S) == "full", "at once, because no more wait"
    go_on.set()
    assert [end.reason(WAIT_S) for end in ends[:2]] == ["full"] * 2
    worker.close(5.0)
    late = Outcome()
    call_soon(worker, late, None)
    assert late.reason() == "ok"


def test_an_io_thread_outlives_a_buffer_that_was_released(tmp_path: Path) -> None:
    engine: Any = open_engine(tmp_path / "kv.slab", MIB, 1, prefer="threads")
    pages = [aligned_buffer(4096) for _ in range(2)]
    op = IoOp("write", 0, pages[0], "released")
    real = engine._move  # noqa: SLF001 (a fault is put in here)

    def move(op: IoOp) -> OSError | None:
        if op.tag == "released":
            op.buffer.release()
        failed: OSError | None = real(op)
        return failed

    engine._move = move  # noqa: SLF001 (a fault is put in here)
    engine.submit([op])
    ended: list[IoCompletion] = []
    until(lambda: bool(ended.extend(engine.poll(0.1)) or ended), WAIT_S)
    assert ended[0].tag == "released" and isinstance(ended[0].error, OSError)
    engine.submit([IoOp("write", 0, pages[1], "next")])
    until(lambda: bool(ended.extend(engine.poll(0.1)) or len(ended) > 1), WAIT_S)
    assert ended[1].tag == "next" and ended[1].error is None
    engine.close(5.0)
