"""What an operation costs its caller, counted: calls of functions, and system calls."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.io import BlockEngine, IoOp, aligned_buffer, open_engine
from penstock.io import uring_abi as abi
from penstock.io.ring_engine import FIRST_PIECES
from tests.call_counts import all_calls

OPS = 32
PAGE = 4096


@pytest.fixture
def engine(tmp_path: Path, skip_without_uring: None) -> Iterator[BlockEngine]:
    opened = open_engine(tmp_path / "slab", 2 * OPS * PAGE, 2 * OPS)
    if opened.name != "uring":
        pytest.skip("; ".join(opened.notes))
    yield opened
    opened.close(10.0)


@pytest.fixture
def reads(engine: BlockEngine) -> list[IoOp]:
    """Twice OPS reads into registered memory."""
    memory = aligned_buffer(2 * OPS * PAGE)
    engine.register(memory)
    return [IoOp("read", at, memory[at : at + PAGE], at) for at in range(0, len(memory), PAGE)]


@pytest.fixture
def submitted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Entries of each system call that submits without waiting."""
    found: list[int] = []
    submit = abi.submit

    def count(fd: int, entries: int) -> int:
        found.append(entries)
        return submit(fd, entries)

    monkeypatch.setattr(abi, "submit", count)
    return found


def collect(engine: BlockEngine) -> int:
    """Poll until nothing is in flight; returns the number of polls."""
    polls = 0
    while engine.in_flight():
        assert all(done.error is None for done in engine.poll(30.0))
        polls += 1
    return polls


def test_an_operation_of_one_piece_costs_few_calls(engine: BlockEngine, reads: list[IoOp]) -> None:
    polls = 0

    def end() -> None:
        nonlocal polls
        polls = collect(engine)

    engine.submit(reads[:OPS])
    collect(engine)  # what is done once was done
    assert all_calls(lambda: engine.submit(reads[:OPS])) < 12 * OPS, "14.7 with a record of pieces for each"
    calls = all_calls(end)
    assert calls < 6 * OPS + 40 * polls, f"{polls} polls; 10 for each operation before"


def test_an_idle_device_begins_before_all_are_packed_and_a_busy_one_is_called_once(
    engine: BlockEngine, reads: list[IoOp], submitted: list[int]
) -> None:
    engine.submit(reads[:OPS])
    assert submitted == [FIRST_PIECES, OPS - FIRST_PIECES]
    submitted.clear()
    engine.submit(reads[OPS:])  # nothing was polled: all of the first ones count as in the device
    assert submitted == [OPS]
    collect(engine)
    submitted.clear()
    engine.submit(reads[:1])
    assert submitted == [1]
    collect(engine)
