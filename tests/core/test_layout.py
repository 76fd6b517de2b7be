"""The byte layout of blocks."""

from __future__ import annotations

import pytest

from penstock.core.layout import STAGING_ALIGNMENT_BYTES, KVLayout, staging_bytes


def test_layer_blocks_concatenated_are_the_full_block() -> None:
    layout = KVLayout(64, (512, 128, 512), "bfloat16")
    assert layout.layers == 3
    assert layout.bytes_per_token == 1152
    assert layout.full_block_bytes == 64 * 1152 == sum(layout.layer_block_bytes(i) for i in range(3))
    at = 0
    for layer, offset in enumerate(layout.layer_offsets):
        assert offset == at
        at += layout.layer_block_bytes(layer)
    assert at == layout.full_block_bytes


def test_llama_8b_takes_what_the_paper_says() -> None:
    assert KVLayout(64, (4096,) * 32, "bfloat16").bytes_per_token == 131072


@pytest.mark.parametrize(("size", "staged"), [(1, 4096), (4096, 4096), (4097, 8192), (16384, 16384)])
def test_staging_is_aligned(size: int, staged: int) -> None:
    assert staging_bytes(size) == staged
    assert staged % STAGING_ALIGNMENT_BYTES == 0


@pytest.mark.parametrize(
    ("block_tokens", "widths", "message"),
    [(0, (1,), "block_tokens is 0"), (1, (), "at least one layer"), (1, (4, 0), "at least 1 byte")],
)
def test_impossible_layouts_are_refused(block_tokens: int, widths: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KVLayout(block_tokens, widths, "float32")
