"""Windows: how many blocks may be under way at once. They are counted in bytes, within a bound on blocks: so small
blocks fill a link as large ones do, and an urgent request waits for as many bytes of others.
"""

from __future__ import annotations

from dataclasses import dataclass

from penstock.core.spans import SPAN_BLOCKS_MAX, SPANS_PER_WINDOW, span_blocks

FETCH_WINDOW_BYTES = 64 << 20  # default; eight blocks of Llama-3.1-8B
FETCH_WINDOW_HELP = "Bytes in flight per link; at least one block, at most 512 or a quarter of staging."
FORMER_WINDOW = "fetch_window_blocks"  # the setting that counted blocks
WINDOW_BLOCKS_MAX = SPANS_PER_WINDOW * SPAN_BLOCKS_MAX
FORWARDED_BLOCKS_MAX = 128  # they travel singly
STAGED_BLOCKS_MIN = 8  # staging memory that is short does not make a window smaller than this


@dataclass(frozen=True, slots=True)
class Windows:
    """The windows of a `SchedulerConfig`, which says what each bounds."""

    fetch_window_blocks: int
    save_window_blocks: int
    forward_window_blocks: int
    upload_group_blocks: int


def windows_of(fetch_window_bytes: int, block_bytes: int, l2_slots: int) -> Windows:
    """The windows for blocks of `block_bytes`, of which staging memory holds `l2_slots`. As many bytes are in flight to
    one decode engine as on a link, half as many are saved, and go up in one group (two are under way at once). That is
    at least one block, of saves two: one is copied while the other is written."""
    staged = max(STAGED_BLOCKS_MIN, l2_slots // 4)
    whole, half = fetch_window_bytes // block_bytes, fetch_window_bytes // 2 // block_bytes
    fetch = max(1, min(whole, staged, WINDOW_BLOCKS_MAX))
    return Windows(
        fetch_window_blocks=fetch,
        save_window_blocks=max(2, min(half, staged, WINDOW_BLOCKS_MAX // 2)),
        forward_window_blocks=max(1, min(whole, staged, FORWARDED_BLOCKS_MAX)),
        upload_group_blocks=max(1, min(half, SPAN_BLOCKS_MAX), span_blocks(fetch, block_bytes)),
    )
