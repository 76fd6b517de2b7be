"""Evaluates the runs of `benchmarks vllm`: figures against their goals, a table per workload, a picture."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.peers.loads import CONVERSATION
from benchmarks.peers.measure import Found, Plan
from benchmarks.peers.systems import ABOUT, CONNECTOR, LMCACHE, STOCK, SYSTEMS, TIME, WITH_SCHEDULER, Run
from penstock.report import Report
from penstock.workloads.plots import bar_chart
from penstock.workloads.statistics import percentile
from penstock.workloads.summary import outputs_equal

TTFT_GOAL, SLO_GOAL, THROUGHPUT_GOAL = 2.0, 1.6167, 1.0
LEAST = 0.01
_RECORDED = ("session", "turn", "arrival_s", "prompt_tokens", "cached_tokens", "ttft_s", "total_s", "slo_s", "error")
TITLES = {
    STOCK: "vLLM alone",
    LMCACHE: "with LMCache",
    CONNECTOR: "with Penstock's connector alone",
    WITH_SCHEDULER: "with Penstock",
}
Value = Callable[[Run], float]


def ttft_mean_s(run: Run) -> float:
    """Mean seconds to the first token; infinite if no request succeeded."""
    return statistics.fmean(run.ttfts_s) if run.ttfts_s else float("inf")


def ttft_p50_s(run: Run) -> float:
    """Median seconds to the first token; infinite if no request succeeded."""
    return percentile(run.ttfts_s, 50) if run.ttfts_s else float("inf")


def ttft_p99_s(run: Run) -> float:
    """99th percentile of seconds to the first token; infinite if no request succeeded."""
    return percentile(run.ttfts_s, 99) if run.ttfts_s else float("inf")


def slo_attainment(run: Run) -> float:
    """Share of requests whose first token met the deadline; failed ones count as misses."""
    with_slo = [record for record in run.records if record.slo_s is not None]
    return sum(record.met_slo for record in with_slo) / max(1, len(with_slo))


def requests_per_s(run: Run) -> float:
    """Requests that succeeded, per second of the run."""
    return (len(run.records) - run.failed) / run.wall_s


def hit_rate(run: Run) -> float:
    """Share of prompt tokens that were in vLLM's own cache or came from the store."""
    good = [record for record in run.records if record.error is None]
    return sum(record.cached_tokens for record in good) / max(1, sum(record.prompt_tokens for record in good))


def local_hit_rate(run: Run) -> float:
    """Share of prompt tokens that were in vLLM's own cache, by vLLM's counter."""
    return run.counters.get("local_hit_tokens", 0.0) / max(1, sum(record.prompt_tokens for record in run.records))


def computed_instead_share(run: Run) -> float:
    """Share of prompt tokens that the store held and that Penstock computed because that was faster."""
    tokens = run.counters.get("computed_instead_tokens", 0.0)
    return tokens / max(1, sum(record.prompt_tokens for record in run.records))


def _time_of(label: str, run: Run) -> float:
    """Mean seconds per request in a stage, or waiting for a reason."""
    return run.counters.get(label, 0.0) / max(1, len(run.records))


def link_bytes_per_s(run: Run) -> float:
    """Bytes per second received over the link (loads)."""
    return run.transferred.down_bytes / run.wall_s


def link_gb(run: Run) -> float:
    """10^9 bytes received over the link (loads)."""
    return run.transferred.down_bytes / 1e9


MEASURES: dict[str, Value] = {
    "ttft_mean_s": ttft_mean_s,
    "ttft_p50_s": ttft_p50_s,
    "ttft_p99_s": ttft_p99_s,
    "slo_attainment": slo_attainment,
    "requests_per_s": requests_per_s,
    "hit_rate": hit_rate,
    "local_hit_rate": local_hit_rate,
    "computed_instead_share": computed_instead_share,
    "link_gb": link_gb,
}


def median(runs: Sequence[Run], value: Value) -> float:
    """Median of a value over runs."""
    return statistics.median(value(run) for run in runs)


def conclude(report: Report, plan: Plan, found: Found) -> None:
    """All figures. Ratios are taken within a repeat; the median over repeats counts, with minimum and maximum."""
    report.notes += [f"{system}: {ABOUT[system]}" for system in plan.systems]
    for name, runs in found.runs.items():
        if name in found.capacity_per_s:
            report.figure(f"{name}_capacity_per_s", found.capacity_per_s[name])
            report.figure(f"{name}_alone_ttft_s", found.alone_s[name])
        if name in found.reuse:
            report.figure(f"{name}_reusable_share", found.reuse[name])
        for system in (s for s in SYSTEMS if s in runs):
            _measures(report, name, system, runs[system])
        if name == CONVERSATION:
            _against_stock(report, name, runs)
        else:
            _against_lmcache(report, name, runs)
    _costs(report, found)
    for what, times in found.fills.items():
        report.figure(f"{what}_fills", times, limit=1)
        report.figure(f"{what}_filled_share", found.filled.get(what, 1.0), limit=1.0)
    every = [run for runs in found.runs.values() for of in runs.values() for run in of]
    report.figure("failed_requests", sum(run.failed for run in every), limit=0)
    for system in (s for s in SYSTEMS[1:] if s in plan.systems):
        report.figure(f"{system}_outputs_equal", _equal(found, system), limit=1.0)


def _measures(report: Report, name: str, system: str, runs: Sequence[Run]) -> None:
    """The medians of one system's runs of one workload."""
    for measure, value_of in MEASURES.items():
        report.figure(f"{name}_{system}_{measure}", median(runs, value_of))
    for label in sorted({counter for run in runs for counter in run.counters if counter.startswith(TIME)}):
        report.figure(f"{name}_{system}_{label}_s", median(runs, partial(_time_of, label)))
    if system != STOCK:
        rate = median(runs, link_bytes_per_s) / report.figures["link_bytes_per_s"]
        report.figure(f"{name}_{system}_link_share", rate, limit=1.0)


def _costs(report: Report, found: Found) -> None:
    """The baseline's cost per token when alone: loaded, and computed."""
    model = found.model
    if model is None:
        return
    tokens = 2048
    load_s = model.ttft_s(tokens, 1) - model.ttft_s(0, 1)
    compute_s = model.ttft_s(0, tokens) - model.ttft_s(0, 1)
    report.figure("alone_load_2048_tokens_s", load_s)
    report.figure("alone_compute_2048_tokens_s", compute_s)


def _equal(found: Found, system: str) -> float:
    """Share of requests with the same tokens as under stock vLLM, over the first run of each workload."""
    shares = [
        (outputs_equal(runs[system][0].records, runs[STOCK][0].records), len(runs[system][0].records))
        for runs in found.runs.values()
        if STOCK in runs and system in runs
    ]
    total = sum(count for _, count in shares)
    return sum(share * count for share, count in shares) / total if total else float("nan")


def _against_lmcache(report: Report, name: str, runs: dict[str, list[Run]]) -> None:
    for system in (CONNECTOR, WITH_SCHEDULER):
        if LMCACHE not in runs or system not in runs:
            continue
        pairs = list(zip(runs[system], runs[LMCACHE], strict=True))
        for what, value, goal, higher in (
            ("ttft_mean_gain", ttft_mean_s, TTFT_GOAL, False),
            ("ttft_p99_gain", ttft_p99_s, TTFT_GOAL, False),
            ("slo_gain", slo_attainment, SLO_GOAL, True),
            ("throughput_gain", requests_per_s, THROUGHPUT_GOAL, True),
        ):
            ratios = [
                _ratio(value(ours), value(theirs)) if higher else _ratio(value(theirs), value(ours))
                for ours, theirs in pairs
            ]
            _spread(report, f"{name}_{system}_{what}", ratios, goal)


def _against_stock(report: Report, name: str, runs: dict[str, list[Run]]) -> None:
    """At low reuse: relative to stock vLLM in the same repeat; the limit is the spread of stock's own repeats."""
    if STOCK not in runs:
        return
    stock = [ttft_mean_s(run) for run in runs[STOCK]]
    noise = max(stock) / min(stock)
    report.figure(f"{name}_stock_noise", noise)
    for system in (s for s in SYSTEMS[1:] if s in runs):
        pairs = list(zip(runs[system], runs[STOCK], strict=True))
        limit = noise if system != LMCACHE else None
        _spread(report, f"{name}_{system}_ttft_over_stock", [ttft_mean_s(a) / ttft_mean_s(b) for a, b in pairs], limit)
        _spread(
            report,
            f"{name}_{system}_throughput_over_stock",
            [requests_per_s(a) / requests_per_s(b) for a, b in pairs],
            None,
        )


def _ratio(top: float, bottom: float) -> float:
    """A ratio; a denominator of zero (no deadline was met) counts as LEAST."""
    return top / max(bottom, LEAST)


def _spread(report: Report, name: str, ratios: Sequence[float], limit: float | None) -> None:
    report.figure(name, statistics.median(ratios), limit)
    report.figure(f"{name}_low", min(ratios))
    report.figure(f"{name}_high", max(ratios))


def write_requests(path: Path, found: Found) -> None:
    """Write every request of every run as observed by the client, one line of JSON each; creates the folder. Times are
    seconds, `arrival_s` from the start of its run; `repeat` counts from 1."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for name, runs in found.runs.items():
            for system, of in runs.items():
                for repeat, run in enumerate(of, 1):
                    for record in run.records:
                        line = {"workload": name, "system": system, "repeat": repeat}
                        line |= {field: getattr(record, field) for field in _RECORDED}
                        file.write(json.dumps(line) + "\n")


_SHOWN: dict[str, tuple[Value, Callable[[float], str]]] = {
    "TTFT mean": (ttft_mean_s, lambda v: _time(v)),
    "TTFT p50": (ttft_p50_s, lambda v: _time(v)),
    "TTFT p99": (ttft_p99_s, lambda v: _time(v)),
    "SLO attainment": (slo_attainment, lambda v: f"{v:.1%}"),
    "requests/s": (requests_per_s, lambda v: f"{v:.2f}"),
    "hit rate": (hit_rate, lambda v: f"{v:.1%}"),
    "of it in vLLM's own cache": (local_hit_rate, lambda v: f"{v:.1%}"),
    "computed though stored": (computed_instead_share, lambda v: f"{v:.1%}"),
    "over the link": (link_gb, lambda v: f"{v:.3f} GB"),
}


def print_runs(console: Console, plan: Plan, found: Found) -> None:
    """A table per workload, systems side by side."""
    for name, runs in found.runs.items():
        table = Table(title=_title(name, plan, found, runs), title_justify="left")
        table.add_column("")
        systems = [system for system in SYSTEMS if system in runs]
        for system in systems:
            table.add_column(system, justify="right")
        for label, (value, text) in _SHOWN.items():
            table.add_row(label, *(text(median(runs[system], value)) for system in systems))
        table.add_row("failed", *(str(sum(run.failed for run in runs[system])) for system in systems))
        console.print(table)


def _title(name: str, plan: Plan, found: Found, runs: dict[str, list[Run]]) -> str:
    requests = len(next(iter(runs.values()))[0].records)
    if name in found.capacity_per_s:
        rate = plan.rate * found.capacity_per_s[name]
        return f"{name}: {requests} requests, {rate:.2f}/s ({plan.rate:g} of the capacity of {plan.baseline})"
    return f"{name}: {requests} requests, {found.reuse[name]:.0%} of the prompts' tokens seen before"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.0f} ms"


def draw(path: Path, report: Report) -> None:
    """Mean TTFT, p99 and SLO attainment of each system by workload: medians over repeats."""
    shown = {"TTFT mean, s": "ttft_mean_s", "TTFT p99, s": "ttft_p99_s", "SLO attainment": "slo_attainment"}
    panels: dict[str, dict[str, dict[str, float]]] = {title: {} for title in shown}
    for title, measure in shown.items():
        named = re.compile(rf"(\w+)_({'|'.join(SYSTEMS)})_{measure}")
        for name, value in report.figures.items():
            if (found := named.fullmatch(name)) is not None:
                workload, system = found.groups()
                panels[title].setdefault(workload, {})[TITLES[system]] = value
    bar_chart(path, "Inside vLLM: the same requests, stores behind links of one rate", "", panels, across=True)
