"""`benchmarks vllm`: stock vLLM, vLLM with LMCache, and vLLM with Penstock, on the same requests and link."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.peers.loads import AGENTS, CONTEXT_TOKENS_MAX, CONVERSATION, DATASETS, Geometry, build_model
from benchmarks.peers.measure import Found, Measurement, Plan, servers_up
from benchmarks.peers.paced_link import measure_link
from benchmarks.peers.systems import LMCACHE, SYSTEMS, Bed, lmcache_missing, probe
from benchmarks.peers.vllm_report import conclude, draw, print_runs, write_requests
from penstock.bench.system_under_test import SystemFailed
from penstock.command_line import PlotFile, refuse
from penstock.report import Report
from penstock.units import parse_rate
from penstock.workloads.load_check import idle_links, refuse_empty
from penstock.workloads.progress import Counter, progress_bar
from penstock.workloads.traces import TraceError

L1_TOKENS = 12_288  # seven of CALVO's mean contexts
L1_SPARE_TOKENS = 64
STAGING_BYTES = 512 << 20
STORE_BYTES = 4 << 30
BLOCK_TOKENS = 32
BATCH_TOKENS_MAX = 2048


def vllm(
    json: Annotated[Path | None, typer.Option(help="Write the figures to this file.")] = None,
    record: Annotated[Path | None, typer.Option(help="Write every request to this file, a line of JSON each.")] = None,
    plot: PlotFile = None,
    python: Annotated[Path | None, typer.Option(help="Interpreter with vllm and penstock. Default: this one.")] = None,
    lmcache_python: Annotated[
        Path | None, typer.Option(help="Interpreter with the same vllm and lmcache. Default: --python.")
    ] = None,
    traces: Annotated[
        Path | None, typer.Option(help="Folder with claude_code/ and mooncake/conversation.jsonl. Default: no traces.")
    ] = None,
    link: Annotated[str, typer.Option(help="Rate of the link before each store, each way.")] = "20MB/s",
    dataset: Annotated[list[str] | None, typer.Option(help="loogle, icl, code or none. Default: all three.")] = None,
    trace: Annotated[
        list[str] | None, typer.Option(help="Of --traces: claude_code or conversation. Default: both.")
    ] = None,
    system: Annotated[
        list[str] | None, typer.Option(help="stock, lmcache, connector or scheduler. Default: all four.")
    ] = None,
    rate: Annotated[
        float, typer.Option(min=0.05, max=10, help="Arrivals, as a share of the baseline's capacity.")
    ] = 1.0,
    requests: Annotated[int, typer.Option(min=4, max=1000, help="Requests of a dataset.")] = 40,
    trace_requests: Annotated[int, typer.Option(min=4, max=2000, help="Requests of a trace.")] = 48,
    repeats: Annotated[int, typer.Option(min=1, max=50, help="Runs of each system on each workload.")] = 2,
    policy: Annotated[
        str | None, typer.Option(help="Ordering of Penstock's scheduler. Default: the scheduler's.")
    ] = None,
    age_bound: Annotated[
        float | None,
        typer.Option(
            min=0.1, max=600, help="Seconds after which Penstock serves a request first. Default: the scheduler's."
        ),
    ] = None,
    age_delays: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1e6,
            help="How long others may overtake a request, in delays under fcfs; 0: no limit. Default: the scheduler's.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of lengths, arrivals and deadline multipliers.")] = 0,
) -> None:
    """Serves the same requests with four systems over links of the same rate: TTFT, SLO attainment, throughput."""
    console = Console(stderr=True)
    systems = _chosen("system", system, SYSTEMS)
    wanted_traces = _chosen("trace", trace, (AGENTS, CONVERSATION))
    datasets = () if dataset == ["none"] else _chosen("dataset", dataset, DATASETS)
    link_bytes_per_s = parse_rate(link)
    report = Report("vllm")
    try:
        own = _python(python)
        with tempfile.TemporaryDirectory(prefix="penstock-bench-") as folder:
            geometry = Geometry()
            bed = Bed(
                model=Path(folder),
                vocabulary=build_model(Path(folder), geometry),
                kv_bytes_per_token=geometry.kv_bytes_per_token,
                l1_bytes=(L1_TOKENS + L1_SPARE_TOKENS) * geometry.kv_bytes_per_token,
                staging_bytes=STAGING_BYTES,
                store_bytes=STORE_BYTES,
                link_bytes_per_s=link_bytes_per_s,
                block_tokens=BLOCK_TOKENS,
                context_tokens_max=CONTEXT_TOKENS_MAX + 2 * BLOCK_TOKENS,
                batch_tokens_max=BATCH_TOKENS_MAX,
                python=own,
                lmcache_python=lmcache_python or own,
                policy=policy,
                age_bound_s=age_bound,
                age_delays=age_delays,
            )
            systems = _without_missing(systems, bed, report, console)
            plan = Plan(
                systems,
                datasets,
                requests,
                trace_requests,
                repeats,
                rate,
                seed,
                *_trace_paths(traces, wanted_traces, report),
            )
            report.figure("link_bytes_per_s", measure_link(link_bytes_per_s), limit=link_bytes_per_s)
            found = _measure(bed, plan, console)
        _describe(report, bed, plan, geometry, link)
        conclude(report, plan, found)
    except (SystemFailed, TraceError, ValueError, OSError) as error:
        refuse("python -m benchmarks vllm", error, status=1)
    print_runs(Console(), plan, found)
    report.print(Console())
    if json is not None:
        report.write_json(json)
    if record is not None:
        write_requests(record, found)
    if plot is not None:
        draw(plot, report)
        console.print(f"wrote {plot}")
    if report.figures["failed_requests"]:
        raise typer.Exit(1)
    refuse_empty("python -m benchmarks vllm", idle_links(report.figures, control="conversation_"), console)


def _chosen(name: str, given: list[str] | None, allowed: tuple[str, ...]) -> tuple[str, ...]:
    for value in given or ():
        if value not in allowed:
            raise typer.BadParameter(f"{name} is {value!r}; allowed: {', '.join(allowed)}")
    return tuple(value for value in allowed if given is None or value in given)


def _python(given: Path | None) -> Path:
    """The interpreter that runs vLLM with Penstock. Raises SystemFailed."""
    if given is None and importlib.util.find_spec("vllm") is None:
        raise SystemFailed("this interpreter has no vllm; give one that has it by --python")
    if given is None:
        return Path(sys.executable)
    found = shutil.which(str(given))
    if found is None:
        raise SystemFailed(f"--python is {given}; that is not a program")
    missing = {"vllm", "penstock"} - set(probe(Path(found)))
    if missing:
        raise SystemFailed(f"{given} has no {' and no '.join(sorted(missing))}")
    return Path(found)


def _without_missing(systems: tuple[str, ...], bed: Bed, report: Report, console: Console) -> tuple[str, ...]:
    """Leave LMCache out, with the reason, if it is not installed."""
    why = lmcache_missing(bed) if LMCACHE in systems else None
    if why is None:
        return systems
    report.notes.append(f"lmcache skipped: {why}")
    console.print(f"lmcache skipped: {why}", markup=False)
    return tuple(system for system in systems if system != LMCACHE)


def _trace_paths(folder: Path | None, wanted: tuple[str, ...], report: Report) -> tuple[Path | None, Path | None]:
    if folder is None:
        report.notes.append("traces skipped: --traces names no folder")
        return None, None
    agents = folder / "claude_code" if AGENTS in wanted else None
    return agents, folder / "mooncake" / "conversation.jsonl" if CONVERSATION in wanted else None


def _measure(bed: Bed, plan: Plan, console: Console) -> Found:
    with progress_bar(console) as progress:
        counter = Counter(progress, "", plan.replays)
        with servers_up(bed, plan.systems, counter.describe) as servers:
            return Measurement(bed, plan, servers, counter, counter.describe).run()


def _describe(report: Report, bed: Bed, plan: Plan, geometry: Geometry, link: str) -> None:
    versions = probe(bed.python) | {k: v for k, v in probe(bed.lmcache_python).items() if k == "lmcache"}
    report.modelled.append(
        f"the link between each store and its engine: a TCP forwarder in a process of its own, {link} each way, shared "
        "by all connections; vLLM, stores, sockets, KV and compute are real"
    )
    report.notes += [
        ", ".join(f"{name} {version}" for name, version in versions.items()),
        geometry.describe(),
        f"vLLM's KV memory {bed.l1_bytes / 1e6:.0f} MB ({L1_TOKENS} tokens), blocks of {bed.block_tokens} tokens, "
        f"batches of at most {bed.batch_tokens_max} tokens; staging memory of Penstock and L1 of LMCache "
        f"{bed.staging_bytes / 1e6:.0f} MB each, neither keeps what was loaded",
        f"datasets: {plan.requests} requests, Poisson arrivals at {plan.rate:g} of the capacity of {plan.baseline}; "
        f"{plan.repeats} repeats, systems in turns in random order; figures are medians over repeats",
        f"deadlines: TTFT of {plan.baseline} without interference (a fit over requests alone) times 2, 4 or 8",
    ]
    if bed.age_bound_s is not None:
        report.notes.append(f"Penstock's ageing bound {bed.age_bound_s:g} s")
    if bed.age_delays is not None:
        report.notes.append(f"Penstock's ageing at {bed.age_delays:g} delays of first come, first served")
