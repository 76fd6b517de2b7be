"""Block keys: what they separate, and what they do not depend on."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from penstock.core.keys import KEY_BYTES, KeyChain, Span, block_keys, root_key
from penstock.core.layout import KVLayout

MODEL = b"m" * 16
TOKENS = list(range(100, 164))


def test_one_key_of_128_bits_for_each_full_block() -> None:
    keys = block_keys(TOKENS[:50], MODEL, "", 16)
    assert KEY_BYTES == 16 and len(keys) == 3 == len(set(keys))
    assert {len(key) for key in keys} == {16}
    assert block_keys(TOKENS[:15], MODEL, "", 16) == []


def test_a_key_covers_everything_before_its_block() -> None:
    keys = block_keys(TOKENS, MODEL, "", 16)
    changed = block_keys([TOKENS[0] + 1, *TOKENS[1:]], MODEL, "", 16)
    assert not set(keys) & set(changed), "a change in block 0 changes all keys"
    late = block_keys([*TOKENS[:-1], 0], MODEL, "", 16)
    assert late[:3] == keys[:3] and late[3] != keys[3]
    assert block_keys(TOKENS[16:], MODEL, "", 16)[0] != keys[1], "the same tokens elsewhere are another block"


def test_tenants_models_and_layouts_are_apart() -> None:
    def layout(block_tokens: int = 16, width: int = 256, dtype: str = "bfloat16") -> KVLayout:
        return KVLayout(block_tokens, (width,) * 4, dtype)

    fingerprints = [
        layout().fingerprint("model-a"),
        layout().fingerprint("model-b"),
        layout(width=512).fingerprint("model-a"),
        layout(dtype="float16").fingerprint("model-a"),
        layout(block_tokens=32).fingerprint("model-a"),
    ]
    roots = [root_key(fingerprint, salt) for fingerprint in fingerprints for salt in ("", "a", "b", "ab")]
    assert len(set(roots)) == len(roots)
    assert root_key(fingerprints[0], "a") == root_key(layout().fingerprint("model-a"), "a")


@given(
    tokens=st.lists(st.integers(0, 2**32 - 1), max_size=80),
    cuts=st.lists(st.integers(0, 80), max_size=6),
    block_tokens=st.integers(1, 9),
)
def test_a_chain_grown_in_any_steps_has_the_same_keys(tokens: list[int], cuts: list[int], block_tokens: int) -> None:
    chain = KeyChain(root_key(MODEL, "s"), block_tokens)
    added = []
    bounds = [0, *sorted(cuts), len(tokens)]
    for low, high in itertools.pairwise(bounds):
        added += chain.extend(tokens[low:high])
    assert added == chain.keys == block_keys(tokens, MODEL, "s", block_tokens)
    for index in range(len(chain.keys)):
        assert chain.parent_of(index) == (chain.keys[index - 1] if index else chain.root)


FIRST, SECOND = Span(10, 20, b"first image"), Span(40, 5, b"second image")


def keys_with(*spans: Span, tokens: list[int] = TOKENS) -> list[bytes]:
    return block_keys(tokens, MODEL, "", 16, spans)


def test_an_image_is_in_the_keys_of_the_blocks_that_it_overlaps_and_of_those_behind_them() -> None:
    plain, one, both = keys_with(), keys_with(FIRST), keys_with(FIRST, SECOND)
    assert not set(plain) & set(one), "the image begins in block 0"
    assert one[:2] == both[:2], "a later image of the chat changes no earlier key"
    assert not set(one[2:]) & set(both[2:])
    assert keys_with(SECOND)[:2] == plain[:2]


def test_another_image_and_another_place_of_it_are_other_keys() -> None:
    two = keys_with(Span(10, 10, b"a"), Span(22, 10, b"b"))
    assert two == keys_with(Span(22, 10, b"b"), Span(10, 10, b"a")), "in whichever order they are named"
    others = [
        keys_with(Span(10, 10, b"b"), Span(22, 10, b"a")),
        keys_with(Span(11, 10, b"a"), Span(22, 10, b"b")),
        keys_with(Span(10, 10, b"ab"), Span(22, 10, b"")),
        keys_with(Span(10, 10, b"a")),
    ]
    assert len({two[1], *(keys[1] for keys in others)}) == 5
    assert keys_with(Span(16, 16, b"a"))[0] == keys_with()[0] == keys_with(Span(3, 0, b"nothing"))[0]


@given(
    cuts=st.lists(st.integers(0, 64), max_size=6),
    spans=st.lists(st.builds(Span, st.integers(0, 70), st.integers(0, 30), st.binary(max_size=3)), max_size=5),
)
def test_keys_with_images_are_the_same_however_the_chain_grew(cuts: list[int], spans: list[Span]) -> None:
    chain = KeyChain(root_key(MODEL, ""), 16, spans)
    for low, high in itertools.pairwise([0, *sorted(cuts), len(TOKENS)]):
        chain.extend(TOKENS[low:high])
    assert chain.keys == keys_with(*spans)
    for index in range(4):  # against the definition, block by block
        here = {span for span in spans if span.offset < (index + 1) * 16 and span.offset + span.length > index * 16}
        others = [span for span in spans if span not in here and span.offset + span.length <= index * 16]
        same = keys_with(*(span for span in spans if span in here or span in others))
        assert same[index] == chain.keys[index]


def test_keys_are_the_same_in_every_process() -> None:
    program = (
        "from penstock.core.keys import block_keys\n"
        "from penstock.core.layout import KVLayout\n"
        "f = KVLayout(16, (256,) * 4, 'float32').fingerprint('model')\n"
        "print([key.hex() for key in block_keys(range(64), f, 'tenant', 16)])\n"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout
        for seed in ("0", "1", "4711")
    }
    here = block_keys(range(64), KVLayout(16, (256,) * 4, "float32").fingerprint("model"), "tenant", 16)
    assert printed == {f"{[key.hex() for key in here]}\n"}
