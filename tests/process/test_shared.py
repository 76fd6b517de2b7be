"""What all of a process share is made once, and ends with its last user."""

from __future__ import annotations

import pytest

from penstock.process.shared import Shared


def test_one_object_for_all_until_the_last_lets_it_go() -> None:
    made: list[int] = []
    closed: list[int] = []

    def make() -> int:
        made.append(len(made))
        return made[-1]

    shared: Shared[int] = Shared(make, closed.append)
    first, second = shared.acquire(), shared.acquire()
    assert (first, second, made) == (0, 0, [0])
    shared.release(first)
    assert not closed
    shared.release(second)
    assert closed == [0]
    shared.release(second)
    assert closed == [0], "of one that is gone"
    assert shared.acquire() == 1 and closed == [0]


def test_what_cannot_be_made_leaves_nothing_behind() -> None:
    fails = [True]

    def make() -> str:
        if fails.pop() if fails else False:
            raise RuntimeError("no thread")
        return "made"

    shared: Shared[str] = Shared(make, lambda _: None)
    with pytest.raises(RuntimeError):
        shared.acquire()
    assert shared.acquire() == "made"
