"""`penstock bench scale` on few blocks: its figures by name, each with its goal and what it was before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from penstock.bench.scale import scale

NAMES = {
    "bytes_per_block",
    "open_million_rows_s",
    "longest_stop_ms",
    "store_evicting_us_per_block",
    "lookup_us_per_key",
}

app = typer.Typer()
app.command()(scale)


@pytest.mark.slow
def test_measures_and_writes_each_figure_beside_its_goal_and_what_it_was(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["--blocks", "8192", "--path", str(tmp_path), "--json", str(tmp_path / "s.json")])
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "s.json").read_text())
    figures = record["figures"]
    assert record["experiment"] == "scale" and record["modelled"] == []
    assert figures.keys() >= NAMES | {f"{name}_before" for name in NAMES} and record["limits"].keys() >= NAMES
    assert all(value > 0 for value in figures.values())
    assert figures["bytes_per_row"] <= record["limits"]["bytes_per_block"] == 100
    assert figures["bytes_per_row_on_disk"] < 200
    assert [path.name for path in tmp_path.iterdir()] == ["s.json"], "what was written for it is gone"


def test_a_folder_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["--quick", "--path", str(tmp_path / "absent" / "x")])
    assert result.exit_code != 0 and "Traceback" not in result.output
