"""CALVO's set-up with the blocks of another model: what differs is how many there are, and how large."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from benchmarks.calvo import testbed
from benchmarks.calvo.testbed import BLOCK_SHAPES, PAPER, Scale

WINDOWS = ("fetch_window_blocks", "upload_group_blocks", "save_window_blocks")


def bed(blocks: str) -> testbed.Testbed:
    """With L1 and L2 of a few megabytes: nothing runs."""
    return testbed.Testbed(Scale(1 << 14 if blocks == PAPER else 70_272, 0.25, blocks=blocks), "127.0.0.1:1")


@pytest.mark.parametrize("blocks", sorted(BLOCK_SHAPES.keys() - {PAPER}))
def test_windows_hold_as_many_tokens_whatever_the_size_of_a_block(blocks: str) -> None:
    paper, other = (asdict(bed(name).config("penstock", "feasible")) for name in (PAPER, blocks))
    assert other["block_tokens"] < paper["block_tokens"]
    for name in WINDOWS:
        assert other[name] * other["block_tokens"] == paper[name] * paper["block_tokens"], name
    rest = paper.keys() - {*WINDOWS, "block_tokens", "block_bytes", "l1_pages", "l2_slots"}
    assert {name: other[name] for name in rest} == {name: paper[name] for name in rest}


@pytest.mark.parametrize("blocks", sorted(BLOCK_SHAPES))
def test_a_window_takes_as_long_on_the_link(blocks: str) -> None:
    def window_s(name: str) -> float:
        scale = Scale(BLOCK_SHAPES[name].bytes_divisor, 0.25, blocks=name)
        block_bytes = scale.shape.tokens * scale.profile().layers * scale.profile().layer_bytes_per_token
        window = bed(name).config("penstock", "feasible").fetch_window_blocks
        return window * block_bytes / scale.paced_bytes_per_s

    assert window_s(blocks) == pytest.approx(window_s(PAPER), rel=0.02)
