"""The long run of `penstock bench scale --rounds` on few blocks: what is counted does not grow from round to round."""

from __future__ import annotations

import json
from pathlib import Path

import typer
from typer.testing import CliRunner

from penstock.bench.scale import scale
from penstock.bench.scale_rounds import run_rounds

BLOCKS, ROUNDS = 100_000, 2

app = typer.Typer()
app.command()(scale)


def test_a_table_that_is_filled_and_evicted_over_and_over_does_not_grow() -> None:
    found = run_rounds(BLOCKS, ROUNDS)
    assert len(found.rounds) == ROUNDS + 1 and not found.holes
    first, *later = found.rounds
    assert BLOCKS <= first.rows <= 1.01 * BLOCKS
    assert all(one.rows <= 1.01 * first.rows for one in later), "rows of blocks that left are used again"
    assert max(one.leaves for one in later) <= 2 * max(one.leaves for one in found.rounds[:2]) + 64
    assert all(0 < one.hits < one.asked for one in later), "some were there, some had left"


def test_the_command_says_each_round_and_writes_the_figures(tmp_path: Path) -> None:
    arguments = ["--blocks", "8192", "--rounds", "2", "--path", str(tmp_path), "--json", str(tmp_path / "s.json")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert all(f"round {number}:" in result.output for number in range(3))
    record = json.loads((tmp_path / "s.json").read_text())
    assert record["figures"]["rounds_holes"] == 0 and record["figures"]["rounds_blocks"] == 8192
    assert {"rounds_longest_stop_ms", "rounds_growth", "rounds_bytes_per_block"} <= record["limits"].keys()
