"""`penstock bench gpu`: all of its parts with a tiny model on the CPU, and what it says where there is no GPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from penstock.bench.command import bench

app = typer.Typer()
app.add_typer(bench, name="bench")


def run(arguments: list[str], tmp_path: Path) -> tuple[int, str, dict[str, object]]:
    file = tmp_path / "report.json"
    result = CliRunner().invoke(app, ["bench", "gpu", *arguments, "--json", str(file)])
    output = " ".join(result.output.replace("│", " ").split())
    return result.exit_code, output, json.loads(file.read_text()) if file.exists() else {}


def test_every_part_runs_on_a_tiny_model(tmp_path: Path) -> None:
    code, output, report = run(["--device", "cpu", "--tiny", "--slab-folder", str(tmp_path)], tmp_path)
    assert code == 0, output
    figures, notes = report["figures"], " ".join(report["notes"])  # type: ignore[arg-type]
    assert isinstance(figures, dict)
    for name in ("hidden_unequal_outputs", "memory_unequal_outputs", "slab_unequal_outputs"):
        assert figures[name] == 0
    assert {"upload_ratio", "hidden_share", "ttft_256_recompute_s", "ttft_256_memory_gain"} <= set(figures)
    for name in ("upload_4_whole", "upload_4_by_layer", "download_4", "vllm_16_tokens_layer_first_up_4"):
        assert figures[f"{name}_ratio"] > 0
    assert figures["decode_128_ms"] > 0 and "attention: gathered pages" in notes
    assert figures["host_vllm_calls_per_message"] == 3
    assert figures["host_vllm_64_tokens_block_first_down_us"] > 0
    assert {"ttft_128_slab_penstock_s", "ttft_128_slab_coupled_s"} <= set(figures)
    assert "not a measurement" in notes
    assert "were hits" not in notes, "every measured request found its whole document in the pool"


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing only where there is no GPU")
def test_without_a_gpu_it_says_what_is_missing(tmp_path: Path) -> None:
    code, output, report = run([], tmp_path)
    assert code == 0
    assert "no CUDA device is visible to torch" in output
    assert report["figures"] == {}
    assert "not measured" in str(report["notes"])


@pytest.mark.parametrize("arguments", [["--device", "cpu"], ["--device", "tpu", "--tiny"]])
def test_devices_that_would_not_be_a_measurement_are_refused(arguments: list[str], tmp_path: Path) -> None:
    code, output, report = run(arguments, tmp_path)
    assert code == 2
    assert "allowed: cuda" in output and not report


def test_copies_are_measured_with_torch_and_numpy_alone(tmp_path: Path) -> None:
    """What an image for GPUs has: everything else that Penstock depends on is made unimportable."""
    root = Path(__file__).parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["tokenizer"], *extras["engine"]]
    absent = {re.split(r"[^\w-]", one)[0].replace("-", "_") for one in wanted} - {"penstock", "torch", "numpy"}
    assert {"msgspec", "rich", "transformers", "typer"} <= absent
    file, script = tmp_path / "copies.json", root / "examples" / "gpu_copies.py"
    code = (
        f"import sys, runpy; sys.modules.update(dict.fromkeys({sorted(absent)!r}));"
        f"sys.argv[1:] = ['--device', 'cpu', '--json', {str(file)!r}];"
        f"runpy.run_path({str(script)!r}, run_name='__main__')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env={**os.environ, "PYTHONPATH": str(root)})
    figures = json.loads(file.read_text())["figures"]
    assert figures["host_vllm_calls_per_message"] == 3 and figures["vllm_16_tokens_block_first_up_4_ratio"] > 0
