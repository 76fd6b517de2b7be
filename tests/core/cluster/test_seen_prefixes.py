"""The estimate of hits by segments against one that knows every block, and what it costs."""

from __future__ import annotations

import random

from penstock.cluster.router.prefix_hashes import PrefixHashes
from penstock.core.cluster.seen_prefixes import SEGMENT_BLOCKS, PrefixKeys, SeenPrefixes
from penstock.core.packed_tokens import pack_tokens

BLOCK = 4
SEGMENT = SEGMENT_BLOCKS * BLOCK


class Estimate:
    """The estimate, and every block of every prompt that was added."""

    def __init__(self, keys_max: int = 1 << 20) -> None:
        self.hashes = PrefixHashes(BLOCK)
        self.seen = SeenPrefixes(BLOCK, keys_max)
        self.added: set[tuple[str, tuple[int, ...]]] = set()

    def keys(self, tokens: list[int], tenant: str = "") -> PrefixKeys:
        return self.hashes.of(pack_tokens(tokens), tenant)

    def add(self, tokens: list[int], tenant: str = "") -> None:
        self.seen.add(self.keys(tokens, tenant))
        self.added |= {(tenant, tuple(tokens[:end])) for end in range(BLOCK, len(tokens) + 1, BLOCK)}

    def hit(self, tokens: list[int], tenant: str = "") -> int:
        return self.seen.hit_tokens(self.keys(tokens, tenant))

    def exact(self, tokens: list[int], tenant: str = "") -> int:
        hit = 0
        while hit + BLOCK < len(tokens) and (tenant, tuple(tokens[: hit + BLOCK])) in self.added:
            hit += BLOCK
        return hit


def test_a_prompt_that_goes_on_from_an_earlier_one_has_its_exact_hit() -> None:
    for length in (0, 1, BLOCK, 5 * BLOCK + 3, SEGMENT, SEGMENT + BLOCK, 3 * SEGMENT + 7 * BLOCK + 1, 4 * SEGMENT):
        estimate = Estimate()
        first = list(range(length))
        estimate.add(first)
        for more in (1, BLOCK, 2 * SEGMENT):
            assert estimate.hit(first + [9999] * more) == length // BLOCK * BLOCK
        assert estimate.hit(first) == max(0, (length - 1) // BLOCK * BLOCK), "less than the whole prompt"


def test_prompts_that_share_a_short_prefix_hit_it_exactly() -> None:
    """As chats with one system prompt do, however long what follows is."""
    for shared in range(0, SEGMENT + 1, BLOCK):
        estimate = Estimate()
        estimate.add([*range(shared), *[7000] * 5 * SEGMENT])
        assert estimate.hit([*range(shared), *[8000] * 5 * SEGMENT]) == shared


def test_the_estimate_is_never_above_what_was_added_and_less_than_a_segment_below() -> None:
    dice = random.Random(5)
    for _ in range(60):
        estimate = Estimate()
        prompts: list[list[int]] = [[]]
        for _ in range(20):
            begun = dice.choice(prompts)
            prompt = begun[: dice.randint(0, len(begun))] + [dice.randrange(3) for _ in range(dice.randrange(300))]
            tenant = dice.choice(["", "other"])
            if prompt:
                hit, exact = estimate.hit(prompt, tenant), estimate.exact(prompt, tenant)
                assert exact - SEGMENT < hit <= exact
                estimate.add(prompt, tenant)
                prompts.append(prompt)


def test_tenants_do_not_see_each_others_prefixes() -> None:
    estimate = Estimate()
    prompt = list(range(3 * SEGMENT))
    estimate.add(prompt, "one")
    assert estimate.hit(prompt, "one") > 0 == estimate.hit(prompt, "two") == estimate.hit(prompt)


def test_a_router_that_starts_anew_makes_other_keys() -> None:
    prompt = pack_tokens(list(range(SEGMENT)))
    assert PrefixHashes(BLOCK).of(prompt, "").segments != PrefixHashes(BLOCK).of(prompt, "").segments


def test_a_long_prompt_is_looked_up_and_added_by_its_segments() -> None:
    """512 blocks of 64 tokens: counted keys, not time."""
    hashes, seen = PrefixHashes(64), SeenPrefixes(64)
    keys = hashes.of(pack_tokens([1] * 32_768), "")
    seen.add(keys)
    assert len(keys.segments) == 32 and len(seen) <= 32 + 2 * SEGMENT_BLOCKS
    assert seen.hit_tokens(keys) == 32_768 - 64


def test_the_latest_prefixes_stay_and_a_begin_outlives_what_follows_it() -> None:
    estimate = Estimate(keys_max=2 * SEGMENT_BLOCKS)
    prompt = list(range(40 * SEGMENT))
    estimate.add(prompt)
    assert len(estimate.seen) == 2 * SEGMENT_BLOCKS
    assert 0 < estimate.hit(prompt) < 39 * SEGMENT, "its end went first"
    for number in range(40):
        estimate.add([10_000 + number] * SEGMENT)
    assert estimate.hit(prompt) == 0 and len(estimate.seen) == 2 * SEGMENT_BLOCKS
