"""`penstock bench io`: the `uring` engine against raw reads of the same device in the same run."""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from penstock.bench.io_loads import (
    BareRing,
    FilePerChunk,
    Load,
    Pattern,
    Sample,
    free_huge_page_bytes,
    run_engine,
    run_fio,
)
from penstock.command_line import PlotFile, refuse
from penstock.io import BlockEngine, IoOp, aligned_buffer, open_engine
from penstock.report import Report
from penstock.workloads.plots import bar_chart

CHUNKS = {"128k": 128 << 10, "2m": 2 << 20, "4m": 4 << 20}
PATTERNS: tuple[Pattern, ...] = ("sequential", "random")
DEPTHS = {"128k": 32, "2m": 8, "4m": 8}
MEMORY_BYTES = 32 << 20
FILES = 128
OFTEN: tuple[str, Pattern] = ("2m", "sequential")  # run more often than the other loads
OFTEN_ROUNDS = 4
RATIO_MIN = 0.95

Samples = dict[tuple[str, str], list[Sample]]  # (contestant, load such as "read_2m") -> one per repeat


def io(
    path: Annotated[Path, typer.Option(help="Folder for a temporary slab, or a block device (only read).")] = Path("."),
    size_mib: Annotated[int, typer.Option(min=64, help="Size of the slab.")] = 1024,
    repeats: Annotated[int, typer.Option(min=1, max=100, help="Runs of each load; the median counts.")] = 5,
    run_s: Annotated[float, typer.Option(min=0.05, max=60, help="Seconds of one run.")] = 0.5,
    json: Annotated[Path | None, typer.Option(help="Write the figures to this file.")] = None,
    plot: PlotFile = None,
) -> None:
    """Read bandwidth and CPU time of the uring engine against fio, a bare ring and one file per chunk."""
    console = Console()
    report = Report("io")
    try:
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(_work_folder(path))
            engine, device = _prepare(stack, path, folder, size_mib << 20, report)
            samples = _measure(console, engine, device, folder, size_mib << 20, repeats, run_s, report)
        _conclude(report, samples)
        report.print(console)
        if json is not None:
            report.write_json(json)
        if plot is not None:
            draw(plot, report)
    except (OSError, ValueError) as error:
        refuse("penstock bench io", error, status=1)


@contextlib.contextmanager
def _work_folder(path: Path) -> Iterator[Path]:
    """A temporary folder: in `path`, or elsewhere if that is a block device."""
    with tempfile.TemporaryDirectory(prefix="penstock-bench-", dir=None if path.is_block_device() else path) as name:
        yield Path(name)


def _prepare(
    stack: contextlib.ExitStack, path: Path, folder: Path, size_bytes: int, report: Report
) -> tuple[BlockEngine, Path]:
    device = path if path.is_block_device() else folder / "slab"
    engine = open_engine(device, size_bytes, max(DEPTHS.values()))
    stack.callback(engine.close, 30.0)
    if engine.name != "uring":
        raise OSError("the uring engine cannot run here: " + "; ".join(engine.notes))
    if device == path:
        report.notes.append(f"{path} was read without writing random data to it first")
        return engine, device
    memory = aligned_buffer(MEMORY_BYTES)
    memory[:] = os.urandom(MEMORY_BYTES)
    for at in range(0, size_bytes, MEMORY_BYTES):
        engine.submit([IoOp("write", at, memory[: min(MEMORY_BYTES, size_bytes - at)], at)])
        done = engine.poll(60.0)
        if not done:
            raise TimeoutError(f"{device}: a write of {MEMORY_BYTES} bytes did not end within 60 s")
        if done[0].error is not None:
            raise done[0].error
    engine.sync()
    return engine, device


def _measure(
    console: Console,
    engine: BlockEngine,
    device: Path,
    folder: Path,
    size_bytes: int,
    repeats: int,
    run_s: float,
    report: Report,
) -> Samples:
    """All loads, interleaved: each repeat runs every contestant of every load once, so that drift affects all alike."""
    samples: Samples = defaultdict(list)
    with contextlib.ExitStack() as stack:
        memory = aligned_buffer(MEMORY_BYTES)
        engine.register(memory)
        bare = BareRing(device, memory)
        stack.callback(bare.close)
        contestants: dict[str, Callable[[Load], Sample]] = {
            "uring": lambda load: run_engine(load, engine, memory),
            "bare": bare.run,
        }
        fio = shutil.which("fio")
        if fio is None:
            report.notes.append("fio is not installed: the limit is the bare ring loop alone")
        else:
            contestants["fio"] = lambda load: run_fio(load, fio)
            if free_huge_page_bytes() < 2 * MEMORY_BYTES:
                report.notes.append(
                    "fio had 4 KiB pages, the other two transparent huge pages: reserve some "
                    "(sysctl vm.nr_hugepages=64) to see fio at its best"
                )
        files = FilePerChunk(folder, CHUNKS["2m"], FILES)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        progress = stack.enter_context(Progress(*columns, console=console))
        loads = [(chunk, pattern) for chunk in CHUNKS for pattern in PATTERNS]
        loads += [OFTEN] * (OFTEN_ROUNDS - 1)
        bar = progress.add_task("reading", total=repeats * (len(loads) * len(contestants) + 1))
        names = list(contestants)
        for _ in range(repeats):
            for chunk, pattern in loads:
                load = Load(device, size_bytes, CHUNKS[chunk], pattern, DEPTHS[chunk], run_s)
                name = f"read_{chunk}" if pattern == "sequential" else f"read_random_{chunk}"
                names.append(names.pop(0))  # each contestant goes first, second, ... equally often
                for who in names:
                    progress.update(bar, description=f"{pattern} {chunk} by {who}")
                    samples[who, name].append(contestants[who](load))
                    progress.advance(bar)
            samples["file_per_chunk", "read_2m"].append(files.run(memory))
            progress.advance(bar)
    report.notes.extend(engine.notes)
    return samples


def _conclude(report: Report, samples: Samples) -> None:
    """Figures from medians; each load's limit is the better of fio and the bare ring."""
    bandwidth = {key: statistics.median(one.gb_per_s for one in runs) for key, runs in samples.items()}
    cpu = {key: statistics.median(one.cpu_s_per_gb for one in runs) for key, runs in samples.items()}
    names = list(dict.fromkeys(name for _, name in samples))
    for name in names:
        for who in ("uring", "bare", "fio", "file_per_chunk"):
            if (who, name) in samples:
                report.figure(f"{who}_{name}_gb_per_s", bandwidth[who, name])
    for name in names:
        limit = max(bandwidth[who, name] for who in ("fio", "bare") if (who, name) in bandwidth)
        report.figure(f"uring_{name}_ratio", bandwidth["uring", name] / limit, RATIO_MIN)
        if ("fio", name) in bandwidth:
            report.figure(f"uring_{name}_ratio_to_fio", bandwidth["uring", name] / bandwidth["fio", name])
    for who in ("uring", "bare", "fio", "file_per_chunk"):
        if (who, "read_2m") in cpu:
            report.figure(f"{who}_read_2m_cpu_s_per_gb", cpu[who, "read_2m"])
    report.figure("cpu_cut_to_file_per_chunk", 1 - cpu["uring", "read_2m"] / cpu["file_per_chunk", "read_2m"])
    report.notes.append(
        "uring_*_ratio: median bandwidth over the better median of fio and the bare ring loop; "
        "the goal is at least 0.95. CPU is user and system time of the reading process."
    )


def draw(path: Path, report: Report) -> None:
    """The bandwidth of each contestant by load."""
    loads = [f"read_{chunk}" for chunk in CHUNKS] + [f"read_random_{chunk}" for chunk in CHUNKS]
    groups = {
        load.removeprefix("read_").replace("_", " "): {
            title: report.figures[f"{who}_{load}_gb_per_s"]
            for who, title in (("uring", "uring"), ("bare", "bare ring"), ("fio", "fio"))
            if f"{who}_{load}_gb_per_s" in report.figures
        }
        for load in loads
    }
    bar_chart(path, "Direct reads of one slab, medians", "GB/s", {"": groups})
