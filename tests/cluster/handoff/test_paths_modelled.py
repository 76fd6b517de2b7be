"""Modelled compute over the same paths: all KV bytes move for real, and the answers are those of one mixed engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from penstock.engine.runner import SamplingParams
from tests.asking import Answer, prompt_of
from tests.cluster.paths_rig import MIB, beside, cluster, mixed

PROFILE = "h100-llama-3.1-8b"
TOKENS = 64
FIVE = SamplingParams(max_tokens=5, temperature=0.0)
MODELLED: dict[str, Any] = {
    "executor": "modelled",
    "profile": PROFILE,
    "bytes_divisor": 64,
    "time_factor": 0.2,
    "block_tokens": TOKENS,
    "kv_memory_bytes": 16 * MIB,
    "staging_bytes": 4 * MIB,
    "max_batch_tokens": 2048,
}


@pytest.mark.parametrize("read", ["prefill", "decode", "split"])
def test_modelled_engines_move_every_byte(read: str) -> None:
    first = prompt_of(1, 20 * TOKENS + 11)
    with (
        cluster(Path(), engine=MODELLED, host={"buffer_bytes": 8 * MIB}) as c,
        mixed(Path(), c.node, **(MODELLED | {"pool": (), "no_pool": True})) as expected,
    ):
        size = c.block_bytes
        assert size == 131072 * TOKENS // 64
        assert c.start(first, FIVE).answer() == expected(first, FIVE)
        c.settle()
        turn = [*first, *prompt_of(2, 2 * TOKENS)]
        with beside(Path(), c, engine=MODELLED, host={"buffer_bytes": 8 * MIB}) as pair:
            question = pair.start(turn, FIVE, read=read, decode_share=0.5)
            assert question.answer() == expected(turn, FIVE)
            assert question.prefill.report.loaded_bytes == 20 * size
            through = {"prefill": 0, "decode": 20, "split": 10}[read]
            buffer = pair.decode[0].buffer
            assert buffer is not None and buffer.loaded_bytes == through * size
            assert buffer.received_bytes == (22 - through) * size
            links = {link.direction: link for link in pair.prefill[0].report().links}
            assert (links["read"].load_bytes_per_s > 0) == (through > 0)
            assert links["hand-off"].load_bytes_per_s > 0
            assert {link.relay for link in links.values()} == {pair.decode[0].relay_address}
            assert not any(link.backlog_bytes for link in links.values())
            assert (pair.prefill[0].report().storage_load_bytes_per_s > 0) == (through < 20)
            assert (pair.decode[0].report().storage_load_bytes_per_s > 0) == (through > 0)
            assert {label for label, _, _ in question.prefill.report.spans} >= {"fetch", "compute"}


def test_the_report_counts_what_is_unfinished() -> None:
    slow = MODELLED | {"time_factor": 20.0}
    with cluster(Path(), engine=slow, host={"buffer_bytes": 8 * MIB}) as c:
        prompt = prompt_of(3, 6 * TOKENS)
        question, waiting = c.start(prompt, FIVE), Answer()
        question.prefill.first.wait(20)
        c.place(c.decode[0], "decode", waiting, prompt, FIVE, request_id="w")
        report = c.decode[0].report()
        assert report.unfinished == 2 and report.tokens >= 2 * len(prompt)
        assert report.buffer_blocks == 8 * MIB // c.block_bytes
        c.decode[0].cancel("w")
        question.answer()
