"""The contract of `penstock.io.api.BlockEngine`, over every engine and kind of device."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest

from penstock.io import IoOp, QueueFull, aligned_buffer, open_engine
from penstock.io.ring_engine import RingEngine
from tests.io.block_io import drain, run

if TYPE_CHECKING:
    from tests.io.conftest import Held, OpenOne

MIB = 1 << 20
PAGE = 4096


@pytest.mark.slow
def test_what_is_written_is_read_back_in_pieces(engine_of: OpenOne) -> None:
    engine = engine_of(16 * MIB, 4)
    length = 5 * MIB + PAGE
    source, target = aligned_buffer(length), aligned_buffer(length)
    source[:] = os.urandom(length)
    assert run(engine, IoOp("write", 3 * PAGE, source, "w")) == {"w": None}
    engine.sync()
    assert run(engine, IoOp("read", 3 * PAGE, target, "r")) == {"r": None}
    assert target == source


def test_the_last_block_of_the_device_is_usable(engine_of: OpenOne) -> None:
    engine = engine_of(MIB, 1)
    source, target = aligned_buffer(PAGE), aligned_buffer(PAGE)
    source[:] = os.urandom(PAGE)
    assert run(engine, IoOp("write", MIB - PAGE, source, 1)) == {1: None}
    assert run(engine, IoOp("read", MIB - PAGE, target, 2)) == {2: None}
    assert target == source


def test_registered_memory_and_memory_beside_it(engine_of: OpenOne) -> None:
    """Registration in several regions; operations inside one, across two, and half outside."""
    engine = engine_of(16 * MIB, 8)
    if isinstance(engine, RingEngine):
        engine.region_bytes = min(engine.region_bytes, MIB)
    memory = aligned_buffer(8 * MIB)
    engine.register(memory[PAGE : 2 * MIB + PAGE])
    engine.register(memory[4 * MIB : 5 * MIB])
    engine.register(memory[4 * MIB : 5 * MIB])  # again: nothing to do
    engine.register(memory[MIB : 4 * MIB])  # fills the gap
    memory[:] = os.urandom(len(memory))
    before = bytes(memory)
    ops = [IoOp("write", at, memory[at : at + length], at) for at, length in ((0, 3 * MIB), (3 * MIB, 5 * MIB))]
    assert set(run(engine, *ops).values()) == {None}
    memory[:] = bytes(len(memory))
    ops = [IoOp("read", at, memory[at : at + MIB], at) for at in range(0, 8 * MIB, MIB)]
    assert set(run(engine, *ops).values()) == {None}
    assert memory == before
    assert not isinstance(engine, RingEngine) or not [note for note in engine.notes if "register" in note]


def test_registering_odd_addresses(engine_of: OpenOne) -> None:
    engine = engine_of(MIB, 1)
    memory = aligned_buffer(4 * PAGE)
    engine.register(memory[100:200])  # holds no aligned page
    engine.register(memory[100 : 3 * PAGE + 7])
    assert run(engine, IoOp("write", 0, memory, 1)) == {1: None}


def test_write_from_read_only_memory(engine_of: OpenOne) -> None:
    engine = engine_of(MIB, 1)
    source, target = aligned_buffer(PAGE), aligned_buffer(PAGE)
    source[:] = os.urandom(PAGE)
    assert run(engine, IoOp("write", 0, source.toreadonly(), 1)) == {1: None}
    assert run(engine, IoOp("read", 0, target, 2)) == {2: None}
    assert target == source


@pytest.mark.parametrize(
    ("kind", "offset", "start", "end", "message"),
    [
        ("read", 512, 0, PAGE, "multiples of 4096"),
        ("read", 0, 0, PAGE - 1, "multiples of 4096"),
        ("write", 0, 512, PAGE + 512, "multiples of 4096"),
        ("read", MIB, 0, PAGE, "ends at 1048576"),
        ("read", MIB - PAGE, 0, 2 * PAGE, "ends at 1048576"),
        ("write", -PAGE, 0, PAGE, "ends at 1048576"),
        ("read", 0, 0, 0, "buffer of 0 bytes"),
        ("erase", 0, 0, PAGE, "'read' or 'write'"),
    ],
)
def test_a_bad_operation_starts_nothing(
    engine_of: OpenOne, kind: Any, offset: int, start: int, end: int, message: str
) -> None:
    engine = engine_of(MIB, 4)
    memory = aligned_buffer(2 * PAGE)
    good = aligned_buffer(PAGE)
    good[:] = b"x" * PAGE
    with pytest.raises(ValueError, match=message):
        engine.submit([IoOp("write", 0, good, "good"), IoOp(kind, offset, memory[start:end], "bad")])
    assert engine.in_flight() == 0 and engine.poll(0) == []
    target = aligned_buffer(PAGE)
    assert run(engine, IoOp("read", 0, target, "r")) == {"r": None}
    assert target == bytes(PAGE)


def test_bad_buffers_are_refused(engine_of: OpenOne) -> None:
    engine = engine_of(MIB, 4)
    memory = aligned_buffer(2 * PAGE)
    for buffer in (memory.toreadonly()[:PAGE], memory[::2], memory.cast("I")[:1024]):
        with pytest.raises(ValueError):
            engine.submit([IoOp("read", 0, buffer, 1)])
    assert engine.in_flight() == 0


def test_full_queue_starts_nothing(engine_of: OpenOne) -> None:
    engine = engine_of(MIB, 4)
    memory = aligned_buffer(8 * PAGE)
    memory[:] = b"x" * len(memory)
    ops = [IoOp("write", n * PAGE, memory[n * PAGE : (n + 1) * PAGE], n) for n in range(8)]
    with pytest.raises(QueueFull, match="depth is 4"):
        engine.submit(ops[:5])
    assert engine.in_flight() == 0
    engine.submit(ops[:3])
    with pytest.raises(QueueFull):
        engine.submit(ops[3:5])
    assert engine.in_flight() == 3
    engine.submit(ops[3:4])
    assert {done.tag for done in drain(engine)} == {0, 1, 2, 3}
    target = aligned_buffer(PAGE)
    assert run(engine, IoOp("read", 4 * PAGE, target, "r")) == {"r": None}
    assert target == bytes(PAGE)


def test_more_pieces_than_the_rings_hold(engine_of: OpenOne) -> None:
    engine = engine_of(64 * MIB, 64)
    if isinstance(engine, RingEngine):
        engine.piece_bytes = 64 << 10  # 1024 pieces in all, four times what goes out at once
    memory = aligned_buffer(64 * MIB)
    engine.register(memory[: 32 * MIB])
    pattern = os.urandom(MIB - 1)
    for at in range(0, len(memory), MIB):
        memory[at : at + MIB] = bytes([at // MIB]) + pattern
    ops = [IoOp("write", at, memory[at : at + MIB], at) for at in range(0, len(memory), MIB)]
    assert set(run(engine, *ops).values()) == {None}
    memory[:] = bytes(len(memory))
    ops = [IoOp("read", at, memory[at : at + MIB], at) for at in range(0, len(memory), MIB)]
    assert set(run(engine, *ops).values()) == {None}
    assert all(memory[at : at + MIB] == bytes([at // MIB]) + pattern for at in range(0, len(memory), MIB))


def test_poll_without_work_returns_at_once(engine_of: OpenOne) -> None:
    engine = engine_of(MIB, 1)
    assert engine.poll(0) == []
    assert engine.poll(60) == []


def test_close_waits_for_operations_in_flight(engine_of: OpenOne) -> None:
    engine = engine_of(8 * MIB, 8)
    memory = aligned_buffer(8 * MIB)
    engine.register(memory)
    engine.submit([IoOp("write", at, memory[at : at + MIB], at) for at in range(0, 8 * MIB, MIB)])
    engine.close(20)
    assert {done.tag: done.error for done in engine.poll(0)} == dict.fromkeys(range(0, 8 * MIB, MIB))
    assert engine.in_flight() == 0 and engine.poll(1) == []
    engine.close(0)
    calls: list[Callable[[], None]] = [lambda: engine.submit([]), lambda: engine.register(memory), engine.sync]
    for call in calls:
        with pytest.raises(ValueError, match="is closed"):
            call()


@pytest.mark.slow
def test_ten_thousand_random_operations_against_a_model(engine_of: OpenOne) -> None:
    rng = random.Random(1)
    pages, depth, operations = 2048, 32, 10_000
    engine = engine_of(pages * PAGE, depth)
    model = bytearray(pages * PAGE)
    noise = os.urandom(MIB)
    memory = aligned_buffer(depth * 16 * PAGE)
    engine.register(memory[: len(memory) // 2])
    slots = [memory[n * 16 * PAGE : (n + 1) * 16 * PAGE] for n in range(depth)]
    free = list(range(depth))
    busy: dict[int, tuple[Literal["read", "write"], int, int]] = {}  # slot -> kind, first page, pages
    started = 0
    while started < operations or busy:
        batch = []
        while free and started < operations:
            length = rng.choice((1, 1, 1, 2, 5, 16))
            page = rng.randrange(pages - length)
            if any(page < first + count and first < page + length for _, first, count in busy.values()):
                break  # the engine promises no order between overlapping operations
            slot = free.pop()
            kind: Literal["read", "write"] = rng.choice(("read", "write"))
            view = slots[slot][: length * PAGE]
            if kind == "write":
                at = rng.randrange(len(noise) - len(view))
                view[:] = model[page * PAGE : (page + length) * PAGE] = noise[at : at + len(view)]
            busy[slot] = (kind, page, length)
            batch.append(IoOp(kind, page * PAGE, view, slot))
            started += 1
        engine.submit(batch)
        assert engine.in_flight() == len(busy)
        for done in engine.poll(20):
            assert done.error is None
            kind, page, length = busy.pop(done.tag)
            if kind == "read":
                assert slots[done.tag][: length * PAGE] == model[page * PAGE : (page + length) * PAGE]
            free.append(done.tag)


@pytest.mark.parametrize("prefer", ["uring", "threads"])
@pytest.mark.parametrize("left_bytes", [0, MIB, MIB + PAGE // 2])
def test_a_device_cut_short_is_an_error(
    prefer: Literal["uring", "threads"], left_bytes: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if prefer == "uring":
        request.getfixturevalue("skip_without_uring")
    engine = open_engine(tmp_path / "slab", 4 * MIB, 4, prefer)
    memory = aligned_buffer(2 * MIB)
    os.truncate(tmp_path / "slab", left_bytes)
    outcome = run(engine, IoOp("read", 0, memory, "cut"), IoOp("read", 2 * MIB, memory, "gone"))
    for error in outcome.values():
        assert error is not None and error.errno == errno.EIO
        assert "slab" in str(error) and "moved only" in str(error)
    engine.close(1)


@pytest.mark.parametrize("prefer", ["uring", "threads"])
def test_one_failing_piece_fails_the_operation_once(
    prefer: Literal["uring", "threads"], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if prefer == "uring":
        request.getfixturevalue("skip_without_uring")
    engine = open_engine(tmp_path / "slab", 64 * MIB, 2, prefer)
    if isinstance(engine, RingEngine):
        engine.piece_bytes = 64 << 10  # the first of many pieces fails while later ones wait for room
    memory = aligned_buffer(64 * MIB)
    os.truncate(tmp_path / "slab", 32 << 10)
    outcome = run(engine, IoOp("read", 0, memory, "bad"))
    assert isinstance(outcome["bad"], OSError) and engine.in_flight() == 0
    assert run(engine, IoOp("read", 0, memory[:PAGE], "good")) == {"good": None}
    engine.close(1)


class _CountedQueue(deque[Any]):
    """Counts the operations that are looked at to find one of them."""

    looks = 0

    def __contains__(self, one: object) -> bool:
        _CountedQueue.looks += len(self)
        return super().__contains__(one)

    def remove(self, one: Any) -> None:
        _CountedQueue.looks += len(self)
        super().remove(one)


def test_an_operation_that_fails_costs_the_same_however_many_wait(
    skip_without_uring: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock.io.ring_engine.deque", _CountedQueue)
    monkeypatch.setattr(_CountedQueue, "looks", 0)
    engine = open_engine(tmp_path / "slab", 64 * MIB, 64, "uring")
    assert isinstance(engine, RingEngine)
    engine.piece_bytes = PAGE  # so that each operation has more pieces than go out at once
    memory = aligned_buffer(8 * MIB)
    os.truncate(tmp_path / "slab", 0)
    outcome = run(engine, *(IoOp("read", 0, memory, number) for number in range(64)))
    assert all(isinstance(error, OSError) for error in outcome.values()) and len(outcome) == 64
    assert _CountedQueue.looks <= 64 and engine.in_flight() == 0
    engine.close(1)


@pytest.mark.slow
def test_close_gives_up_on_a_dead_device(held: Held) -> None:
    held.write("stuck")
    assert held.engine.poll(0.05) == []
    with pytest.raises(TimeoutError, match="1 operations"):
        held.engine.close(0.05)
    assert held.engine.in_flight() == 1
    held.release()
    held.engine.close(30)
    assert [(done.tag, done.error) for done in held.engine.poll(0)] == [("stuck", None)]


@pytest.mark.slow
def test_wake_ends_a_poll_that_would_wait(held: Held) -> None:
    """The operation is of many pieces: a wait for all of them ends too."""
    engine = held.engine
    if isinstance(engine, RingEngine):
        engine.piece_bytes = 128 << 10
    held.write("stuck")
    engine.wake()
    engine.wake()
    assert engine.poll(60) == []
    assert engine.poll(0.01) == []  # both calls were one, and it is used up
    for _ in range(5):
        thread = threading.Thread(target=engine.wake)
        thread.start()
        assert engine.poll(60) == []
        thread.join()
    assert engine.in_flight() == 1
    held.release()
    assert [done.error for done in drain(engine, 30)] == [None]


def test_wake_without_work_and_after_close(engine_of: OpenOne) -> None:
    engine = engine_of(MIB, 1)
    engine.wake()
    assert engine.poll(60) == []
    memory = aligned_buffer(PAGE)
    assert run(engine, IoOp("write", 0, memory, 1)) == {1: None}
    engine.wake()
    engine.close(10)
    engine.wake()


def test_sync_and_wake_from_other_threads_during_operations(engine_of: OpenOne) -> None:
    engine = engine_of(4 * MIB, 16)
    memory = aligned_buffer(16 * PAGE)
    ending = threading.Event()
    failed: list[Exception] = []

    def repeat(call: Callable[[], None]) -> None:
        while not ending.wait(0.0005):
            try:
                call()
            except Exception as error:  # noqa: BLE001 (the test asserts on it)
                failed.append(error)
                return

    threads = [threading.Thread(target=repeat, args=(call,)) for call in (engine.sync, engine.wake)]
    for thread in threads:
        thread.start()
    done = started = 0
    while done < 500:
        while engine.in_flight() < 16 and started < 500:
            slot = started % 16 * PAGE
            engine.submit([IoOp("write", slot, memory[slot : slot + PAGE], started)])
            started += 1
        for completion in engine.poll(20):
            assert completion.error is None
            done += 1
    ending.set()
    for thread in threads:
        thread.join(20)
    assert failed == [] and engine.in_flight() == 0
