"""Windows: how many blocks may be under way at once. They are counted in bytes, within a bound on blocks: so small
blocks fill a link as large ones do, and an urgent request waits for as many bytes of others.
"""

from __future__ import annotations

from dataclasses import dataclass

from penstock.core.spans import SPAN_BLOCKS_MAX, SPANS_PER_WINDOW, span_blocks

FETCH_WINDOW_BYTES = 64 << 20  # default; eight blocks of Llama-3.1-8B
FETCH_WINDOW_HELP = "Bytes in flight per link; at least one block, at most 512 or a quarter of staging."
FORMER_WINDOW = "fetch_window_blocks"  # the setting that counted blocks
FORWARD_WINDOW_BYTES = 64 << 20  # to one decode engine
SAVE_WINDOW_BYTES = 32 << 20
UPLOAD_GROUP_BYTES = 32 << 20  # two groups are under way at once
WINDOW_BLOCKS_MAX = SPANS_PER_WINDOW * SPAN_BLOCKS_MAX
STAGED_BLOCKS_MIN = 8  # staging memory that is short does not make a window smaller than this


@dataclass(frozen=True, slots=True)
class Windows:
    """The windows of a `SchedulerConfig`, which says what each bounds."""

    fetch_window_blocks: int
    save_window_blocks: int
    forward_window_blocks: int
    upload_group_blocks: int


def windows_of(fetch_window_bytes: int, block_bytes: int, l2_slots: int) -> Windows:
    """The windows for blocks of `block_bytes`, of which staging memory holds `l2_slots`. A window is at least one
    block, or two of saves (one is copied while the other is written); uploads go in groups of at least a span."""
    staged = max(STAGED_BLOCKS_MIN, l2_slots // 4)
    fetch = _blocks(fetch_window_bytes, block_bytes, min(staged, WINDOW_BLOCKS_MAX))
    span = span_blocks(fetch, block_bytes)
    return Windows(
        fetch_window_blocks=fetch,
        save_window_blocks=max(2, _blocks(SAVE_WINDOW_BYTES, block_bytes, min(staged, WINDOW_BLOCKS_MAX // 2))),
        forward_window_blocks=_blocks(FORWARD_WINDOW_BYTES, block_bytes, min(staged, WINDOW_BLOCKS_MAX // 4)),
        upload_group_blocks=max(span, _blocks(UPLOAD_GROUP_BYTES, block_bytes, SPAN_BLOCKS_MAX)),
    )


def _blocks(window_bytes: int, block_bytes: int, at_most: int) -> int:
    return max(1, min(at_most, window_bytes // block_bytes))
