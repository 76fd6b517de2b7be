"""`python -m benchmarks pool`: its engines, its arrangements, every part of it in short, and clear errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.pooling.paced_engines import FilePerChunkEngine, MemoryEngine
from benchmarks.pooling.reads import read_all
from benchmarks.pooling.rig import (
    MODELS,
    PAPER_BLOCKED_S,
    SSD_BYTES_PER_S,
    file_bytes_per_s,
    fill,
    memory_first,
    open_rig,
    paper_kernel_s_per_gb,
    pooled,
)
from benchmarks.pooling.sweep import serial
from penstock.bench.documents import document
from penstock.core.layout import staging_bytes
from penstock.io import IoOp, QueueFull, aligned_buffer
from penstock.io.ring import probe

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "compare_stores.py"
PAGE, ROOT = 4096, bytes(16)
BLOCK = 16 * PAGE


def run(folder: Path, *arguments: str) -> tuple[int, str, dict[str, dict[str, float]]]:
    file = folder / "out" / "pool.json"
    result = CliRunner().invoke(app, ["pool", "--path", str(folder), *arguments, "--json", str(file)])
    return result.exit_code, result.output, json.loads(file.read_text()) if file.exists() else {}


@pytest.fixture
def needs_uring() -> None:
    reason = probe()
    if reason:
        pytest.skip(reason)


# -- engines ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["memory", "files"])
def test_what_is_written_is_read_back(kind: str, tmp_path: Path) -> None:
    engine = MemoryEngine(4 * BLOCK, 2) if kind == "memory" else FilePerChunkEngine(tmp_path, 4 * BLOCK, 2)
    source, target = aligned_buffer(BLOCK), aligned_buffer(BLOCK)
    source[:] = os.urandom(BLOCK)
    target[:] = os.urandom(BLOCK)
    engine.submit([IoOp("write", PAGE, source, "w"), IoOp("read", 2 * BLOCK, target, "never written")])
    with pytest.raises(QueueFull):
        engine.submit([IoOp("read", 0, target, "late")])
    assert [engine.poll(0.0)[0].tag for _ in range(2)] == ["w", "never written"]
    assert not any(target)
    if isinstance(engine, FilePerChunkEngine):
        engine.drop_page_cache()
    engine.submit([IoOp("read", PAGE, target, "r")])
    (done,) = engine.poll(0.0)
    assert done.error is None and target == source and engine.in_flight() == 0


def test_a_chunk_that_was_cut_is_an_error(tmp_path: Path) -> None:
    engine = FilePerChunkEngine(tmp_path, 4 * BLOCK, 2)
    engine.submit([IoOp("write", 0, aligned_buffer(BLOCK), 1)])
    engine.poll(0.0)
    os.truncate(tmp_path / "chunk-0", PAGE)
    engine.submit([IoOp("read", 0, aligned_buffer(BLOCK), 2)])
    (done,) = engine.poll(0.0)
    assert done.error is not None and "moved only 4096" in str(done.error)


# -- arrangements -----------------------------------------------------------------------------------------------------


def test_pooled_spreads_by_bandwidth_and_reads_everything(tmp_path: Path) -> None:
    one = document(ROOT, 64 * 256, 1000, 1)
    arrangement = pooled(memory=3 * SSD_BYTES_PER_S)
    with open_rig(arrangement, tmp_path, BLOCK, len(one.keys), 16.0) as rig:
        fill(rig, [one], BLOCK)
        assert [member.blocks for member in rig.pool.stat(5.0).members] == [24, 24, 8, 8]
        memory = aligned_buffer(staging_bytes(BLOCK) * len(one.keys))
        seconds = read_all(rig, one.keys, BLOCK, memory)
        assert seconds >= 0.99 * len(one.keys) * BLOCK * 64 * 16 / arrangement.bytes_per_s
        assert sum(clock.busy_s for clock in rig.clocks) > 0


def test_memory_first_fills_memory_then_one_ssd(tmp_path: Path) -> None:
    one = document(ROOT, 64 * 256, 1000, 1)
    arrangement = memory_first("serial", file_bytes_per_s(1.0), "files", 0.25, True)
    with open_rig(arrangement, tmp_path, BLOCK, len(one.keys), 1.0) as rig:
        fill(rig, [one], BLOCK)
        assert [member.blocks for member in rig.pool.stat(5.0).members] == [16, 48]
        found = rig.pool.lookup(one.keys, 5.0)
        assert [at for at, hit in enumerate(found) if hit and hit.route == ("memory:0",)] == list(range(16))
        assert rig.clocks[0] is rig.clocks[1], "one device at a time"


def test_the_baseline_takes_the_papers_time() -> None:
    assert serial(MODELS["qwen3"], paper_kernel_s_per_gb()).blocked_s == pytest.approx(PAPER_BLOCKED_S)
    assert file_bytes_per_s(0.0) == SSD_BYTES_PER_S


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_part_runs_in_short(tmp_path: Path, needs_uring: None) -> None:
    code, output, report = run(tmp_path, "--quick", "--model", "gpt_oss", "--context", "16k")
    assert code == 0, output
    figures, limits = report["figures"], report["limits"]
    assert 0.99 < figures["gpt_oss_16k_read_over_bound"] < 3 and limits["gpt_oss_16k_read_over_bound"] == 1.05
    assert figures["cpu_per_gb_file_over_uring"] > 1 and limits["cpu_per_gb_file_over_uring"] == 10
    assert figures["pool_over_sum_alone"] > 0.05 and limits["pool_over_sum_alone"] == 0.95
    assert figures["gpt_oss_16k_ttft_gain_serial"] > 2, "a serial baseline of 0.9 GB/s against 52 GB/s"
    assert figures["gpt_oss_16k_blocked_s"] >= 0.99 * limits["gpt_oss_16k_blocked_s"]
    assert {"gpt_oss_16k_ttft_gain_pooling_alone", "gpt_oss_16k_ttft_gain_passthrough_alone"} <= set(figures)
    assert {"many_idle_while_queued_share", "many_tenant_bytes_ratio"} <= set(figures)
    assert figures["sweep_gpt_oss_kernel_paper_time_ttft_gain_serial"] > 4.1
    assert any("paced" in text for text in report["modelled"])
    assert any("--quick" in text for text in report["notes"])
    assert not list(tmp_path.glob("penstock-bench-*"))


def test_a_part_alone_measures_that_part(tmp_path: Path) -> None:
    code, output, report = run(tmp_path, "--quick", "--part", "reads", "--model", "gpt_oss")
    assert code == 0, output
    assert set(report["limits"]) == {"gpt_oss_16k_read_over_bound"}


@pytest.mark.parametrize("arguments", [("--part", "all"), ("--model", "opt"), ("--context", "1m")])
def test_what_is_unknown_is_refused_by_name(tmp_path: Path, arguments: tuple[str, str]) -> None:
    code, output, _ = run(tmp_path, *arguments)
    assert code == 2 and arguments[1] in output and "allowed" in output


def test_a_folder_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    code, output, _ = run(tmp_path / "absent")
    assert code == 1 and "absent" in output


@pytest.mark.slow
def test_the_comparison_leaves_out_peers_that_cannot_be_installed(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLE), str(tmp_path / "scratch"), "--blocks", "2", "--repeats", "1"]
    without = os.environ | {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=without)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("left out: ") == 2, done.stdout
    assert "penstock slab" in done.stdout and "penstock memory" in done.stdout
