"""The ring itself: entries of both sizes, wrap-around, timed waits, and the barrier of other machines."""

from __future__ import annotations

import platform
import time
from typing import Literal

import pytest

from penstock.io import uring_abi as abi
from penstock.io.ring import Ring

pytestmark = pytest.mark.usefixtures("skip_without_uring")


@pytest.mark.parametrize("sqe_bytes", [64, 128])
def test_entries_come_back_over_many_turns_of_the_ring(sqe_bytes: Literal[64, 128]) -> None:
    ring = Ring(8, sqe_bytes)
    sent = 0
    got: list[int] = []
    while len(got) < 100:
        while ring.space():
            at = ring.next_entry()
            ring.sqes[at : at + sqe_bytes] = bytes(sqe_bytes)
            abi.SQE_RW.pack_into(ring.sqes, at, abi.OP_NOP, 0, 0, -1, 0, 0, 0, 0, sent, 0, 0, 0, 0, 0)
            sent += 1
        ring.submit() if sent % 16 else ring.wait(1, 5.0)
        for user_data, result in ring.completions():
            assert result == 0
            got.append(user_data)
    assert got == list(range(len(got)))
    ring.close()


def test_a_wait_ends_at_its_deadline() -> None:
    ring = Ring(8)
    start_s = time.monotonic()
    ring.wait(1, 0.05)
    assert 0.04 < time.monotonic() - start_s < 60, "at its deadline, not never"
    assert ring.completions() == []
    ring.close()


def test_the_barrier_of_weakly_ordered_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    """On x86-64 the call is not needed; it is made here with this machine's number to see that it is right."""
    numbers = abi._SYS_MEMBARRIER  # noqa: SLF001 (another machine's barrier)
    monkeypatch.setitem(numbers, "aarch64", 324 if platform.machine() == "x86_64" else 283)
    barrier = abi._Barrier("aarch64")  # noqa: SLF001 (another machine's barrier)
    assert barrier.needed
    barrier()
    with pytest.raises(OSError, match="needs membarrier"):
        abi._Barrier("s390x")  # noqa: SLF001 (another machine's barrier)


def test_a_bad_ring_size_is_an_error() -> None:
    with pytest.raises(OSError, match="io_uring_setup"):
        Ring(1 << 20)
