"""`penstock bench io` on a small slab: figures, files, and clear errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from penstock.bench.io import io
from penstock.io.ring import probe

app = typer.Typer()
app.command()(io)
SMALL = ["--size-mib", "64", "--run-s", "0.05", "--repeats", "1"]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, [*SMALL, *arguments])


@pytest.mark.slow
@pytest.mark.parametrize("with_fio", [True, False])
def test_measures_and_writes(with_fio: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := probe():
        pytest.skip(reason)
    if with_fio and shutil.which("fio") is None:
        pytest.skip("fio is not installed")
    if not with_fio:
        monkeypatch.setenv("PATH", str(tmp_path))
    result = run(
        "--path", str(tmp_path), "--json", str(tmp_path / "out" / "io.json"), "--plot", str(tmp_path / "io.png")
    )
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "out" / "io.json").read_text())
    assert record["experiment"] == "io" and record["modelled"] == []
    figures = record["figures"]
    loads = [f"read_{pattern}{size}" for pattern in ("", "random_") for size in ("128k", "2m", "4m")]
    assert record["limits"] == {f"uring_{load}_ratio": 0.95 for load in loads}
    assert figures["uring_read_2m_ratio"] > 0.1 and figures["uring_read_2m_cpu_s_per_gb"] > 0
    assert figures["file_per_chunk_read_2m_cpu_s_per_gb"] > 0
    assert ("fio_read_2m_gb_per_s" in figures) == with_fio
    assert with_fio or any("fio is not installed" in note for note in record["notes"])
    assert (tmp_path / "io.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("penstock-bench-*"))


def test_says_why_it_cannot_run(tmp_path: Path) -> None:
    result = run("--path", "/dev/shm")
    assert result.exit_code == 1 and "tmpfs" in result.output
    result = run("--path", str(tmp_path / "absent"))
    assert result.exit_code == 1 and "absent" in result.output
