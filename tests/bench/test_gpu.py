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
from rich.console import Console
from typer.testing import CliRunner

from penstock.bench import gpu
from penstock.bench.command import bench
from penstock.bench.gpu_parts import PARTS, Bench, Part, SaidReport, Settings
from penstock.core.layout import KVLayout
from penstock.report import Report

app = typer.Typer()
app.add_typer(bench, name="bench")


def run(arguments: list[str], tmp_path: Path) -> tuple[int, str, dict[str, object]]:
    file = tmp_path / "report.json"
    result = CliRunner().invoke(app, ["bench", "gpu", *arguments, "--json", str(file)])
    output = " ".join(result.output.replace("│", " ").split())
    return result.exit_code, output, json.loads(file.read_text()) if file.exists() else {}


# What penstock depends on and an image for GPUs lacks, but for msgspec, which whoever measures there brings along.
ABSENT = ("cryptography", "httptools", "starlette", "uvicorn")


@pytest.mark.slow
def test_every_part_runs_on_a_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = tmp_path / "absent"
    absent.mkdir()
    for name in ABSENT:
        (absent / f"{name}.py").write_text("raise ImportError('an image for GPUs does not have it')")
    root = Path(__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(absent), str(root)]))
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
    assert "failed" not in notes and {f"part_{name}_s" for name in PARTS} <= set(figures)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing only where there is no GPU")
def test_without_a_gpu_it_says_what_is_missing(tmp_path: Path) -> None:
    code, output, report = run([], tmp_path)
    assert code == 0
    assert "no CUDA device is visible to torch" in output
    assert report["figures"] == {}
    assert "not measured" in str(report["notes"])


@pytest.mark.parametrize(
    ("arguments", "allowed"),
    [
        (["--device", "cpu"], "allowed: cuda"),
        (["--device", "tpu", "--tiny"], "allowed: cuda"),
        (["--parts", "copies,speed"], "allowed: host, vllm, copies"),
    ],
)
def test_what_would_not_be_a_measurement_is_refused(arguments: list[str], allowed: str, tmp_path: Path) -> None:
    code, output, report = run(arguments, tmp_path)
    assert code == 2
    assert allowed in output and not report


CHILD = """
import os, sys, time
sys.path.append({!r})
from penstock.bench import gpu_parts
def figure(bench): bench.report.figure("before", 1.0)
def fails(bench): figure(bench); raise RuntimeError("CUDA error: an illegal memory access was encountered")
def dies(bench): figure(bench); os.kill(os.getpid(), 9)
def hangs(bench): figure(bench); time.sleep(300)
def works(bench): bench.report.figure("after", bench.report.figures.get("before", 0.0))
gpu_parts.PARTS |= dict(vllm=gpu_parts.Part(DOES, 9.0), copies=gpu_parts.Part(works, 9.0))
gpu_parts.main()
"""


@pytest.mark.parametrize(
    ("does", "why"),
    [
        ("fails", "vllm failed: RuntimeError: CUDA error: an illegal memory access was encountered (<string>:6)"),
        ("dies", "vllm failed: its process ended by signal 9"),
        ("hangs", "vllm failed: its process did not end within 0.5 s"),
    ],
)
def test_a_part_that_fails_leaves_the_figures_of_the_others(
    does: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails in a process of its own: what comes after it begins with a new one."""
    monkeypatch.setattr(gpu, "CHILD", CHILD.replace("DOES", does))
    monkeypatch.setitem(PARTS, "vllm", Part(PARTS["vllm"].run, 0.5 if does == "hangs" else 60.0))
    file = tmp_path / "report.json"
    one = gpu.GpuRun(Report("gpu"), Console(quiet=True), file)
    one.run_all(["vllm", "copies"], Settings(str(tmp_path / "state"), str(tmp_path), (), "cpu", True, None, None, 60.0))
    assert one.failed
    report = json.loads(file.read_text())
    assert report["figures"]["before"] == 1.0 and report["figures"]["after"] == 0.0, "in a process that knows nothing"
    assert len(report["notes"]) == 1 and report["notes"][0].startswith(why), report["notes"]
    log = file.with_suffix(".log").read_text()
    assert {"fails": "Traceback", "dies": "vllm", "hangs": "most recent call first"}[does] in log


def test_a_real_part_that_fails_says_why(tmp_path: Path) -> None:
    """Here torch has no GPU, and says so."""
    file = tmp_path / "report.json"
    one = gpu.GpuRun(Report("gpu"), Console(quiet=True), file)
    device = f"cuda:{torch.cuda.device_count()}"
    one.run_all(
        ["copies", "host"], Settings(str(tmp_path / "state"), str(tmp_path), (), device, True, None, None, 60.0)
    )
    report = json.loads(file.read_text())
    assert report["notes"][0].startswith("copies failed: ") and one.failed
    assert report["figures"]["host_vllm_calls_per_message"] == 3


@pytest.mark.slow
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
    assert figures["upload_4_whole_ratio"] > 0 and not json.loads(file.read_text())["errors"]


@pytest.mark.parametrize(
    ("device_gb", "host_gb", "lengths", "notes"),
    [
        (80, 90.0, (16384, 32768, 65536, 131072), 0),
        (20, 90.0, (16384, 32768, 65536), 1),
        (80, 4.0, (16384,), 3),
        (4, 90.0, (), 4),
    ],
)
def test_hits_that_memory_does_not_hold_are_left_out(
    device_gb: int,
    host_gb: float,
    lengths: tuple[int, ...],
    notes: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (device_gb << 30, 141 << 30))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    state = tmp_path / "state"
    settings = Settings(str(state), str(tmp_path), (), "cuda", False, None, int(host_gb * 1e9), 60.0)
    report = SaidReport.of(state)
    measured = Bench(settings, report)
    measured.fit(KVLayout(64, (4096,) * 32, "bfloat16"), torch.device("cuda", 0))
    assert measured.ttft.hit_tokens == lengths
    assert sum("left out: hits of" in note for note in report.notes) == notes
