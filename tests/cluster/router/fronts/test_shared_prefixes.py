"""The table of seen prefixes that processes share, against the one of a single process."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest

from penstock.cluster.router.fronts import shared_prefixes
from penstock.cluster.router.fronts.shared_prefixes import SharedPrefixes, make_table
from penstock.cluster.router.prefix_hashes import PrefixHashes
from penstock.core.cluster.seen_prefixes import SEGMENT_BLOCKS, SeenPrefixes
from penstock.core.packed_tokens import pack_tokens

BLOCK = 4
SEGMENT = SEGMENT_BLOCKS * BLOCK


@pytest.fixture
def table() -> Iterator[int]:
    file = make_table()
    yield file
    os.close(file)


def test_each_process_estimates_as_one_that_saw_all_prompts(table: int) -> None:
    views, alone, hashes = [SharedPrefixes(BLOCK, table) for _ in range(3)], SeenPrefixes(BLOCK), PrefixHashes(BLOCK)
    dice = random.Random(3)
    prompts = [dice.choices(range(1000), k=5 * SEGMENT)]
    for _ in range(300):
        shared = dice.choice(prompts)
        prompt = shared[: dice.randrange(len(shared))] + [
            dice.randrange(1000) for _ in range(dice.randrange(3 * SEGMENT))
        ]
        keys = hashes.of(pack_tokens(prompt), dice.choice(("", "tenant")))
        assert {view.hit_tokens(keys) for view in views} == {alone.hit_tokens(keys)}
        if dice.random() < 0.7:
            dice.choice(views).add(keys)
            alone.add(keys)
            prompts.append(prompt or [1])
    assert {len(view) for view in views} == {len(alone)}


def test_what_was_used_longest_ago_makes_room(table: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice as many keys as fit: prompts that are asked for again and again stay, and no place is lost."""
    monkeypatch.setattr(shared_prefixes, "_ROWS", 64)
    seen, hashes = SharedPrefixes(BLOCK, table), PrefixHashes(BLOCK)
    kept = [hashes.of(pack_tokens([1, n] * BLOCK), "") for n in range(32)]
    for number in range(512):
        seen.add(hashes.of(pack_tokens([2, number] * BLOCK), ""))
        for keys in kept[:8]:
            seen.add(keys)
    assert sum(seen.hit_tokens(keys) > 0 for keys in kept[:8]) == 8
    old = [hashes.of(pack_tokens([2, number] * BLOCK), "") for number in range(512)]
    found = [seen.hit_tokens(keys) > 0 for keys in old]
    assert sum(found[:128]) < 8 < 60 < sum(found[-128:])
    assert len(seen) <= 64 * shared_prefixes.WAYS
