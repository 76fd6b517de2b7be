"""`benchmarks pool`: many memories and SSDs as one pool, against its bounds and the serial baseline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from penstock.command_line import refuse
from penstock.pool.api import PoolError
from penstock.report import Report
from penstock.workloads.progress import steps_shown
from penstock.workloads.recording import RecordedRun, write_runs

PARTS = ("cpu", "sum", "reads", "ttft", "ablation", "many", "sweep")
MODEL_NAMES = ("llama", "gpt_oss", "qwen3")
CONTEXT_NAMES = ("16k", "32k", "64k", "128k")
REPEATS = {"cpu": 5, "sum": 7, "reads": 3, "ttft": 5}
RUN_S = {"cpu": 0.5, "sum": 1.0, "many": 6.0}
SLAB_BYTES = 1 << 30
QUICK_SLAB_BYTES = 128 << 20


def pool(
    path: Annotated[Path, typer.Option(help="Folder on the disk to measure, for slabs and files.")] = Path("."),
    part: Annotated[list[str] | None, typer.Option(help=f"What to measure: {', '.join(PARTS)}. Default: all.")] = None,
    model: Annotated[list[str] | None, typer.Option(help=f"Models: {', '.join(MODEL_NAMES)}. Default: all.")] = None,
    context: Annotated[
        list[str] | None, typer.Option(help=f"Contexts: {', '.join(CONTEXT_NAMES)}. Default: all.")
    ] = None,
    quick: Annotated[bool, typer.Option(help="One short repeat of everything: checks that it runs.")] = False,
    time_factor: Annotated[
        float | None,
        typer.Option(min=0.1, max=100, help="ttft, ablation: times are the paper's times this. Default: 1.5 or 3."),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write the figures to this file.")] = None,
    record: Annotated[Path | None, typer.Option(help="Write the runs to this file, for penstock sim validate.")] = None,
) -> None:
    """Pooled reads, TTFT and CPU against their bounds and the baselines; devices at the paper's ratios, bytes real."""
    console = Console()
    parts = _chosen("part", part, PARTS)
    models = _chosen("model", model, MODEL_NAMES)
    contexts = _chosen("context", context, CONTEXT_NAMES)
    if quick and not context:
        contexts = contexts[:1]
    report = Report("pool")
    try:
        with steps_shown(console, path) as (folder, step):
            runs: list[RecordedRun] = []
            _measure(report, folder, parts, models, contexts, quick, time_factor, step, runs)
    except (OSError, ValueError, RuntimeError, PoolError) as error:
        refuse("python -m benchmarks pool", error, status=1)
    report.print(console)
    if json is not None:
        report.write_json(json)
    if record is not None:
        write_runs(record, runs)


def _chosen(name: str, given: Sequence[str] | None, allowed: Sequence[str]) -> list[str]:
    """The chosen values, in the order of `allowed`. Raises BadParameter."""
    for value in given or ():
        if value not in allowed:
            raise typer.BadParameter(f"{name} is {value!r}; allowed: {', '.join(allowed)}")
    return [value for value in allowed if not given or value in given]


def _measure(
    report: Report,
    folder: Path,
    parts: Sequence[str],
    models: Sequence[str],
    contexts: Sequence[str],
    quick: bool,
    time_factor: float | None,
    step: Callable[[str], None],
    runs: list[RecordedRun],
) -> None:
    from benchmarks.pooling.many import measure_many
    from benchmarks.pooling.reads import measure_reads
    from benchmarks.pooling.sweep import measure_sweep
    from benchmarks.pooling.ttft import measure_ttft
    from penstock.bench.pool_raw import measure_cpu, measure_sum

    repeats = dict.fromkeys(REPEATS, 1) if quick else REPEATS
    run_s = {name: 0.1 if quick and name != "many" else value for name, value in RUN_S.items()}
    slab_bytes = QUICK_SLAB_BYTES if quick else SLAB_BYTES
    kernel_s_per_gb = 0.0
    if {"cpu", "ttft", "ablation", "sweep"} & set(parts):  # the baselines need what is measured here
        kernel_s_per_gb = measure_cpu(report, folder, repeats["cpu"], run_s["cpu"], slab_bytes, step)
    if "sum" in parts:
        measure_sum(report, folder, repeats["sum"], run_s["sum"], slab_bytes, step)
    if "reads" in parts:
        measure_reads(report, folder, models, contexts, repeats["reads"], not quick, step)
    if {"ttft", "ablation"} & set(parts):
        measure_ttft(report, folder, models, contexts, repeats["ttft"], kernel_s_per_gb, parts, time_factor, step, runs)
    if "many" in parts:
        measure_many(report, folder, 1.0 if quick else run_s["many"], step)
    if "sweep" in parts:
        step("sweep")
        measure_sweep(report, models, kernel_s_per_gb)
    if quick:
        report.notes.append("--quick: one short repeat of each; it checks that everything runs, and measures nothing")
