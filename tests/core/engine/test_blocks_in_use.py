"""What is counted of a waiting request's blocks by changes, beside what its blocks say."""

from __future__ import annotations

import random

import pytest

from penstock.core.engine import blocks_in_use
from penstock.core.engine.blocks_in_use import BlocksInUse
from penstock.core.engine.device_pages import DevicePages
from penstock.core.engine.request import Request
from penstock.core.keys import root_key
from penstock.core.operations import RequestSpec

ROOT = root_key(b"f" * 16, "")


def request(number: int, family: int, blocks: int) -> Request:
    """Blocks of one token; those of a family share their prefix, and the last one is the request's own."""
    return Request(RequestSpec(str(number), [family] * blocks + [1000 + number], 1, ROOT), number, 0.0, 1, 1.0)


@pytest.mark.parametrize("remembered", [4, 8192])
@pytest.mark.parametrize("seed", range(10))
def test_a_count_by_changes_is_what_the_blocks_say(seed: int, remembered: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long ago the last count was, and whether the changes since are remembered or not."""
    monkeypatch.setattr(blocks_in_use, "CHANGES_MAX", remembered)
    dice = random.Random(seed)
    counted = BlocksInUse()
    requests = [request(number, number % 3, dice.randint(1, 20)) for number in range(9)]
    keys = sorted({key for one in requests for key in one.chain.keys})
    in_use: set[bytes] = set()
    for _ in range(1000):
        key = dice.choice(keys)
        if dice.random() < 0.5:
            counted.add(key)
            in_use.add(key)
        else:
            counted.discard(key)
            in_use.discard(key)
        if dice.random() < 0.3:
            one = dice.choice(requests)
            assert counted.count(one) == sum(key in in_use for key in one.chain.keys[: one.hittable_blocks])
        counted.check_integrity(in_use)


@pytest.mark.parametrize("seed", range(20))
def test_pages_are_taken_in_the_order_of_a_plain_search(seed: int) -> None:
    """Where no leaf may go, the block goes that was inserted first of all without a pin, as a search in order finds
    it."""
    dice = random.Random(seed)
    pages = DevicePages(12)
    cached: dict[bytes, tuple[bytes, int]] = {}  # key -> parent, page, in order of insertion
    pins: dict[bytes, int] = {}
    private: list[int] = []
    serial = roots = 0
    for _ in range(600):
        action = dice.random()
        if action < 0.35:
            leaves = [key for key in cached if not pins[key] and all(parent != key for parent, _ in cached.values())]
            oldest = next((key for key in cached if not pins[key]), None)
            page = pages.take()
            gone = [key for key in cached if key not in pages]
            if page is None:
                assert oldest is None
                continue
            if gone and not leaves:
                roots += 1
                assert gone == [oldest], "not the block that a search finds"
            assert not gone or cached.pop(gone[0])[1] == page
            private.append(page)
        elif action < 0.7 and private:
            serial += 1
            key, page = serial.to_bytes(16, "big"), private.pop()
            pins[key] = dice.choice([0, 1, 1, 2])
            parent = dice.choice([*cached, b"root"])
            cached[key] = (parent, page)
            pages.insert(key, parent, page, pins[key])
        elif cached:
            key = dice.choice(list(cached))
            if pins[key] and dice.random() < 0.6:
                pages.unpin(cached[key][1])
                pins[key] -= 1
            elif pins[key] < 2:
                assert pages.pin(key) == cached[key][1]
                pins[key] += 1
        pages.check_integrity(set(private), set())
    assert roots, "the case did not come up"
