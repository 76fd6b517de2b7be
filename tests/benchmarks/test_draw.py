"""Pictures of runs: those of the docs are drawn from figures that lie beside them; the page names the run's command."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.draw import DRAWN
from penstock.report import Report, read_report

DOCS = Path(__file__).parents[2] / "docs"
RUNS = sorted((DOCS / "figures" / "runs").glob("*.json"))
PAGES = {page: page.read_text() for page in (DOCS / "measurements").glob("*.md")}


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = Report("calvo", command="python -m benchmarks calvo")
    written.figure("icl_1_sjf_ttft_mean_s", 0.25, limit=1)
    written.notes.append("a note")
    written.write_json(tmp_path / "run.json")
    assert read_report(tmp_path / "run.json") == written


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.stem)
def test_a_run_of_the_docs_is_drawn_and_shown_with_its_command(run: Path, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    result = CliRunner().invoke(app, ["draw", str(run), str(picture)])
    assert result.exit_code == 0, result.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    words = shlex.split(read_report(run).command)
    command = shlex.join(words[: words.index("--json")])
    shown = [page for page, text in PAGES.items() if f"](../figures/{run.stem}.png)" in text]
    assert len(shown) == 1 and (DOCS / "figures" / f"{run.stem}.png").is_file()
    assert command in " ".join(PAGES[shown[0]].split())


def test_every_page_of_measurements_shows_a_picture() -> None:
    without = {page.name for page, text in PAGES.items() if not re.search(r"!\[[^]]+\]\(\.\./figures/", text)}
    assert without == {"README.md"}
    assert {read_report(run).experiment for run in RUNS} <= set(DRAWN)


def test_what_cannot_be_drawn_is_one_line(tmp_path: Path) -> None:
    Report("demo", command="x").write_json(tmp_path / "demo.json")
    (tmp_path / "other.json").write_text(json.dumps({"figures": {}}))
    for name, reason in (
        ("demo.json", "the experiment is 'demo'"),
        ("other.json", "not the figures of a run"),
        ("no", "No such"),
    ):
        result = CliRunner().invoke(app, ["draw", str(tmp_path / name), str(tmp_path / "x.png")])
        assert result.exit_code == 2 and reason in result.output and len(result.output.splitlines()) == 1
