"""Connections that send take turns: what comes in has a part of the time, and no address waits for another one."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

from penstock.server.turns import REQUEST_S, TURN_S, WINDOW_S, Turns

SLICE_S = TURN_S / 4


class Loop:
    """A loop's clock and timers. Time passes while something is parsed, and between the timers."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._timers: list[tuple[float, int, Callable[[], None]]] = []

    def time(self) -> float:
        return self.now_s

    def call_at(self, when_s: float, callback: Callable[[], None]) -> None:
        heapq.heappush(self._timers, (when_s, len(self._timers), callback))

    def run(self) -> None:
        while self._timers:
            when_s, _, callback = heapq.heappop(self._timers)
            self.now_s = max(self.now_s, when_s)
            callback()


@dataclass(eq=False)
class Sending:
    """`slices` are left to be parsed, each of which takes SLICE_S; `taken_s` has the times at which it was done."""

    address: str
    slices: int
    loop: Loop
    taken_s: list[float] = field(default_factory=list)

    def take(self) -> bool:
        self.taken_s.append(self.loop.now_s)
        self.loop.now_s += SLICE_S
        self.slices -= 1
        return self.slices > 0


def played(*sending: tuple[str, int]) -> list[Sending]:
    loop = Loop()
    turns = Turns(cast(asyncio.AbstractEventLoop, loop))
    found = [Sending(address, slices, loop) for address, slices in sending]
    for one in found:
        turns.received(one)
    loop.run()
    assert turns.waiting == 0 and not any(one.slices for one in found)
    return found


def test_half_of_the_time_is_left_to_others() -> None:
    for found in (played(("a", 100)), played(*[("a", 10)] * 10), played(*[(str(n), 3) for n in range(30)])):
        taken_s = sorted(time_s for one in found for time_s in one.taken_s)
        for begin_s in taken_s:
            parsed_s = SLICE_S * sum(begin_s <= time_s < begin_s + WINDOW_S for time_s in taken_s)
            assert parsed_s <= TURN_S + SLICE_S, "more than a turn of some window"
        assert taken_s[-1] >= (len(taken_s) * SLICE_S / TURN_S - 1) * WINDOW_S


def test_connections_that_come_one_by_one_do_not_get_around_the_bound() -> None:
    """None of them ever waits behind another one: each has one slice, and the next comes once that is parsed."""
    loop = Loop()
    turns = Turns(cast(asyncio.AbstractEventLoop, loop))
    for number in range(200):
        one = Sending(str(number), 1, loop)
        if turns.received(one):
            loop.run()
        assert not one.slices
    assert loop.now_s >= (200 * SLICE_S / TURN_S - 1) * WINDOW_S


def test_a_request_counts_as_much_as_its_answer_costs() -> None:
    loop = Loop()
    turns = Turns(cast(asyncio.AbstractEventLoop, loop))
    for _ in range(int(TURN_S / REQUEST_S)):
        turns.received(Sending("a", 1, loop))
        turns.request()
    assert turns.received(Sending("b", 1, loop)), "the window's time is used up"


def test_little_is_parsed_at_once() -> None:
    (found,) = played(("a", 2))
    assert found.taken_s == [0, SLICE_S]


def test_many_connections_of_one_address_do_not_delay_another() -> None:
    *_, honest = played(*[("evil", 50)] * 100, ("honest", 2))
    assert honest.taken_s[-1] <= 2 * WINDOW_S


def test_connections_of_one_address_take_turns() -> None:
    found = played(("a", 400), ("a", 4))
    assert found[1].taken_s[-1] < 5 * WINDOW_S


def test_what_is_forgotten_waits_no_more() -> None:
    loop = Loop()
    turns = Turns(cast(asyncio.AbstractEventLoop, loop))
    found = [Sending("a", 8, loop) for _ in range(1000)]
    for one in found:
        turns.received(one)
    for one in found[1:]:
        turns.forget(one)
        turns.forget(one)
    assert turns.waiting <= 1
    loop.run()
    assert turns.waiting == 0 and not found[0].slices and not any(one.taken_s for one in found[1:])
