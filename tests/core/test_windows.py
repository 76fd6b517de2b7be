"""Windows in bytes: what they come to in blocks, and the spans in them."""

from __future__ import annotations

import random

import pytest

from penstock.core.operations import Fetch
from penstock.core.spans import SPAN_BLOCKS_MAX, SPAN_BYTES_MAX, span_blocks, spans_of
from penstock.core.windows import FETCH_WINDOW_BYTES, WINDOW_BLOCKS_MAX, Windows, windows_of

KIB, MIB = 1 << 10, 1 << 20
SLOTS = 1 << 15  # staging memory that bounds nothing


def test_blocks_of_llama_8b_have_the_windows_that_were_counted_in_blocks() -> None:
    assert windows_of(FETCH_WINDOW_BYTES, 8 * MIB, SLOTS) == Windows(8, 4, 8, 4)
    assert span_blocks(8, 8 * MIB) == 1
    assert windows_of(FETCH_WINDOW_BYTES, 8 * MIB, 16) == Windows(8, 4, 8, 4), "the default staging of 128 MiB"


@pytest.mark.parametrize(
    ("block_bytes", "blocks", "span"),
    [
        (4 * KIB, 512, 64),
        (70 * KIB, 512, 64),
        (128 * KIB, 512, 64),
        (2 * MIB, 32, 4),
        (64 * MIB, 1, 1),
        (1 << 30, 1, 1),
    ],
)
def test_a_window_holds_as_many_bytes_whatever_the_size_of_a_block(block_bytes: int, blocks: int, span: int) -> None:
    found = windows_of(FETCH_WINDOW_BYTES, block_bytes, SLOTS).fetch_window_blocks
    assert (found, span_blocks(found, block_bytes)) == (blocks, span)


def test_windows_stay_within_bytes_blocks_and_staging() -> None:
    draws = random.Random(1)
    for _ in range(2000):
        window = draws.choice((1, 64 * KIB, MIB, FETCH_WINDOW_BYTES, 1 << 40))
        block, slots = draws.randrange(1, 1 << draws.randrange(1, 31)), draws.randrange(2, 1 << draws.randrange(2, 16))
        found = windows_of(window, block, slots)
        staged = max(8, slots // 4)
        assert 1 <= found.fetch_window_blocks <= min(WINDOW_BLOCKS_MAX, staged)
        assert found.fetch_window_blocks * block <= max(window, block)
        assert 2 <= found.save_window_blocks <= max(2, staged)
        assert found.save_window_blocks * block <= max(window // 2, 2 * block)
        assert 1 <= found.forward_window_blocks <= 128 and found.forward_window_blocks * block <= max(window, block)
        span = span_blocks(found.fetch_window_blocks, block)
        assert span <= found.upload_group_blocks <= SPAN_BLOCKS_MAX and (span * block <= SPAN_BYTES_MAX or span == 1)


def test_fetches_that_follow_each_other_on_a_route_are_spans() -> None:
    routes = [("a",)] * 5 + [("b",)] * 2 + [("a",)] * 3
    fetches = [Fetch(number, b"key", number, route, 1.0) for number, route in enumerate(routes)]
    spans = list(spans_of(fetches, 4))
    assert [[fetch.op_id for fetch in span] for span in spans] == [[0, 1, 2, 3], [4], [5, 6], [7, 8, 9]]
    assert list(spans_of([], 4)) == []
