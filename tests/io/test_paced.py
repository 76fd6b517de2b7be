"""`PacedEngine`: the contract of the engine inside, never faster than its device, one operation at a time per clock."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.io import BlockEngine, IoOp, QueueFull, aligned_buffer, open_engine
from penstock.io.paced import PacedEngine
from penstock.pacing import PaceClock
from tests.io.block_io import drain

PAGE, MIB = 4096, 1 << 20
DEPTH = 8


@pytest.fixture
def inner(tmp_path: Path) -> Iterator[BlockEngine]:
    engine = open_engine(tmp_path / "slab", 4 * MIB, DEPTH)
    yield engine
    engine.close(10.0)


def pieces(memory: memoryview, size: int) -> list[memoryview]:
    return [memory[at : at + size] for at in range(0, len(memory), size)]


def test_bytes_move_and_take_the_time_of_the_bandwidth(inner: BlockEngine) -> None:
    engine = PacedEngine(inner, 0.0)
    source, target = aligned_buffer(MIB), aligned_buffer(MIB)
    source[:] = os.urandom(MIB)
    views = pieces(source, MIB // DEPTH)
    engine.submit([IoOp("write", n * len(view), view, n) for n, view in enumerate(views)])
    assert sorted(done.tag for done in drain(engine)) == list(range(DEPTH))
    engine.bytes_per_s = 8 * MIB
    began_s = time.monotonic()
    views = pieces(target, MIB // DEPTH)
    engine.submit([IoOp("read", n * len(view), view, n) for n, view in enumerate(views)])
    done = drain(engine)
    assert time.monotonic() - began_s >= 0.125
    assert [one.tag for one in done] == list(range(DEPTH)), "a device serves in order"
    assert not any(one.error for one in done) and target == source
    assert engine.clock.busy_s == pytest.approx(0.125)
    assert not engine.clock.busy(time.monotonic())


def test_engines_that_share_a_clock_take_turns(inner: BlockEngine, tmp_path: Path) -> None:
    other = open_engine(tmp_path / "other", MIB, DEPTH)
    clock = PaceClock()
    slow, fast = PacedEngine(inner, 2 * MIB, clock), PacedEngine(other, 8 * MIB, clock)
    began_s = time.monotonic()
    slow.submit([IoOp("read", 0, aligned_buffer(MIB // 8), "slow")])
    fast.submit([IoOp("read", 0, aligned_buffer(MIB // 8), "fast")])
    drain(fast)
    assert time.monotonic() - began_s >= 1 / 16 + 1 / 64
    drain(slow)
    fast.close(10.0)


def test_the_queue_counts_what_is_held_back(inner: BlockEngine) -> None:
    engine = PacedEngine(inner, 1.0)  # nothing ends in the time of a test
    memory = aligned_buffer(DEPTH * PAGE)
    engine.submit([IoOp("read", 0, view, n) for n, view in enumerate(pieces(memory, PAGE))])
    while inner.in_flight():
        assert engine.poll(0.01) == []
    assert engine.in_flight() == DEPTH
    with pytest.raises(QueueFull):
        engine.submit([IoOp("read", 0, aligned_buffer(PAGE), "late")])
    engine.close(10.0)
    assert len(engine.poll(0.0)) == DEPTH, "what the pace held back ends with the engine"


def test_wrong_operations_start_nothing(inner: BlockEngine) -> None:
    engine = PacedEngine(inner, 1e6)
    with pytest.raises(ValueError, match="ends at"):
        engine.submit([IoOp("read", 64 * MIB, aligned_buffer(PAGE), 1)])
    assert engine.in_flight() == 0 and engine.clock.busy_s == 0
    with pytest.raises(ValueError, match="bytes_per_s is -1"):
        PacedEngine(inner, -1.0)


def test_errors_come_through(tmp_path: Path) -> None:
    engine = PacedEngine(open_engine(tmp_path / "cut", MIB, 1), 100 * MIB)
    os.truncate(tmp_path / "cut", PAGE)
    engine.submit([IoOp("read", MIB // 2, aligned_buffer(PAGE), "beyond")])
    (done,) = drain(engine)
    assert done.tag == "beyond" and done.error is not None
    engine.close(10.0)


@pytest.mark.parametrize("held_back", [True, False])
def test_wake_ends_a_poll(inner: BlockEngine, held_back: bool) -> None:
    engine = PacedEngine(inner, 1.0 if held_back else 0.0)
    if held_back:
        engine.submit([IoOp("read", 0, aligned_buffer(PAGE), 1)])
        while inner.in_flight():
            engine.poll(0.01)
        waker = threading.Timer(0.05, engine.wake)
        waker.start()
    else:
        engine.wake()
    began_s = time.monotonic()
    assert engine.poll(200.0) == []
    assert time.monotonic() - began_s < 100.0
