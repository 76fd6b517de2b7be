"""`penstock bench gpu`: what the data path reaches on a GPU, and what long hits gain there."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from penstock.extras import missing_modules
from penstock.report import Report

if TYPE_CHECKING:
    from penstock.bench.gpu_ttft import TtftSizes
    from penstock.bench.gpu_upload import UploadSizes
    from penstock.engine.hf_runner import HFRunner

BUDGET_S = 380.0  # no measurement starts after it; the last one has its request timeout to end
DEVICE_HEADROOM_BYTES = 8 << 30  # activations of a prefill chunk, gathered KV of one layer, the allocator's slack
HOST_SHARE = 0.6  # of the available host memory
UPLOAD_BLOCKS = 256
DECODE_CONTEXTS = (2048, 32768, 131072)


def missing(device: str) -> list[str]:
    """What this machine lacks for the experiment, in plain words; empty when nothing."""
    lacking = missing_modules("engine")
    if lacking:
        return [f"the package {name} is not installed; pip install 'penstock[engine]'" for name in lacking]
    if device != "cpu":
        import torch

        if not torch.cuda.is_available():
            built = (
                "this torch is a CPU build"
                if torch.version.cuda is None
                else f"torch is built for {torch.version.cuda}"
            )
            return [f"no CUDA device is visible to torch ({built})"]
    return []


def gpu(
    json: Annotated[Path | None, typer.Option(help="Write the report here.")] = None,
    device: Annotated[str, typer.Option(help="cuda or cuda:1; cpu only together with --tiny.")] = "cuda",
    tiny: Annotated[bool, typer.Option(help="A tiny model: checks that everything runs, measures nothing.")] = False,
    slab_folder: Annotated[
        Path | None, typer.Option(help="Where the slab lies (default: the temporary folder).")
    ] = None,
    slab: Annotated[bool, typer.Option(help="Also measure hits from a slab.")] = True,
) -> None:
    """Copies, loading hidden under compute, decodes, and TTFT of 16K to 128K token hits on a GPU. Takes 8 minutes."""
    if device.split(":")[0] not in ("cuda", "cpu") or (device == "cpu" and not tiny):
        raise typer.BadParameter(f"device is {device!r}; allowed: cuda, or cpu together with --tiny")
    console = Console()
    report = Report("gpu")
    lacking = missing(device)
    report.notes.extend(f"not measured: {what}" for what in lacking)
    try:
        if not lacking:
            with tempfile.TemporaryDirectory(prefix="penstock-gpu-") as scratch:
                _measure(report, console, device, tiny, Path(scratch), slab_folder, slab)
    except Exception as error:
        report.notes.append(f"ended early: {type(error).__name__}: {error}")
        raise
    finally:  # what was measured is kept
        report.print(console)
        if json is not None:
            report.write_json(json)


def _measure(
    report: Report, console: Console, device: str, tiny: bool, scratch: Path, slab_folder: Path | None, slab: bool
) -> None:
    import torch

    from penstock.bench.gpu_copies import (
        LLAMA_COPIES,
        TINY_COPIES,
        measure_groups,
        measure_host,
        measure_rows,
    )
    from penstock.bench.gpu_decode import measure_decode
    from penstock.bench.gpu_ttft import TtftBench
    from penstock.bench.gpu_upload import HostBlocks, measure_hidden_share, measure_upload_ratio

    deadline_s = time.monotonic() + BUDGET_S
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("build the model", total=None)

        def step(text: str) -> None:
            progress.update(task, advance=1, description=text)

        runner = _tiny_runner(scratch, device) if tiny else _llama_runner(scratch, device)
        if device != "cpu":
            properties = torch.cuda.get_device_properties(runner.device)
            report.notes.append(f"device: {properties.name}, {properties.total_memory / 1e9:.0f} GB")
        upload, ttft = _tiny_sizes() if tiny else _llama_sizes()
        folder = slab_folder or scratch
        if not tiny:
            upload, ttft, slab = _fitted(report, runner, upload, ttft, folder, slab)
        progress.update(task, total=7 + (len(ttft.hit_tokens) * (3 if slab else 2)))
        block_tokens = runner.layout.block_tokens
        pages = (max(ttft.hit_tokens) + ttft.question_tokens + ttft.answer_tokens) // block_tokens + 8
        runner.allocate(
            max(pages, upload.upload_blocks, upload.hit_blocks + max(upload.query_tokens) // block_tokens + 1)
        )
        host = HostBlocks(runner, max(upload.upload_blocks, upload.hit_blocks))
        measure_upload_ratio(runner, host, upload, report)
        step("upload bandwidth")
        copies = TINY_COPIES if tiny else LLAMA_COPIES
        measure_groups(runner, host.blocks, copies, report)
        step("groups of blocks")
        measure_hidden_share(runner, host, upload, report)
        step("loading under compute")
        measure_host(LLAMA_COPIES, report)
        measure_rows(runner.device, copies, report)
        step("copies of vLLM's worker")
        measure_decode(runner, DECODE_CONTEXTS if not tiny else (64, 128), report)
        step("decodes")
        runner.kv.page_unlock_all()
        del host
        TtftBench(runner, ttft, report, deadline_s, step).run(folder if slab else None)
        runner.close()
    report.modelled.append("weights are random (dummy); every byte of KV moves and every layer is computed")
    if tiny:
        report.notes.append(f"--tiny on {device}: a check that everything runs, not a measurement")


def _tiny_runner(scratch: Path, device: str) -> HFRunner:
    from penstock.engine.hf_runner import HFRunner
    from penstock.testing.tiny_models import build_tiny

    return HFRunner(str(build_tiny("llama", scratch / "model")), block_tokens=16, device=device)


def _llama_runner(scratch: Path, device: str) -> HFRunner:
    from penstock.engine.checkpoint import llama_3_1_8b_config
    from penstock.engine.hf_runner import HFRunner

    llama_3_1_8b_config().save_pretrained(scratch / "model")
    return HFRunner(str(scratch / "model"), dtype="bfloat16", device=device, load_format="dummy")


def _tiny_sizes() -> tuple[UploadSizes, TtftSizes]:
    from penstock.bench.gpu_ttft import TtftSizes
    from penstock.bench.gpu_upload import UploadSizes

    upload = UploadSizes(upload_blocks=8, hit_blocks=8, query_tokens=(32, 64), repeats=2)
    ttft = TtftSizes(
        hit_tokens=(128, 256),
        question_tokens=32,
        answer_tokens=4,
        repeats=1,
        max_batch_tokens=64,
        staging_blocks=8,
        upload_group_blocks=4,
        request_timeout_s=30.0,
    )
    return upload, ttft


def _llama_sizes() -> tuple[UploadSizes, TtftSizes]:
    from penstock.bench.gpu_ttft import TtftSizes
    from penstock.bench.gpu_upload import UploadSizes

    upload = UploadSizes(UPLOAD_BLOCKS, UPLOAD_BLOCKS, query_tokens=(512, 1024, 2048, 4096, 8192), repeats=5)
    ttft = TtftSizes(
        hit_tokens=(16384, 32768, 65536, 131072),
        question_tokens=512,
        answer_tokens=8,
        repeats=3,
        max_batch_tokens=8192,  # divides every hit, so that the question is one chunk with and without a hit
        staging_blocks=128,
        upload_group_blocks=16,
        request_timeout_s=90.0,
    )
    return upload, ttft


def _available_host_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/meminfo has no MemAvailable")


def _fitted(
    report: Report, runner: HFRunner, upload: UploadSizes, ttft: TtftSizes, slab_folder: Path, slab: bool
) -> tuple[UploadSizes, TtftSizes, bool]:
    """Leave out the lengths that device memory, host memory or the slab's disk cannot hold, and say so."""
    from dataclasses import replace

    import torch

    block_bytes = runner.layout.full_block_bytes
    free_bytes, _ = torch.cuda.mem_get_info()
    host_bytes = int(_available_host_bytes() * HOST_SHARE) - ttft.staging_blocks * block_bytes

    def keep(what: str, limit_bytes: int, factor: float, lengths: tuple[int, ...]) -> tuple[int, ...]:
        needed: Callable[[int], float] = lambda tokens: tokens * runner.layout.bytes_per_token * factor  # noqa: E731
        for tokens in lengths:
            if needed(tokens) > limit_bytes:
                report.notes.append(
                    f"left out: hits of {tokens} tokens need {needed(tokens) / 1e9:.1f} GB of {what}; "
                    f"{max(0, limit_bytes) / 1e9:.1f} GB can be used"
                )
        return tuple(tokens for tokens in lengths if needed(tokens) <= limit_bytes)

    lengths = keep("device memory", free_bytes - DEVICE_HEADROOM_BYTES, 1.02, ttft.hit_tokens)
    lengths = keep("host memory", host_bytes, 1.15, lengths)
    if not lengths:
        raise typer.BadParameter(
            "this machine's memory does not hold a hit of 16384 tokens; see the notes: " + report.notes[-1]
        )
    if slab and not keep("disk for the slab", shutil.disk_usage(slab_folder).free, 1.2, lengths[-1:]):
        slab = False
    return upload, replace(ttft, hit_tokens=lengths), slab
