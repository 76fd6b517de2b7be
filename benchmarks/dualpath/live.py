"""`benchmarks dualpath`: prefill and decode hosts in network namespaces, loading over one path and over both."""

from __future__ import annotations

import itertools
import secrets
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from penstock.command_line import refuse
from penstock.pool.api import PoolError
from penstock.report import Report
from penstock.workloads.progress import Progress, progress_bar

if TYPE_CHECKING:
    from benchmarks.dualpath.testbed import Scale

PARTS = ("offline", "simulated", "online", "lanes", "ablation", "outputs")
WORKLOADS = ("64K", "48K", "32K")
SKIPPED = 0
STORAGE_MBYTES_PER_S = {"penstock": 40.0, "vllm": 4.0}
SHAPES = ("1p1d", "1p2d")


def dualpath(
    part: Annotated[list[str] | None, typer.Option(help=f"What to measure: {', '.join(PARTS)}. Default: all.")] = None,
    workload: Annotated[
        list[str] | None, typer.Option(help=f"Agents offline: {', '.join(WORKLOADS)}. Default: all.")
    ] = None,
    traces: Annotated[
        Path | None, typer.Option(help="Folder of recorded agent sessions, replayed offline too.")
    ] = None,
    storage_mbytes_per_s: Annotated[
        float | None,
        typer.Option(
            min=1,
            max=1000,
            help="Speed of a host's storage NIC; its compute NIC is 8 times faster.",
            show_default="40; vllm 4",
        ),
    ] = None,
    engine: Annotated[
        str, typer.Option(help="penstock: the built-in engine, modelled; vllm: stock vLLMs with tiny models.")
    ] = "penstock",
    shape: Annotated[str, typer.Option(help=f"Of vLLMs: {' or '.join(SHAPES)}.")] = SHAPES[0],
    repeats: Annotated[int, typer.Option(min=1, max=20, help="Repeats of the first workload, systems in turn.")] = 2,
    quick: Annotated[bool, typer.Option(help="The least of everything: checks that it runs.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write the figures to this file.")] = None,
) -> None:
    """Prefill read, DualPath and split reads on hosts with storage and compute NICs: job times, rates, TPOT."""
    from benchmarks.dualpath.namespaces import NamespaceError, why_not
    from benchmarks.dualpath.testbed import Scale
    from penstock.bench.processes import ProcessFailed

    console = Console()
    parts = _chosen("part", part, PARTS)
    workloads = _chosen("workload", workload, WORKLOADS)
    if engine not in STORAGE_MBYTES_PER_S:
        raise typer.BadParameter(f"engine is {engine!r}; allowed: {', '.join(STORAGE_MBYTES_PER_S)}")
    if shape not in SHAPES:
        raise typer.BadParameter(f"shape is {shape!r}; allowed: {', '.join(SHAPES)}")
    reason = why_not()
    if reason is None and engine == "vllm":
        from benchmarks.dualpath.vllm_bed import why_no_vllm

        reason = why_no_vllm()
    if reason is not None:
        console.print(f"bench dualpath: skipped: {reason}", style="yellow", markup=False)
        raise typer.Exit(SKIPPED)
    speed = storage_mbytes_per_s or STORAGE_MBYTES_PER_S[engine]
    scale = Scale(storage_bytes_per_s=speed * 1e6)
    report = Report("dualpath")
    if engine == "vllm":
        _say_what_vllm_measures(report, speed)
    else:
        _say_what_is_modelled(report, scale)
    try:
        with (
            tempfile.TemporaryDirectory(prefix="penstock-bench-") as folder,
            progress_bar(console) as progress,
        ):
            if engine == "vllm":
                _measure_vllm(report, Path(folder), shape, scale, 1 if quick else repeats, progress)
            else:
                _measure(report, Path(folder), scale, parts, workloads, traces, repeats, quick, progress)
    except (OSError, ValueError, RuntimeError, PoolError, ProcessFailed, NamespaceError) as error:
        refuse("python -m benchmarks dualpath", error, status=1)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    report.print(console)
    if json is not None:
        report.write_json(json)


def _chosen(name: str, given: Sequence[str] | None, allowed: Sequence[str]) -> list[str]:
    """The chosen values, in the order of `allowed`. Raises BadParameter."""
    for value in given or ():
        if value not in allowed:
            raise typer.BadParameter(f"{name} is {value!r}; allowed: {', '.join(allowed)}")
    return [value for value in allowed if not given or value in given]


def _say_what_is_modelled(report: Report, scale: Scale) -> None:
    from benchmarks.dualpath.agents import ANSWER_TOKENS_MAX

    profile = scale.profile()
    node_gbits = scale.storage_bytes_per_s * scale.bytes_divisor * scale.time_factor * 8 * 8 / 1e9
    report.modelled += [
        f"compute and copies to device memory: profile {profile.name}, times x {scale.time_factor:g} "
        "(but for the part `outputs`, which computes)",
        f"KV bytes: those of the model / {scale.bytes_divisor}, random content; agents: all lengths / "
        f"{scale.token_divisor}, answers of at most {ANSWER_TOKENS_MAX} tokens",
        f"NICs: veth with tc tbf; storage {scale.storage_bytes_per_s / 1e6:g} MB/s, compute "
        f"{scale.compute_bytes_per_s / 1e6:g} MB/s a host: unscaled, {node_gbits:.0f} Gbit/s of storage for 8 GPUs",
    ]
    report.notes += [
        "basic reads on the prefill side only, with the same engines (stages overlap); the ablation begins with "
        "engines that load, copy and compute one request after the other",
        "device memory and decode buffers are small against the KV of all agents: each turn's context comes from "
        "storage; the pool holds what came before an agent's first turn",
        "share_of_all_nics: bytes received by all storage NICs until the first agent has ended, against plain sockets "
        "over all of them at once in the same run; whole_job: until the last one has",
    ]


def _say_what_vllm_measures(report: Report, storage_mbytes_per_s: float) -> None:
    report.modelled += [
        "model: a Llama with 4 layers and random weights, in float32 on CPU; vLLM itself is unchanged",
        f"NICs: veth with tc tbf; storage {storage_mbytes_per_s:g} MB/s a host, compute 8 times that: so slow that "
        "loading, not computing on this machine's processors, is most of a prefill (see prefill_of_nics_s)",
        "prompts: 99 % of their KV is in the pool, as in the traces of agents that DualPath is made for",
    ]
    report.notes += [
        "the pool's content and the expected outputs come from one vLLM that computes all prompts beforehand",
        "gains: mean time to prefill, and time until all requests have ended, of prefill read over split; best repeat",
        "sim_*: the simulator's prediction, limit: what was measured; calibrated with the run that reads nothing and "
        "with plain sockets over the storage NICs",
    ]


def _measure_vllm(report: Report, folder: Path, shape: str, scale: Scale, repeats: int, progress: Progress) -> None:
    from benchmarks.dualpath.testbed import Topology
    from benchmarks.dualpath.vllm_live import measure_vllm

    task = progress.add_task("vllm", total=None)
    topology = Topology(int(shape[0]), int(shape[2]))
    rate = scale.storage_bytes_per_s
    measure_vllm(report, folder, topology, rate, repeats, lambda text: progress.update(task, description=text))


def _measure(
    report: Report,
    folder: Path,
    scale: Scale,
    parts: Sequence[str],
    workloads: Sequence[str],
    traces: Path | None,
    repeats: int,
    quick: bool,
    progress: Progress,
) -> None:
    from benchmarks.dualpath import live_offline as offline
    from benchmarks.dualpath import live_online as online
    from benchmarks.dualpath.outputs import measure_outputs
    from benchmarks.dualpath.testbed import Topology

    unique = _names()
    size = offline.Size(4, 1, 1) if quick else offline.Size(repeats=repeats)
    if {"offline", "simulated"} & set(parts):
        names = [*workloads[: 1 if quick else None], *([offline.TRACE] if traces is not None else [])]
        cells = []
        for cell, count in offline.cells_of(names, scale, size, traces):
            offline.measure_cell(cell, scale, offline.SYSTEMS, count, progress, unique)
            cells.append(cell)
            if "offline" in parts:
                offline.report_cell(report, cell)
        if "offline" in parts:
            offline.report_equals(report, cells)
        if "simulated" in parts:
            offline.report_simulated(report, cells, scale)
    if "ablation" in parts:
        offline.measure_ablation(
            report, scale, replace(size, turns=min(3, size.turns)), Topology(1, 2), progress, unique
        )
    if "online" in parts:
        topologies = [Topology(1, 1)] if quick else [Topology(1, 1), Topology(1, 2)]
        online.measure_online(report, scale, topologies, 1 if quick else online.STEPS, progress, unique)
    if "lanes" in parts:
        online.measure_tpot(report, scale, 1 if quick else online.TPOT_REPEATS, progress, unique)
    if "outputs" in parts:
        task = progress.add_task("outputs", total=None)
        measure_outputs(report, folder, scale, unique, lambda text: progress.update(task, description=text))
    if quick:
        report.notes.append("--quick: one short run of each; it checks that everything runs, and measures nothing")


def _names() -> Callable[[], str]:
    """A separate tenant for each run, so that it hits nothing of an earlier run."""
    prefix, numbers = secrets.token_hex(4), itertools.count(1)
    return lambda: f"{prefix}-{next(numbers)}"
