"""What the decode buffer looks at with each event while hand-offs wait for room, counted."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial

import pytest

from penstock.cluster.handoff.buffer import DecodeBuffer
from penstock.core.keys import BlockKey
from penstock.pool.checksum import block_checksum
from penstock.pool.setup.open import open_local_pool

BLOCKS = 256
BLOCK_BYTES = 4096


class Looks:
    """How often a name or key of the classes below was looked up or compared."""

    count = 0


class CountedKey(bytes):
    """A block key."""

    def __hash__(self) -> int:
        Looks.count += 1
        return super().__hash__()

    def __eq__(self, other: object) -> bool:
        Looks.count += 1
        return super().__eq__(other)


class CountedName(str):
    """Name of a hand-off."""

    __slots__ = ()

    def __hash__(self) -> int:
        Looks.count += 1
        return super().__hash__()

    def __eq__(self, other: object) -> bool:
        Looks.count += 1
        return super().__eq__(other)


def key_of(number: int) -> BlockKey:
    return number.to_bytes(16, "little")


@pytest.fixture
def buffer() -> Iterator[DecodeBuffer]:
    storage = open_local_pool([1 << 20], [])
    yield DecodeBuffer(BLOCK_BYTES, BLOCKS, storage)
    storage.close(5.0)


def fill(buffer: DecodeBuffer) -> None:
    """All room is taken, by one hand-off for each block."""
    for number in range(BLOCKS):
        buffer.reserve(f"small {number}", [key_of(number)], lambda: None)
    assert not buffer.free_blocks


def test_room_that_is_not_enough_costs_the_same_however_long_the_prompt_that_waits(buffer: DecodeBuffer) -> None:
    fill(buffer)
    granted: list[str] = []
    buffer.reserve("long", [CountedKey(key_of(BLOCKS + i)) for i in range(BLOCKS)], lambda: granted.append("long"))
    Looks.count = 0
    for number in range(BLOCKS - 1):
        buffer.release(f"small {number}")
        assert not granted
    assert Looks.count <= 2 * BLOCKS, "each event looks at the blocks of the one that waits"
    buffer.check_integrity()
    buffer.release(f"small {BLOCKS - 1}")
    assert granted == ["long"]
    buffer.check_integrity()


def test_a_hand_off_that_waits_is_withdrawn_without_looking_at_the_others(buffer: DecodeBuffer) -> None:
    fill(buffer)
    names = [CountedName(f"waits {i}") for i in range(1000)]
    for name in names:
        buffer.reserve(name, [key_of(BLOCKS)], lambda: None)
    Looks.count = 0
    for name in names[500:600]:
        buffer.release(name)
    assert Looks.count <= 30 * 100


@pytest.mark.parametrize("seed", range(10))
def test_what_the_first_one_needs_follows_what_comes_and_goes(buffer: DecodeBuffer, seed: int) -> None:
    """Hand-offs that share blocks, writes, users and releases in any order: each is granted as soon as it fits, first
    come first served."""
    chance = random.Random(seed)
    waiting: list[str] = []
    holding: list[str] = []
    held = []
    for number in range(300):
        step = chance.random()
        if step < 0.4:
            name, first = str(number), chance.randrange(2 * BLOCKS)
            waiting.append(name)
            keys = [key_of(first + i) for i in range(chance.randint(1, BLOCKS // 2))]
            buffer.reserve(name, keys, partial(holding.append, name))
            for key in keys[: chance.randint(0, len(keys))]:
                into = buffer.begin_write(key)
                if isinstance(into, memoryview):
                    buffer.end_write(key, (block_checksum(key, into[:BLOCK_BYTES]), b""))
                if chance.random() < 0.1 and (one := buffer.hold(key)) is not None:
                    held.append(one)
        elif step < 0.6 and held:
            held.pop(chance.randrange(len(held))).release()
        elif step < 0.95 and holding:
            buffer.release(holding.pop(chance.randrange(len(holding))))
        elif waiting:
            buffer.release(waiting.pop(chance.randrange(len(waiting))))
        waiting = [name for name in waiting if name not in holding]
        buffer.check_integrity()
    for one in held:
        one.release()
    while waiting := [name for name in waiting if name not in holding]:
        assert holding, "one that fits into an empty buffer is not granted"
        buffer.release(holding.pop(0))
    for name in holding:
        buffer.release(name)
    buffer.check_integrity()
    assert buffer.free_blocks == BLOCKS
