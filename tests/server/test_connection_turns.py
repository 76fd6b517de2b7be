"""Connections that send take turns: an iteration of the loop has a bound, and no address waits for another one."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from penstock.server.turns import TURN_S, Turns

SLICE_S = TURN_S / 4


@dataclass
class Clock:
    now_s: float = 0.0


@dataclass
class Sending:
    """`slices` are left to be parsed, each of which takes SLICE_S; `taken` has the loop's iterations that did it."""

    address: str
    slices: int
    clock: Clock
    world: World
    taken: list[int] = field(default_factory=list)

    def take(self) -> bool:
        self.clock.now_s += SLICE_S
        self.taken.append(self.world.iteration)
        self.slices -= 1
        return self.slices > 0


@dataclass
class World:
    iteration: int = 0


async def run(sending: list[Sending], turns: Turns, world: World, iterations: int) -> None:
    for one in sending:
        turns.received(one)
    for _ in range(iterations):
        await asyncio.sleep(0)
        world.iteration += 1


def played(*sending: tuple[str, int]) -> list[Sending]:
    async def play() -> list[Sending]:
        clock, world = Clock(), World()
        turns = Turns(asyncio.get_running_loop(), lambda: clock.now_s)
        found = [Sending(address, slices, clock, world) for address, slices in sending]
        await run(found, turns, world, sum(slices for _, slices in sending) + 2)
        assert turns.waiting == 0
        return found

    return asyncio.run(play())


def test_an_iteration_has_a_bound() -> None:
    for found in (played(("a", 100)), played(*[("a", 10)] * 10), played(*[(str(n), 3) for n in range(30)])):
        counts: dict[int, int] = {}
        for one in found:
            assert one.slices == 0
            for iteration in one.taken:
                counts[iteration] = counts.get(iteration, 0) + 1
        assert max(counts.values()) <= 2 * TURN_S / SLICE_S  # what came in, and a turn of what waited


def test_little_is_parsed_at_once() -> None:
    (found,) = played(("a", 2))
    assert found.taken == [0, 0]


def test_many_connections_of_one_address_do_not_delay_another() -> None:
    *_, honest = played(*[("evil", 50)] * 100, ("honest", 2))
    assert honest.taken[-1] <= 3


def test_connections_of_one_address_take_turns() -> None:
    found = played(("a", 400), ("a", 4))
    assert found[1].taken[-1] < 10
